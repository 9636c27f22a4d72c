"""What a model costs in bytes before it is loaded, and what it really holds once it is.

`predict` builds the model's modules on torch's *meta* device: every tensor has its true shape and
no memory, so even pythia-12b is counted in a fraction of a second. `measure` walks the tensors of a
live model and its optimizer. Both write the same lines, so a prediction can be laid beside a
measurement, byte by byte.

What bitsandbytes stores for a linear layer of n weights (QLoRA, arXiv 2305.14314, section 3;
`bitsandbytes/functional.py`):

- codes: two 4-bit codes in a byte, n/2 bytes;
- scales: one float32 a block of 64, n/64 · 4 bytes; with double quantization one byte each, n/64
  bytes, and
- scales of the scales: one float32 for 256 of those bytes;
- tables: the 16 code values (64 bytes); with double quantization also 256 values (1,024 bytes) and
  one offset (4 bytes).

The published figures "5,842,022,400 bytes for pythia-12b" count codes and both kinds of scales, not
the tables (0.26 MiB) and not the rest of the model. transformers' `get_memory_footprint()` leaves
the scales out. What comes on top while a step runs is counted in `activations` and added up in
`budget`.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qlora_nb import cards
from qlora_nb.model import configs, device, embeddings, quantized
from qlora_nb.model.linear_layers import adapted_names, linear_layers
from qlora_nb.theory import paging

BLOCK, NESTED_BLOCK = 64, 256

CODES, SCALES, NESTED, TABLES = (
    "4-bit codes",
    "scales (absmax)",
    "scales of the scales",
    "code tables and offsets",
)

LINEARS, EMBEDDINGS, SMALL, BUFFERS = (
    "linear weights",
    "embedding and head",
    "biases and norms",
    "buffers",
)

LORA, GRADIENTS, STATES = "LoRA weights", "gradients", "optimizer states"

LOOKED_UP = "less: only looked up"

ORDER = (
    CODES,
    SCALES,
    NESTED,
    TABLES,
    LINEARS,
    EMBEDDINGS,
    SMALL,
    BUFFERS,
    LORA,
    GRADIENTS,
    STATES,
)

QUANTIZED = (CODES, SCALES, NESTED)


@dataclass(frozen=True)
class Line:
    """One entry: what it is, its size in bytes, and where the number comes from."""

    name: str
    bytes: int
    source: str


@dataclass(frozen=True)
class Ledger:
    """Lines that add up. `ledger["LoRA weights"]` is one line's bytes (0 if there is none)."""

    title: str
    lines: tuple[Line, ...]

    def __getitem__(self, name: str) -> int:
        return sum(line.bytes for line in self.lines if line.name == name)

    def sum(self, names: Iterable[str]) -> int:
        """Bytes of several lines together, for example `ledger.sum(QUANTIZED)`."""
        return sum(self[name] for name in names)

    @property
    def total_bytes(self) -> int:
        """All lines together."""
        return sum(line.bytes for line in self.lines)

    @property
    def total_gib(self) -> float:
        """All lines together in GiB (2^30 bytes)."""
        return self.total_bytes / cards.GIB

    def table(self) -> list[tuple[str, int, float, str]]:
        """(name, bytes, GiB, source) for every line and the total."""
        rows = [(line.name, line.bytes, line.bytes / cards.GIB, line.source) for line in self.lines]
        return [*rows, ("total", self.total_bytes, self.total_gib, "")]

    def __repr__(self) -> str:
        return "\n".join(
            [self.title, *(f"{n:24} {b:>18,} B {g:9.3f} GiB  {s}" for n, b, g, s in self.table())]
        )

    def _repr_html_(self) -> str:
        cells = "<td style='text-align:left'>{}</td><td>{:,}</td><td>{:.3f}</td><td style='text-align:left'>{}</td>"
        body = "".join(
            f"<tr>{cells.format(html.escape(n), b, g, html.escape(s))}</tr>"
            for n, b, g, s in self.table()
        )
        head = "<tr><th style='text-align:left'>what</th><th>bytes</th><th>GiB</th><th style='text-align:left'>from</th></tr>"
        return f"<div><b>{html.escape(self.title)}</b><table>{head}{body}</table></div>"


def lora_numels(
    model: nn.Module, r: int, target_modules: Sequence[str] = ("all-linear",)
) -> list[int]:
    """Elements of every lora_A (r · in) and lora_B (out · r), layer by layer: the tensors an
    optimizer sees.

    Raises:
        KitError: see `models.adapted_names`.
    """
    names = adapted_names(model, target_modules)
    adapted = (m for name, m in linear_layers(model).items() if name.rsplit(".", 1)[-1] in names)
    return [r * side for m in adapted for side in (m.in_features, m.out_features)]


def optimizer_bytes(numels: Sequence[int], optim: str) -> int:
    """Bytes of Adam's two states for tensors of these sizes, as the optimizer named by Trainer's
    `optim` stores them.

    torch: two float32 an element and a float32 step counter a tensor. bitsandbytes 32 bit: two
    float32 an element. 8 bit: two bytes an element and two float32 a block of 256, two shared
    tables of 256 float32; tensors under 4,096 elements stay 32 bit
    (`bitsandbytes/optim/optimizer.py`, `Optimizer2State.init_state`).
    """
    if optim == "adamw_torch":
        return sum(8 * n + 4 for n in numels)
    bits = 8 if "8bit" in optim else 32
    tables = 2048 if bits == 8 and any(n >= paging.MIN_8BIT for n in numels) else 0
    return sum(paging.state_bytes(n, bits) for n in numels) + tables


@dataclass(frozen=True)
class Parts:
    """What `predict` counts, by the names of the settings."""

    double_quant: bool = True
    r: int = 0
    target_modules: Sequence[str] = ("all-linear",)
    optim: str = "paged_adamw_32bit"
    head_4bit: bool = False
    embedding_on_cpu: bool = False


def predict(
    settings=None,
    *,
    config=None,
    four_bit: bool = True,
    rest_dtype: torch.dtype | None = None,
    **changes,
) -> Ledger:
    """The ledger of a model before anything is loaded.

    Args:
        settings: resolved parameters, from which `Parts` is read; without them its defaults count.
        config: a transformers configuration (for example `pythia_config("12b")`); default:
            `settings.model_id`'s.
        four_bit: False counts the linear weights in `rest_dtype` too.
        rest_dtype: dtype of what is not quantized; default: the settings' compute dtype, without
            settings float16. A run that calls `prepare_model_for_kbit_training` has float32 here.
        **changes: fields of `Parts` that differ from the settings.

    Returns:
        Bytes by line. The datatype (NF4 or FP4) does not change them: both have sixteen codes.

    Raises:
        KitError: `target_modules` names a layer that the model does not have.

    Example, by hand: a linear layer of 128 × 64 weights, 8,192 in all, takes 4,096 bytes of codes
    and 128 scales; these are 512 bytes, or with double quantization 128 bytes and one float32.
    """
    parts = Parts(
        **(settings.model_dump(include=set(Parts.__annotations__)) if settings else {}) | changes
    )
    rest_dtype = rest_dtype or (
        device.compute_dtype(settings.compute_dtype) if settings else torch.float16
    )
    config = config or configs.config_of(settings.model_id)
    if own := quantized.own_quantization(config):
        parts = replace(parts, double_quant=own.bnb_4bit_use_double_quant)
    model = configs.meta_model(config)
    weights = [m.weight.numel() for m in linear_layers(model).values()]
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    outside = (
        {"embedding": table.numel()}
        if head is table
        else {"embedding": table.numel(), "head": head.numel()}
    )
    small = sum(p.numel() for p in model.parameters()) - sum(weights) - sum(outside.values())
    if four_bit and head is not table:
        if parts.head_4bit:
            weights += [rows * head.shape[1] for rows in embeddings.slice_rows(head.shape[0])]
            del outside["head"]
        if parts.embedding_on_cpu and ("embedding_on_cpu" in changes or device.on_gpu()):
            del outside["embedding"]
    packed, plain = (weights, []) if four_bit else ([], weights)
    blocks = [-(-n // BLOCK) for n in packed]
    nested, tables = (NESTED_BLOCK, 1092) if parts.double_quant else (0, 64)
    name, item = str(rest_dtype).removeprefix("torch."), rest_dtype.itemsize
    numels = lora_numels(model, parts.r, parts.target_modules) if parts.r else []
    lines = (
        Line(CODES, sum(-(-n // 2) for n in packed), f"{sum(packed):,} weights / 2"),
        Line(
            SCALES,
            sum(blocks) * (1 if nested else 4),
            f"weights / 64 × {'1 byte' if nested else '4 bytes'}",
        ),
        Line(
            NESTED,
            sum(-(-b // nested) * 4 for b in blocks) if nested else 0,
            "scales / 256 × 4 bytes",
        ),
        Line(TABLES, len(packed) * tables, f"{len(packed)} layers × {tables} bytes"),
        Line(LINEARS, sum(plain) * item, f"{sum(plain):,} × {name}"),
        Line(EMBEDDINGS, sum(outside.values()) * item, f"{sum(outside.values()):,} × {name}"),
        Line(SMALL, small * item, f"{small:,} × {name}"),
        Line(BUFFERS, sum(b.nbytes for b in model.buffers()), "rotary frequencies, float32"),
        Line(LORA, 4 * sum(numels), f"{sum(numels):,} × float32, r = {parts.r}"),
        Line(GRADIENTS, 4 * sum(numels), "as the LoRA weights"),
        Line(STATES, optimizer_bytes(numels, parts.optim), parts.optim),
    )
    kind = (
        f"4-bit{' + double quantization' if nested else ''}, rest {name}"
        if four_bit
        else f"all {name}"
    )
    return Ledger(f"predicted: {kind}", tuple(line for line in lines if line.bytes))


def measure(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Ledger:
    """The same lines from live objects: every tensor's storage, counted once.

    Args:
        model: a loaded model, with or without a PEFT adapter; frozen weights packed by bitsandbytes
            or not.
        optimizer: after at least one step, to count its states.

    Returns:
        Bytes by line, from `untyped_storage().nbytes()`: packed weights and tied or shared tensors
        come out right.

    On a CPU with AVX512-BF16 bitsandbytes repacks a frozen layer at its first forward pass in eval
    mode: the scales become bfloat16 and double quantization is undone (`nn/modules.py`,
        `Linear4bit.forward`). Measure before that, or in train mode.
    """
    held: dict[int, tuple[str, int]] = {}  # by storage: what several tensors share counts once

    def add(line: str, *tensors: torch.Tensor | None) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor is not None):
            held.setdefault(storage._cdata, (line, storage.nbytes()))

    at_the_ends = {
        id(m.weight)
        for m in (model.get_input_embeddings(), model.get_output_embeddings())
        if hasattr(m, "weight")
    }
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for name, p in model.named_parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            add(CODES, p)
            add(SCALES, state.absmax)
            add(NESTED, state.state2 and state.state2.absmax)
            add(TABLES, state.code, state.offset, state.state2 and state.state2.code)
        else:
            add(
                LORA
                if "lora_" in name
                else EMBEDDINGS
                if id(p) in at_the_ends
                else LINEARS
                if id(p) in matrices
                else SMALL,
                p,
            )
        add(GRADIENTS, p.grad)
    add(BUFFERS, *model.buffers())
    for state in optimizer.state.values() if optimizer is not None else ():
        add(STATES, *(t for t in state.values() if torch.is_tensor(t)))
    found = {name: sum(size for line, size in held.values() if line == name) for name in ORDER}
    return Ledger(
        "measured",
        tuple(Line(name, n, "storages of live tensors") for name, n in found.items() if n),
    )


def read_for_a_token(model: nn.Module) -> Ledger:
    """What one new token of one answer reads of a live model: every weight once, packed, and of
    embeddings only single rows.

    Returns:
        Bytes by line: those of `measure` without gradients and buffers, less (a negative line) the
        embedding tables that are not the head as well. The cache comes on top, `kv_cache_bytes` for
        every token before. A mixture of experts can do with less: with the experts chosen for the
        token.
    """
    head_weight = getattr(model.get_output_embeddings(), "weight", None)
    looked_up = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not head_weight:
            looked_up += sum(table.nbytes for table in module.parameters(recurse=False))
    lines = [line for line in measure(model).lines if line.name not in (GRADIENTS, BUFFERS)]
    if looked_up:
        lines.append(Line(LOOKED_UP, -looked_up, "a row a token"))
    return Ledger("read for one token", tuple(lines))


def kv_cache_bytes(config, dtype: torch.dtype = torch.float16) -> int:
    """Bytes that one token adds to the cache: a key and a value in every layer.

    Models with fewer key-value heads than heads (Llama's kind) cache only those. pythia-12b in 16
    bit, by hand: 2 · 36 layers · 5,120 · 2 bytes = 737,280.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
