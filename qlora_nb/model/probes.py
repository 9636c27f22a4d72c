"""What the kit takes for granted of a model, tried on the model itself before the first training
step.

Training takes for granted that no token sees those behind it, and packing (`batching.pack`) that
attention follows `position_ids`. A model's name does not tell whether it does. So some tokens of a
short row are changed, and the logits of those that must not see them are compared.
"""

import torch
from torch import nn

from qlora_nb.errors import KitError

TOKENS = 32
"""Tokens in the row that is tried."""


def before_training(model: nn.Module, settings) -> None:
    """Try what a run with these settings relies on; afterwards the model is in eval mode.

    Raises:
        KitError: a token sees those behind it, packed rows would see each other, or `max_length` is
            more than the model has positions.
    """
    require_positions(model, settings.max_length)
    model.eval()
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
    """Whether the logits of the first tokens stay as they are when the last token changes."""
    return _stay_the_same(model, changed=slice(-1, None), read=slice(0, -1))


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether the logits of a row that is packed behind another stay as they are when the tokens of
    the other row change.
    """
    n_first = TOKENS // 2 - 1
    positions = [*range(n_first), *range(TOKENS - n_first)]
    position_ids = torch.tensor([positions], device=model.device)
    first = slice(0, n_first)
    second = slice(n_first, None)
    try:
        return _stay_the_same(model, changed=first, read=second, position_ids=position_ids)
    except TypeError:  # it takes no position_ids
        return False


@torch.no_grad()
def _stay_the_same(model: nn.Module, changed: slice, read: slice, **inputs) -> bool:
    """Whether the logits at some places of a row of `TOKENS` tokens are the same when the tokens at
    other places are other ones.

    They come from the same kernels on the same shape: nothing changes but, with experts, the last
    digits. Ten units in the last place of the largest logit are allowed.
    """
    vocabulary = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, TOKENS), generator=generator).to(model.device)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % vocabulary
    inputs["use_cache"] = False  # with a cache transformers does not look for packed rows
    logits = model(input_ids=ids, **inputs).logits[:, read]
    change = (model(input_ids=other, **inputs).logits[:, read] - logits).abs().max()
    # NaN, which the training names, is no sign of the other tokens
    return not change > 10 * torch.finfo(logits.dtype).eps * logits.abs().max()
