"""How well does a model still do its work when its weights are replaced by what a 4-bit code leaves of them?

`replaced_weights` lends a model other linear weights and gives the old ones back. `recall` asks facts the pocket model has
learnt by heart (almanac prompts): they show 4-bit damage clearly. `text_losses` is the usual measure, the mean loss a
token over texts; for the pocket model's stories it hardly moves, because their loss is mostly the stories' own randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from qlora_nb import pocket
from qlora_nb.engine.models import dense_weight, linear_layers
from qlora_nb.engine.shapes import download_bytes

N_STORIES = 24
"""Stories in a text measurement, a third of them in each sample; every set of weights reads the same ones."""


@contextmanager
def replaced_weights(model, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the context every linear weight in the blocks (not the head) is `change(weight)`; afterwards the old one is back.

    Args:
        model: a model in 16 or 32 bit.
        change: (out, in) tensor → tensor of the same shape.
    """
    layers = linear_layers(model)
    before = {name: module.weight.data for name, module in layers.items()}
    try:
        for module in layers.values():
            module.weight.data = change(module.weight.data).to(module.weight.dtype)
        yield
    finally:
        for name, module in layers.items():
            module.weight.data = before[name]


@torch.no_grad()
def recall(model, tokenizer, prompts: list[tuple[str, str]] | None = None, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask each prompt and look at the first token of the answer.

    Args:
        model, tokenizer: any causal language model; only the pocket model knows the almanac.
        prompts: (prompt, answer) pairs; the whole almanac (720 facts) if left out.
        batch: prompts in one forward pass.

    Returns:
        (n,) loss of the right first answer token for each prompt (nats), and (n,) True where it is the model's first choice.
    """
    prompts = prompts or [(row["prompt"], row["answer"]) for row in pocket.read("almanac")]
    losses, right = [], []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        rows = [tokenizer(p, add_special_tokens=False)["input_ids"] for p, _ in part]
        first = [tokenizer(" " + a, add_special_tokens=False)["input_ids"][0] for _, a in part]
        ids, mask = _padded(rows, tokenizer.pad_token_id, model.device)
        last = mask.sum(dim=1) - 1
        logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(part)), last].float()
        want = torch.tensor(first, device=logits.device)
        losses.append(torch.nn.functional.cross_entropy(logits, want, reduction="none").cpu())
        right.append((logits.argmax(dim=1) == want).cpu())
    return torch.cat(losses), torch.cat(right)


@torch.no_grad()
def text_losses(model, tokenizer, texts: list[str], max_length: int = 128, batch: int = 16) -> torch.Tensor:
    """Mean loss a token (nats) of each text, (len(texts),). Perplexity of a sample of texts is exp of their mean."""
    losses = []
    for start in range(0, len(texts), batch):
        rows = [tokenizer(t, add_special_tokens=False)["input_ids"][:max_length] for t in texts[start : start + batch]]
        ids, mask = _padded(rows, tokenizer.pad_token_id, model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        seen = mask[:, 1:]
        losses.append(((each * seen).sum(dim=1) / seen.sum(dim=1)).cpu())
    return torch.cat(losses)


@dataclass(frozen=True)
class Quality:
    """What one set of weights can do, over three samples of the same kind.

    Attributes:
        name: which weights, for example "NF4".
        losses: mean loss in each sample (nats).
        recall: share of facts known in each sample (0 to 1); empty where there is nothing to know by heart.
    """

    name: str
    losses: tuple[float, ...]
    recall: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over the samples (nats)."""
        return sum(self.losses) / len(self.losses)

    @property
    def known(self) -> float:
        """Share of facts known, mean over the samples (0 to 1)."""
        return sum(self.recall) / len(self.recall)

    @property
    def spread(self) -> float:
        """Standard deviation of the samples' losses (nats)."""
        return math.sqrt(sum((x - self.loss) ** 2 for x in self.losses) / (len(self.losses) - 1))


def measure(name: str, model, tokenizer, knows_almanac: bool, seed: int = 0) -> Quality:
    """Loss (and recall) of a model over three samples of text on which it can be right.

    Args:
        name: how the result is called.
        knows_almanac: True for the pocket model: samples are thirds of the 720 almanac facts. False for any other model: 8
            of the kit's little stories a sample, each model sees the same ones.
        seed: which stories.
    """
    if knows_almanac:
        losses, right = (tuple(x[i::3].double().mean().item() for i in range(3)) for x in recall(model, tokenizer))
        return Quality(name, losses, right)
    stories = [row["text"] for row in pocket.read("stories")]
    per_text = text_losses(model, tokenizer, stories[N_STORIES * (seed % 10) :][:N_STORIES])
    return Quality(name, tuple(per_text[i::3].mean().item() for i in range(3)))


def _padded(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows padded on the right, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    return ids, mask


def comparison_settings(settings):
    """The settings to compare datatypes with: these, or the pocket model's where two unquantized copies do not fit, said aloud.

    Comparing needs the unquantized weights and one changed copy of the linear layers at the same time.
    """
    size = download_bytes(settings.model_id)
    if size is None:
        return settings
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    needed = 2 * size * (1 if on_gpu else 2)
    if needed < 0.8 * free:
        return settings
    sizes = f"needs {needed / 2**30:.1f} GiB, free are {free / 2**30:.1f}"
    print(f"{settings.model_id} unquantized with a changed copy {sizes}: using the pocket model")
    return settings.model_copy(update={"model_id": "pocket"})


def sample_weights(model, n_max: int = 2**22) -> torch.Tensor:
    """Weights of every linear layer, each layer divided by its standard deviation; the first ones of a layer if there are many.

    Args:
        n_max: numbers at most (about: each layer gives whole blocks of 4096).

    Returns:
        (n,) float32 on the CPU.
    """
    layers = linear_layers(model)
    share = max(1, n_max // len(layers) // 4096) * 4096
    parts = []
    for module in layers.values():
        flat = dense_weight(module).flatten().cpu()
        parts.append(flat[:share] / flat.std())
    return torch.cat(parts)


def stored_bytes(model) -> dict[str, int]:
    """Bytes of a model as it lies in memory: 4-bit layers item by item, and the rest.

    `get_memory_footprint` counts parameters and buffers; the scales are neither, so it leaves them out. Call this before
    the model has computed anything: on CPUs with AVX512-BF16 bitsandbytes rearranges weights and scales at the first use.

    Returns:
        {"codes", "scales", "scales of scales", "mean", "rest"}; for a layer that is not quantized all bytes are "codes".
        Biases are "rest". The code tables (16 and 256 numbers, the same for all layers) are left out.
    """
    total = dict.fromkeys(("codes", "scales", "scales of scales", "mean", "rest"), 0)
    for module in linear_layers(model).values():
        for part, size in layer_bytes(module).items():
            total[part] += size
    layers = {id(m.weight) for m in linear_layers(model).values()}
    others = {id(t): t for t in [*model.parameters(), *model.buffers()] if id(t) not in layers}
    total["rest"] = sum(t.nbytes for t in others.values())
    return total


def layer_bytes(module) -> dict[str, int]:
    """Bytes of one linear layer's weight: codes, scales, scales of scales, mean."""
    found = {"codes": module.weight.nbytes}
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        found["scales"] = state.absmax.nbytes
        if state.nested:
            found |= {"scales of scales": state.state2.absmax.nbytes, "mean": state.offset.nbytes}
    return found
