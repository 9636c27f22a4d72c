"""What the kit takes for granted of a model, tried on the model itself before the first training
step.

Two optimizations are right for most causal language models and silently wrong for some: rows packed
into one sequence (`batching.pack`) needs attention that follows `position_ids`, and the loss in
chunks (`chunked_loss`) needs a head after which nothing is computed. A model's name does not tell
whether it bears them. So it is asked to compute one row of at most 32 tokens both ways, without
gradients and in eval mode; its modes and the random state are restored.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora_nb.errors import KitError, is_out_of_memory
from qlora_nb.model import chunked_loss

TOKENS = 32
"""Tokens in the row that is tried."""

LARGE_LOGIT = 100.0
"""The head is scaled until its largest logit is about this: a cap that hardly touches small logits
then shows.
"""


def before_training(model: nn.Module, settings) -> int:
    """Try what a run with these settings relies on, and say in one line what is done differently.

    Returns:
        Tokens in a chunk of the loss, 0 where the plain loss must be used.

    Raises:
        KitError: a token sees those behind it, packed rows would see each other, or `max_length` is
            more than the model has positions.
    """
    require_positions(model, settings.max_length)
    if not sees_no_future(model):
        raise KitError(
            "in this model a token sees those behind it: "
            "it is not made to write from left to right",
            value=model.config.model_type,
            remedy="choose a causal language model",
        )
    if settings.packing and not keeps_rows_apart(model):
        raise KitError(
            "packing: in this model a row sees the rows packed before it, "
            "as its attention does not follow position_ids",
            value=model.config.model_type,
            allowed="packing=False",
            remedy="set packing=False",
        )
    if settings.loss_chunk and not head_is_last(model):
        print(
            "this model computes its loss from more than its head's logits: "
            "all are kept at once, as with loss_chunk=0"
        )
        return 0
    return settings.loss_chunk


def require_positions(model: nn.Module, max_length: int) -> None:
    """Compare `max_length` with the positions that the model was made for.

    A rotary model computes on beyond them, which is said. One with a table of positions (an
    embedding, or a buffer of sines) has no row for them: on a GPU that would end the process. MPT
    weakens attention by a matrix of `max_seq_len` distances.

    Raises:
        KitError: the model has such a table and it is shorter than `max_length`.
    """
    limit = positions_of(model.config)
    if not limit or max_length <= limit:
        return
    if not hasattr(model.config, "max_position_embeddings") or has_position_table(model, limit):
        raise KitError(
            "max_length is more than the positions this model has a vector for",
            value=max_length,
            allowed=f"{limit} or less",
            remedy=f"set max_length={limit}",
        )
    print(
        f"max_length={max_length} is more than the {limit} positions this model was made for: "
        "beyond them it may write nonsense"
    )


def positions_of(config) -> int | None:
    """How many positions a model was made for; None where its configuration names no limit."""
    distances = getattr(config, "max_seq_len", None)
    return getattr(config, "max_position_embeddings", distances)


def has_position_table(model: nn.Module, limit: int) -> bool:
    """Whether an embedding or a buffer (the embedding of words apart) has a row for each position.

    OPT's table has two rows more than positions, and fairseq's kinds of sines up to three.
    """
    words = model.get_input_embeddings()
    tables = [buffer for buffer in model.buffers() if buffer.dim() == 2]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words:
            tables.append(module.weight)
    return any(limit <= len(table) <= limit + 3 for table in tables)


def sees_no_future(model: nn.Module) -> bool:
    """Whether the logits of the first tokens stay as they are when the last token is another one.

    They come from the same kernels on the same shape: nothing changes but, with experts, the last
    digits. Ten units in the last place of the largest logit are allowed.
    """
    ids = _random_ids(model)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % len(model.get_input_embeddings().weight)
    with _undisturbed(model):
        logits = model(input_ids=ids).logits[:, :-1]
        change = (model(input_ids=other).logits[:, :-1] - logits).abs().max()
    return not change > 10 * torch.finfo(logits.dtype).eps * logits.abs().max()


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether a row that is packed behind another gives the logits that it gives alone.

    What rounding may do is measured on the same model: the row alone, and with a masked rest behind
    it, which takes other kernels. Ten times that difference is allowed, and two units in the last
    place of the largest logit. Seen on tiny random models of 40 families: apart, at most twice the
    difference; not apart, in float32 over a thousand times.
    """
    ids = _random_ids(model)
    n = TOKENS // 2 - 1
    before = ids[:, :n]
    row = ids[:, n:]
    length = TOKENS - n
    positions = torch.cat([torch.arange(n), torch.arange(length)])[None].to(ids.device)
    swapped = torch.cat([row, before], dim=1)
    mask = torch.ones_like(ids)
    mask[:, length:] = 0
    with _undisturbed(model):
        try:
            packed = model(input_ids=ids, position_ids=positions).logits[0, n:].float()
        except TypeError:  # it takes no position_ids
            return False
        logits = model(input_ids=row).logits[0]
        masked = model(input_ids=swapped, attention_mask=mask).logits[0, :length].float()
    alone = logits.float()
    largest = alone.abs().max()
    rounding = min((masked - alone).abs().max(), largest / 100)
    allowed = 10 * rounding + 2 * torch.finfo(logits.dtype).eps * largest
    apart = (packed - alone).abs().max()
    return not apart > allowed  # NaN, which the training names, is no sign of the other row


def head_is_last(model: nn.Module) -> bool:
    """Whether the model's logits are what its head makes of the last hidden state: then the loss
    can be taken in chunks.

    False where logits are capped or scaled after the head, a hook changes them, or the head is no
    module that is called. The cross entropy of next tokens, from the logits and in chunks, may
    differ by 1e-4 of its size in float32, by 1e-2 in 16 bit; those of a cap or a scale differ by
    its size.
    """
    head = model.get_output_embeddings()
    if head is None:
        return False
    forward = head.forward
    ids = _random_ids(model)
    labels = ids.clone()
    labels[:, :5] = chunked_loss.IGNORED
    with _undisturbed(model):
        logits = model(input_ids=ids).logits
        largest = logits.abs().max().item()
        if largest == 0 or not math.isfinite(largest):
            return True  # nothing can be told apart; the training names NaN
        factor = 2.0 ** round(math.log2(LARGE_LOGIT / largest))

        def scaled(hidden):
            return factor * forward(hidden)

        try:
            with chunked_loss.replaced_forward(head, scaled):
                own = chunked_loss.logits_cross_entropy(model(input_ids=ids), labels)
                with chunked_loss.chunked_head(model, TOKENS // 2) as loss:
                    chunked = loss(model(input_ids=ids), labels)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False  # the shapes do not fit: the head is not what is called
    allowed = 1e-4 if logits.dtype == torch.float32 else 1e-2
    return not (own - chunked).abs() > allowed * own.abs()


def _random_ids(model: nn.Module) -> torch.Tensor:
    """(1, `TOKENS`) ids, always the same ones."""
    vocabulary = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, TOKENS), generator=generator).to(model.device)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients, no cache. After it the modes and the random state are as
    before.
    """
    modes = [(module, module.training) for module in model.modules()]
    cached = getattr(model.config, "use_cache", None)
    model.eval()
    model.config.use_cache = False
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        model.config.use_cache = cached
        for module, training in modes:
            module.training = training
