"""Notebook 04: the figures of double quantization and the checkers of its exercises.

The figures: what a weight costs beyond its four bits, with 32-bit and with 8-bit scales; bits a
weight over the block size; the scales of a layer beside the 256 values they may become; the bytes
of a model, layers alone and whole; the error that 8-bit scales add. The arithmetic is in
`theory/double_quant.py`.
"""

import numpy as np

from qlora_nb.theory import double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, draws, log2_axis, look, mark, stacked_bars

PARTS = {
    "codes": look("4-bit weights"),
    "scales": look("scales"),
    "scales of scales": look("scales of scales"),
    "mean": look("scales of scales"),
    "rest": look("unquantized rest"),
}
"""How each part of a 4-bit layer is drawn, and what is not quantized."""

BLOCKSIZES = [2**k for k in range(3, 13)]
"""Block sizes that are drawn (numbers that share a scale), 8 to 4096."""


@draws((8.4, 2.2), "lower right", xlabel="bits a weight beyond the four (bit)")
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


@draws(
    (8.4, 3.6), "best", xlabel="block size (weights)", ylabel="bits a weight (bit)", ylim=(3.6, 8.4)
)
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


@draws((8.4, 3.8), grid={"nrows": 2, "sharex": True, "height_ratios": [3, 1]})
def plot_scales(axes, scaled, code):
    """The centred scales of a model beside the 256 values they may become.

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


@draws((9.2, 3.4), grid={"ncols": 2, "sharey": True})
def plot_model_bytes(axes, rows, n_weights: int):
    """Bytes of the quantized layers on the left, of the whole model on the right.

    Args:
        rows: {variant: {"codes", "scales", "scales of scales", "mean", "rest"}} in bytes; the first
            variant is unquantized and has its layers' bytes under "codes".
        n_weights: weights in the quantized layers.
    """
    left, right = axes
    unit = 2**20
    name = "MiB"
    largest = max(sum(parts.values()) for parts in rows.values())
    if largest >= 2**30:
        unit = 2**30
        name = "GiB"

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


@draws((9.2, 3.4), grid={"ncols": 2}, xlabel="layer")
def plot_added_error(axes, rows):
    """RMSE with 32-bit scales and with 8-bit scales, layer by layer, and their difference.

    Args:
        rows: {layer: (rmse with 32-bit scales, rmse with 8-bit scales)}, relative to the layer's
            standard deviation.
    """
    plain, double = np.array(list(rows.values())).T
    added = (double - plain) * 1e6
    points = {"linestyle": "none", "markersize": 5, **mark("NF4+DQ")}
    left, right = axes
    left.plot(plain, linestyle="none", markersize=9, label="32-bit scales", **mark("NF4"))
    left.plot(double, label="8-bit scales", **points)
    left.set(ylabel="RMSE (std of the layer)", ylim=(0, 1.35 * plain.max()))
    left.legend(loc="upper right", ncols=2)
    right.vlines(range(len(added)), 0, added, color=points["color"])
    right.plot(added, **points)
    right.set_title(f"Added: at most {max(added.max(), 0):.1f} millionths")
    right.set_ylabel("added RMSE (millionths of std)")
    return f"Error of {len(rows)} layers: the same points"


check_bits_128 = exercise(
    "bits per weight",
    want=double_quant.bits_per_weight(128),
    hint="4 bits, 8 bits shared by 128, 32 bits shared by 128 · 256",
    tolerance=1.5e-4,
)
"""Exercise 1: bits a weight with blocks of 128 and double quantization with 256."""

plain_bytes = sum(double_quant.storage_bytes(4096**2, second_blocksize=None).values())
double_bytes = sum(double_quant.storage_bytes(4096**2).values())

check_saved_bytes = exercise(
    "bytes saved",
    want=plain_bytes - double_bytes,
    hint="count the blocks of 64 first: 4 bytes each before; then 1 byte each, 4 for every 256 of "
    "them, and 4 for the mean",
)
"""Exercise 2: bytes that double quantization saves on one 4096 × 4096 matrix, the mean counted."""

check_same_bits = exercise(
    "block size",
    want=min(size for size in BLOCKSIZES if double_quant.bits_per_weight(size) < 4.5),
    hint="8/blocksize alone must stay below 0.5, and 32/(256 · blocksize) comes on top",
)
"""Exercise 3: the smallest power-of-two block size that with double quantization costs less than
4.5 bits.
"""
