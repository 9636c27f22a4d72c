"""What a model costs in bytes before it is loaded, and what it really holds once it is.

`predict` builds the model's modules on torch's *meta* device: every tensor has its true shape and
no memory, so even pythia-12b is counted in a fraction of a second. `measure` walks the tensors of a
live model and its optimizer. Both write the same lines, so a prediction can be laid beside a
measurement, byte by byte.

How many bytes bitsandbytes stores for a linear layer is `theory.double_quant.storage_bytes` (QLoRA,
arXiv 2305.14314, section 3; `bitsandbytes/functional.py`). With them come tables: the 16 code
values (64 bytes), and with double quantization 256 more (1,024 bytes) and one mean (4 bytes).

The published figures "5,842,022,400 bytes for pythia-12b" count codes and both kinds of scales, not
the tables (0.26 MiB) and not the rest of the model. transformers' `get_memory_footprint()` leaves
the scales out. What is needed on top while a step runs is counted in `dry_run` and added up in
`budget`.
"""

import functools
import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_nb import cards
from qlora_nb.errors import KitError
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs, embeddings
from qlora_nb.model.linear_layers import adapted_names, linear_layers, own_quantization
from qlora_nb.theory import double_quant, paging

CODES = "4-bit codes"
SCALES = "scales (absmax)"
NESTED = "scales of the scales"
TABLES = "code tables and offsets"
LINEARS = "linear weights"
EMBEDDINGS = "embedding and head"
SMALL = "biases and norms"
BUFFERS = "buffers"
LORA = "LoRA weights"
GRADIENTS = "gradients"
STATES = "optimizer states"

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

LOOKED_UP = "less: only looked up"


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
        rows.append(("total", self.total_bytes, self.total_gib, ""))
        return rows

    def __repr__(self) -> str:
        text = [self.title]
        for name, size, gib, source in self.table():
            text.append(f"{name:30} {size:>18,} B {gib:9.3f} GiB  {source}")
        return "\n".join(text)

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        head = f"<th {left}>what</th><th>bytes</th><th>GiB</th><th {left}>from</th>"
        rows = [f"<tr>{head}</tr>"]
        for name, size, gib, source in self.table():
            numbers = f"<td>{size:,}</td><td>{gib:.3f}</td>"
            name_cell = f"<td {left}>{html.escape(name)}</td>"
            source_cell = f"<td {left}>{html.escape(source)}</td>"
            rows.append(f"<tr>{name_cell}{numbers}{source_cell}</tr>")
        return f"<div><b>{html.escape(self.title)}</b><table>{''.join(rows)}</table></div>"


def lora_numels(
    model: nn.Module, r: int, target_modules: Sequence[str] = ("all-linear",)
) -> list[int]:
    """Elements of every lora_A (r · in) and lora_B (out · r), layer by layer: the tensors an
    optimizer sees.

    Raises:
        KitError: see `linear_layers.adapted_names`.
    """
    names = adapted_names(model, target_modules)
    numels = []
    for path, layer in linear_layers(model).items():
        if path.rsplit(".", 1)[-1] in names:
            numels += [r * layer.in_features, r * layer.out_features]
    return numels


def trained_numels(plan: Plan) -> list[int]:
    """`lora_numels` of a plan."""
    return lora_numels(_shapes(Plan(plan.config)), plan.r, plan.target_modules)


def state_bits(optim: str) -> int:
    """Bits of one number of a state, by the optimizer's name."""
    return 8 if "8bit" in optim else 32


def optimizer_bytes(numels: Sequence[int], optim: str) -> int:
    """Bytes of Adam's two states for tensors of these sizes, as the optimizer named by Trainer's
    `optim` stores them.

    torch: two float32 an element and a float32 step counter a tensor. bitsandbytes: see
    `paging.state_bytes`; its 8-bit optimizers share two tables of 256 float32
    (`bitsandbytes/optim/optimizer.py`, `Optimizer2State.init_state`).
    """
    if optim == "adamw_torch":
        return sum(8 * n + 4 for n in numels)
    bits = state_bits(optim)
    states = sum(paging.state_bytes(n, bits) for n in numels)
    if bits == 8 and max(numels, default=0) >= paging.MIN_8BIT:
        states += 2048
    return states


def predict(plan: Plan) -> Ledger:
    """The ledger of a model before anything is loaded, with gradients and optimizer states if it is
    trained.

    Returns:
        Bytes by line. The datatype (NF4 or FP4) does not change them: both have sixteen codes.

    Raises:
        KitError: `target_modules` names a layer that the model does not have, or layers share
            weights (Zamba's).

    Example, by hand: a linear layer of 128 × 64 weights, 8,192 in all, takes 4,096 bytes of codes
    and 128 scales; these are 512 bytes, or with double quantization 128 bytes and one float32.
    """
    model = _shapes(Plan(plan.config))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    layers = [layer.weight.numel() for layer in linear_layers(model).values()]
    n_ends = sum(weight.numel() for weight in {embedding, head})  # tied they are one
    n_small = sum(p.numel() for p in model.parameters()) - sum(layers) - n_ends
    if n_small < 0:
        raise KitError(
            "layers of this model share their weights, which is not planned here",
            value=plan.config.model_type,
            remedy="choose a family in docs/models.md",
        )
    if plan.four_bit and head is not embedding:
        if plan.head_4bit:
            layers += [rows * head.shape[1] for rows in embeddings.slice_rows(head.shape[0])]
            n_ends -= head.numel()
        if plan.embedding_on_cpu and plan.on_gpu:
            n_ends -= embedding.numel()
    name = str(plan.rest_dtype).removeprefix("torch.")
    size = plan.rest_dtype.itemsize
    if plan.four_bit:
        nested = plan.double_quant
        own = own_quantization(plan.config)
        if own:
            nested = own.bnb_4bit_use_double_quant
        title = f"predicted: 4-bit{' + double quantization' if nested else ''}, rest {name}"
        lines = _packed_lines(layers, nested)
    else:
        title = f"predicted: all {name}"
        lines = [Line(LINEARS, sum(layers) * size, f"{sum(layers):,} × {name}")]
    lines += [
        Line(EMBEDDINGS, n_ends * size, f"{n_ends:,} × {name}"),
        Line(SMALL, n_small * size, f"{n_small:,} × {name}"),
        Line(BUFFERS, sum(b.nbytes for b in model.buffers()), "rotary frequencies, float32"),
    ]
    if plan.r:
        numels = trained_numels(plan)
        n_trained = sum(numels)
        lines.append(Line(LORA, 4 * n_trained, f"{n_trained:,} × float32, r = {plan.r}"))
        if plan.train:
            lines.append(Line(GRADIENTS, 4 * n_trained, "as the LoRA weights"))
            lines.append(Line(STATES, optimizer_bytes(numels, plan.optim), plan.optim))
    return Ledger(title, tuple(line for line in lines if line.bytes))


@functools.lru_cache(maxsize=32)
def _shapes(plan: Plan) -> nn.Module:
    """The model of a configuration without memory, for reading only.

    It is made once, as a planner asks for the same one many times. A plan, unlike a configuration,
    can be the key of a cache.
    """
    return configs.meta_model(plan.config)


def _packed_lines(layers: list[int], nested: bool) -> list[Line]:
    """The lines of 4-bit layers of so many weights."""
    stored = Counter()
    second = double_quant.SECOND_BLOCKSIZE if nested else None
    for n_weights in layers:
        stored.update(double_quant.storage_bytes(n_weights, second_blocksize=second))
    tables = 64 + 1024 + 4 if nested else 64
    scale = "1 byte" if nested else "4 bytes"
    return [
        Line(CODES, stored["codes"], f"{sum(layers):,} weights / 2"),
        Line(SCALES, stored["scales"], f"weights / 64 × {scale}"),
        Line(NESTED, stored["scales of scales"], "scales / 256 × 4 bytes"),
        Line(TABLES, len(layers) * tables, f"{len(layers)} linear layers × {tables} bytes"),
    ]


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
    total = Counter()
    counted = set()
    for line, tensor in _live_tensors(model, optimizer):
        if tensor is None:  # given back by `merge.release`
            continue
        # of a sharded one the share that lies here
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = here.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total[line] += storage.nbytes()
    lines = [Line(name, total[name], "storages of live tensors") for name in ORDER if total[name]]
    return Ledger("measured", tuple(lines))


def _live_tensors(model: nn.Module, optimizer) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(line, tensor) for everything that a model and its optimizer hold."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedded = {getattr(module, "weight", None) for module in ends}
    matrices = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    packed = _packed(model)
    for name, parameter in model.named_parameters():
        if parameter in packed:
            yield from _packed_tensors(parameter, packed[parameter])
        elif "lora_" in name:
            yield LORA, parameter
        elif parameter in embedded:
            yield EMBEDDINGS, parameter
        elif parameter in matrices:
            yield LINEARS, parameter
        else:
            yield SMALL, parameter
        if parameter.grad is not None:
            yield GRADIENTS, parameter.grad
    for buffer in model.buffers():
        yield BUFFERS, buffer
    states = {} if optimizer is None else optimizer.state
    for state in states.values():
        for tensor in filter(torch.is_tensor, state.values()):
            yield STATES, tensor


def _packed(model: nn.Module) -> dict[torch.Tensor, object]:
    """Packed weight → its `QuantState`; a sharded weight has lost it, its layer has not."""
    found = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if state is not None:
            found[weight] = state
    return found


def _packed_tensors(weight: torch.Tensor, state) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(line, tensor) for one weight as bitsandbytes stores it, with its `QuantState`."""
    yield CODES, weight
    yield SCALES, state.absmax
    yield TABLES, state.code
    if state.nested:
        yield NESTED, state.state2.absmax
        yield TABLES, state.state2.code
        yield TABLES, state.offset


def layer_bytes(layer: nn.Module) -> dict[str, int]:
    """Bytes of one linear layer's weight as it lies in memory, item by item as in
    `double_quant.storage_bytes`: without the code tables, which are the same for every layer.
    """
    found = {"codes": layer.weight.nbytes, "scales": 0, "scales of scales": 0, "mean": 0}
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        found["scales"] = state.absmax.nbytes
        if state.nested:
            found["scales of scales"] = state.state2.absmax.nbytes
            found["mean"] = state.offset.nbytes
    return found


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """`layer_bytes` of all linear layers of the blocks together, and the "rest" of the model.

    As for `measure`, call it before the model has computed anything in eval mode.
    """
    total = Counter()
    for layer in linear_layers(model).values():
        total.update(layer_bytes(layer))
    total["rest"] = measure(model).sum((EMBEDDINGS, SMALL, BUFFERS))
    return total


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
