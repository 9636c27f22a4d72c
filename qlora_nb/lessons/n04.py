"""Notebook 04: the figures of double quantization and the checkers of its exercises.

The figures: what a weight costs beyond its four bits, with 32-bit and with 8-bit scales; bits a
weight over the block size; the scales of a layer beside the 256 values they may become; the bytes
of a model, layers alone and whole. The arithmetic is in `theory/double_quant.py`. What the reader
writes is compared with bitsandbytes.
"""

import torch
from bitsandbytes import functional as bnb
from torch import nn

from qlora_nb.theory import double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, draws, log2_axis, look, mark, stacked_bars, unit_of
from qlora_nb.ui.written import Written

PARTS = {
    "codes": look("4-bit weights"),
    "scales": look("scales"),
    "scales of scales": look("scales of scales"),
    "mean": look("scales of scales"),
    "rest": look("unquantized rest"),
}
"""How each part of a 4-bit layer is drawn, and what is not quantized."""

NF4 = bnb.get_4bit_type("nf4", device="cpu")
"""(16,) the values of NF4, bitsandbytes' own."""

BLOCKSIZES = [2**k for k in range(3, 13)]
"""Block sizes that are drawn (numbers that share a scale), 8 to 4096."""


@draws
def plot_ledger(ax, ledgers):
    """What the scales cost beyond a weight's four bits, one stacked bar for each way to store them.

    Args:
        ledgers: {way: `double_quant.ledger(...)`}, in bits a weight.
    """

    def text(bits):
        return f"  4 + {bits:.4g} = {4 + bits:.4g} bits"

    looks = {part: PARTS[part] for part in ("scales", "scales of scales")}
    ends = stacked_bars(ax, ledgers, looks, text, room=1.5, fontsize=10)
    return f"The scales cost {ends[0]:.3g} bits a weight; quantized too, {ends[-1]:.3g}"


@draws
def plot_bits(ax, blocksize: int, second_blocksize: int):
    """Bits a weight over the block size, without and with double quantization; one block size is
    read off.

    Args:
        blocksize: weights that share a scale.
        second_blocksize: scales that share a second-level scale.
    """

    def line(second, meaning, label):
        """Draw bits over the block size; returns those of the block size that is read off."""
        bits = [double_quant.bits_per_weight(size, second) for size in BLOCKSIZES]
        ax.plot(BLOCKSIZES, bits, label=label, **mark(meaning))
        return double_quant.bits_per_weight(blocksize, second)

    plain = line(None, "NF4", "32-bit scales")
    double = line(second_blocksize, "NF4+DQ", f"8-bit scales, {second_blocksize} to a block")
    ax.plot([blocksize, blocksize], [plain, double], linewidth=2)
    font = {"textcoords": "offset points", "fontsize": 10, "fontweight": "bold"}
    ax.annotate(f"{plain:.3f}", (blocksize, plain), xytext=(7, 5), **font)
    ax.annotate(f"{double:.3f}", (blocksize, double), xytext=(-7, -13), ha="right", **font)
    log2_axis(ax, BLOCKSIZES)
    less = plain - double
    return f"Blocks of {blocksize}: {plain:.3f} bits a weight become {double:.3f}, {less:.3f} less"


@draws
def plot_scales(axes, scaled, code):
    """The centred scales of a layer beside the 256 values they may become.

    Args:
        scaled: centred scales / second-level absmax, in [-1, 1].
        code: (256,) dynamic 8-bit map.
    """
    top, low = axes
    top.hist(scaled.numpy(), bins=80, range=(-1, 1), color=COLOURS["NF4+DQ"])
    top.set_ylabel("scales")
    low.vlines(code, 0, 1, color=COLOURS["NF4"], linewidth=0.7)
    low.set(ylabel="values", yticks=[], xlim=(-1.02, 1.02))
    low.set_xlabel("centred scale / second-level absmax")
    inside = 100 * (scaled.abs() < 0.1).double().mean()
    near = int((code.abs() < 0.1).sum())
    where = f"where {near} of the {len(code)} values lie"
    return f"{inside:.0f} % of the scales lie within ±0.1, {where}"


@draws
def plot_model_bytes(axes, rows, n_weights: int):
    """Bytes of the quantized layers on the left, of the whole model on the right.

    Args:
        rows: {variant: {"codes", "scales", "scales of scales", "mean", "rest"}} in bytes; the first
            variant is unquantized and has its layers' bytes under "codes".
        n_weights: weights in the quantized layers.
    """
    left, right = axes
    largest = max(sum(parts.values()) for parts in rows.values())
    unit, name = unit_of(largest)

    def size(end):
        return f" {end:.3g} {name}"

    def size_and_bits(end):
        return f"{size(end)}, {8 * end * unit / n_weights:.4g} bits a weight"

    first, *quantized = rows
    colours = [COLOURS["16-bit"]] + [COLOURS["NF4"]] * len(quantized)
    looks = {**PARTS, "codes": look("NF4", color=colours)}
    whole = stacked_bars(right, rows, looks, size, unit, 1.35, fontsize=9)
    looks.pop("rest")
    layers = stacked_bars(left, rows, looks, size_and_bits, unit, 2, fontsize=9)
    left.set_title(f"Layers: {layers[0] / layers[-1]:.1f} times smaller than {first}")
    right.set_title(f"Whole model: {whole[0] / whole[-1]:.1f} times (rest dotted)")
    for ax in axes:
        ax.set_xlabel(f"size ({name})")


def packed_by_bitsandbytes(indices: torch.Tensor) -> torch.Tensor:
    """The bytes that bitsandbytes makes of weights with these NF4 indices, two in a byte.

    The values of NF4 themselves are quantized. Each block of 64 ends with two ones, so its scale is
    1, and their byte is left out.
    """
    blocks = nn.functional.pad(indices.long(), (0, -len(indices) % 62)).reshape(-1, 62)
    weights = nn.functional.pad(NF4[blocks], (0, 2), value=1.0)
    packed, _ = bnb.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    return packed.reshape(-1, 32)[:, :31].flatten()[: len(indices) // 2]


def unpacked_by_bitsandbytes(packed: torch.Tensor) -> torch.Tensor:
    """The indices in these bytes: bitsandbytes unpacks them to weights, every scale 1, and each
    weight is looked up among the values of NF4.
    """
    n = 2 * len(packed)
    scales = torch.ones(-(-n // 64))
    state = bnb.QuantState(scales, (n,), NF4, 64, "nf4", torch.float32)
    weights = bnb.dequantize_4bit(packed[:, None], state)
    return torch.searchsorted(NF4, weights.flatten()).to(torch.uint8)


def nearest_by_bitsandbytes(absmax: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The scales in 8 bits: bitsandbytes' own mean and second-level scales, and the nearest of its
    256 values, as its CUDA kernel finds it.

    Its kernel for CPUs takes another value for two scales in a thousand (see
    `double_quant.table_index`), for those of `scales_to_try` the same.
    """
    mean = absmax.mean()
    _, state = bnb.quantize_blockwise(absmax - mean, blocksize=256)
    seconds = state.absmax.repeat_interleave(256)[: len(absmax)]
    distances = (((absmax - mean) / seconds)[:, None] - code).abs()
    return distances.argmin(dim=1).to(torch.uint8), state.absmax, mean


def indices_to_try() -> list[tuple]:
    """NF4 indices: two whose byte is easily found by hand, and 200 of any."""
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(16, (200,), generator=generator, dtype=torch.uint8)
    return [(torch.tensor([10, 3], dtype=torch.uint8),), (many,)]


def bytes_to_try() -> list[tuple]:
    """What is packed from `indices_to_try`."""
    return [(packed_by_bitsandbytes(indices),) for (indices,) in indices_to_try()]


def scales_to_try() -> list[tuple]:
    """Two scales by hand, and those of 600 blocks of a Gaussian; none lies so near to a border
    between two values that rounding decides.
    """
    code = bnb.create_dynamic_map()
    blocks = torch.randn(600, 64, generator=torch.Generator().manual_seed(27))
    return [(torch.tensor([1.0, 3.0]), code), (blocks.abs().amax(dim=1), code)]


def _low_half_first(indices: torch.Tensor) -> torch.Tensor:
    return (indices[1::2] << 4) | indices[0::2]


check_pack_nibbles = Written(
    "pack_nibbles",
    packed_by_bitsandbytes,
    indices_to_try,
    "bitsandbytes' bytes",
    hint="the first of two indices counts 16 times, the second once; the result is uint8",
    mistakes={"the first of two goes into the high half of the byte": _low_half_first},
)
"""Exercise 1: two 4-bit indices in a byte."""

check_unpack_nibbles = Written(
    "unpack_nibbles",
    unpacked_by_bitsandbytes,
    bytes_to_try,
    "what bitsandbytes unpacks",
    hint="of each byte first the whole part of byte / 16, then the rest; so the halves take turns",
)
"""Exercise 2: the indices out of the bytes."""

check_quantize_scales = Written(
    "quantize_scales",
    nearest_by_bitsandbytes,
    scales_to_try,
    "bitsandbytes' scales, mean and nearest values",
    hint="subtract the mean, divide each 256 by their largest magnitude, and take the index of the "
    "nearest value of `code`",
)
"""Exercise 4: double quantization itself."""

plain_bytes = sum(double_quant.storage_bytes(4096**2, second_blocksize=None).values())
double_bytes = sum(double_quant.storage_bytes(4096**2).values())

check_saved_bytes = exercise(
    "bytes saved",
    want=plain_bytes - double_bytes,
    hint="count the blocks of 64 first: 4 bytes each before; then 1 byte each, 4 for every 256 of "
    "them, and 4 for the mean",
)
"""Exercise 3: bytes that double quantization saves on one 4096 × 4096 matrix, the mean counted."""
