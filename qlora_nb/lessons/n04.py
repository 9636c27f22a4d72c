"""Notebook 04: the figures and checkers of double quantization."""

import numpy as np
import torch

from qlora_nb.lessons import n03
from qlora_nb.theory import double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, MARKERS, draws, log2_axis, look, stacked_bars

PARTS = {
    "codes": look("NF4"),
    "scales": look("other", "//"),
    "scales of scales": look("16-bit"),
    "mean": look("16-bit"),
    "rest": {"color": "#D0D0D0", "hatch": "..", "edgecolor": "white"},
}
"""How each part of a 4-bit layer is drawn, and what is not quantized."""


@draws((8.4, 2.2), "lower right", xlabel="bits a weight beyond the four (bit)")
def plot_ledger(ax, ledgers: dict[str, dict[str, float]]) -> str:
    """What a weight costs beyond its four bits, one bar a variant.

    Args:
        ledgers: {variant: `double_quant.ledger(...)`}, in bits a weight.
    """
    scales = {part: PARTS[part] for part in ("scales", "scales of scales")}
    ends = stacked_bars(
        ax, ledgers, scales, text=lambda end: f"  4 + {end:.4g} = {4 + end:.4g} bits", fontsize=10
    )
    ax.set(xlim=(0, 1.5 * max(ends)), ylim=(len(ledgers) - 0.4, -0.6))
    return f"The scales cost {ends[0]:.3g} bits a weight; quantized too, {ends[-1]:.3g}"


@draws(
    (8.4, 3.6), "best", xlabel="block size (weights)", ylabel="bits a weight (bit)", ylim=(3.6, 8.4)
)
def plot_bits(ax, blocksize: int, second_blocksize: int) -> str:
    """Bits a weight over the block size, without and with double quantization; one block size is
    read off.

    Args:
        blocksize: weights that share a scale.
        second_blocksize: scales that share a second-level scale.
    """
    sizes = [2**k for k in range(3, 13)]
    labels = {"NF4": "32-bit scales", "NF4+DQ": f"8-bit scales, {second_blocksize} to a block"}
    for (kind, label), second in zip(labels.items(), (None, second_blocksize)):
        bits = [double_quant.bits_per_weight(size, second) for size in sizes]
        ax.plot(sizes, bits, MARKERS[kind] + "-", color=COLOURS[kind], label=label)
    a, b = (
        double_quant.bits_per_weight(blocksize, None),
        double_quant.bits_per_weight(blocksize, second_blocksize),
    )
    ax.plot([blocksize, blocksize], [a, b], color=COLOURS["16-bit"], linewidth=2)
    beside = {"textcoords": "offset points", "fontsize": 10, "fontweight": "bold"}
    ax.annotate(f"{a:.3f}", (blocksize, a), xytext=(7, 5), **beside)
    ax.annotate(f"{b:.3f}", (blocksize, b), xytext=(-7, -13), ha="right", **beside)
    log2_axis(ax, sizes)
    return f"Blocks of {blocksize}: {a:.3f} bits a weight become {b:.3f}, {a - b:.3f} less"


@draws((8.4, 3.8), grid={"nrows": 2, "sharex": True, "height_ratios": [3, 1]})
def plot_scales(axes, scaled: torch.Tensor, code: torch.Tensor) -> str:
    """The centred scales of a model beside the 256 values they may become.

    Args:
        scaled: centred scales / second-level absmax, in [-1, 1].
        code: (256,) dynamic 8-bit map.
    """
    top, low = axes
    top.hist(scaled.numpy(), bins=80, range=(-1, 1), color=COLOURS["NF4+DQ"])
    low.vlines(code, 0, 1, color=COLOURS["NF4"], linewidth=0.7)
    top.set_ylabel("scales")
    low.set(
        xlabel="centred scale / second-level absmax (1)",
        ylabel="values",
        yticks=[],
        xlim=(-1.02, 1.02),
    )
    inside, near = 100 * (scaled.abs() < 0.1).double().mean().item(), int((code.abs() < 0.1).sum())
    return (
        f"{inside:.0f} % of the scales lie within ±0.1, where {near} of the {len(code)} values lie"
    )


@draws((9.2, 3.4), grid={"ncols": 2, "sharey": True})
def plot_model_bytes(axes, rows: dict[str, dict[str, int]], n_weights: int) -> None:
    """Bytes of the quantized layers on the left, of the whole model on the right.

    Args:
        rows: {variant: {"codes", "scales", "scales of scales", "mean", "rest"}} in bytes; the first
            variant is unquantized and has its layers' bytes under "codes".
        n_weights: weights in the quantized layers.
    """
    left, right = axes
    unit, name = (
        (2**20, "MiB")
        if max(sum(parts.values()) for parts in rows.values()) < 2**30
        else (2**30, "GiB")
    )
    drawn = PARTS | {
        "codes": look("NF4") | {"color": [COLOURS["16-bit"], *[COLOURS["NF4"]] * (len(rows) - 1)]}
    }
    size = lambda end: f" {end:.3g} {name}"
    whole = stacked_bars(right, rows, drawn, unit, size, fontsize=9)
    drawn.pop("rest")
    bits = lambda end: f"{size(end)}, {8 * end * unit / n_weights:.4g} bits a weight"
    layers = stacked_bars(left, rows, drawn, unit, bits, fontsize=9)
    first = next(iter(rows))
    left.set(
        title=f"Layers: {layers[0] / layers[-1]:.1f} times smaller than {first}",
        xlim=(0, 2 * max(layers)),
    )
    right.set(
        title=f"Whole model: {whole[0] / whole[-1]:.1f} times (rest dotted)",
        xlim=(0, 1.35 * max(whole)),
    )
    for ax in (left, right):
        ax.set(xlabel=f"size ({name})", ylim=(len(rows) - 0.4, -0.6))


@draws((9.2, 3.4), grid={"ncols": 2}, xlabel="layer")
def plot_added_error(axes, rows: dict[str, tuple[float, float]]) -> str:
    """RMSE with 32-bit scales and with 8-bit scales, layer by layer, and their difference.

    Args:
        rows: {layer: (rmse with 32-bit scales, rmse with 8-bit scales)}, relative to the layer's
            standard deviation.
    """
    plain, double = np.array(list(rows.values())).T
    added = (double - plain) * 1e6
    left, right = axes
    left.plot(plain, MARKERS["NF4"], color=COLOURS["NF4"], markersize=9, label="32-bit scales")
    left.plot(
        double, MARKERS["NF4+DQ"], color=COLOURS["NF4+DQ"], markersize=5, label="8-bit scales"
    )
    right.vlines(range(len(added)), 0, added, color=COLOURS["NF4+DQ"], linewidth=1.5)
    right.plot(added, MARKERS["NF4+DQ"], color=COLOURS["NF4+DQ"], markersize=5)
    left.set(ylabel="RMSE (std of the layer)", ylim=(0, 1.35 * plain.max()))
    left.legend(loc="upper right", ncols=2)
    right.set(
        title=f"Added: at most {max(added.max(), 0):.1f} millionths",
        ylabel="added RMSE (millionths of std)",
    )
    return f"Error of {len(rows)} layers: the same points"


n03.hint = "4 bits, 8 bits shared by 128, 32 bits shared by 128 · 256"

check_bits_128 = exercise(
    "bits per weight", double_quant.bits_per_weight(128, 256), n03.hint, 1.5e-4
)
"""04, exercise 1: bits a weight with blocks of 128 and double quantization with 256."""

n03.hint = "count the blocks of 64 first: 4 bytes each before; then 1 byte each, 4 for every 256 of them, and 4 for the mean"

before, after = (
    sum(double_quant.storage_bytes(4096 * 4096, 64, second).values()) for second in (None, 256)
)

check_saved_bytes = exercise("bytes saved", before - after, n03.hint, 1e-9)
"""04, exercise 2: bytes that double quantization saves on one 4096 × 4096 matrix, the mean
counted.
"""

n03.hint = "8/blocksize alone must stay below 0.5, and 32/(256 · blocksize) comes on top"

smallest = next(b for b in (1, 2, 4, 8, 16, 32, 64) if double_quant.bits_per_weight(b, 256) < 4.5)

check_same_bits = exercise("block size", smallest, n03.hint)
"""04, exercise 3: the smallest power-of-two block size that with double quantization costs less
than 4.5 bits.
"""
