"""Notebook 03: the figures of NF4 and the checkers of its exercises.

The figures: real weights beside the bell curve; the curve cut into the share of each code value;
where one weight lands on the number line of each datatype; RMSE over bits a weight; a corner of a
layer with what 4 bits leave of it; how often each code value is used; what an outlier does to its
block; the loss of a model over the bytes of its weights; formats of other makers. The arithmetic is
in `theory/codebooks.py` and `theory/blockwise.py`; formats of other makers are recorded
(`benchmarks/formats.py`).
"""

from statistics import NormalDist

import numpy as np
import torch
from bitsandbytes import functional as bnb
from matplotlib.ticker import LogLocator

from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, draws, grouped_bars, log2_axis, look, maps, mark
from qlora_nb.ui.written import Written


@draws
def plot_weights(ax, weights, what: str):
    """A histogram of weights, and over it the bell curve with the same standard deviation.

    Args:
        weights: (n,) in standard deviations; those beyond ±4 are left out.
        what: whose weights, for the title.
    """
    edges = np.linspace(-4, 4, 81)
    ax.hist(weights, edges, density=True, color=COLOURS["NF4"], alpha=0.55, label=what)
    curve = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
    ax.plot(edges, curve, color="black", label="bell curve")
    within = 100 * (weights.abs() < 1).double().mean()
    return f"{within:.0f} % of the weights of {what} lie within one standard deviation"


@draws
def plot_bell(ax, code, tail_quantile: float = codebooks.TAIL_QUANTILE):
    """The bell curve cut into the share of each code value (by midpoints); a stick and a diamond
    stand at each value.

    Args:
        code: (k,) sorted values in [-1, 1].
        tail_quantile: probability that code value 1 stands for.
    """
    bell = NormalDist()
    pdf = np.vectorize(bell.pdf)
    largest = bell.inv_cdf(tail_quantile)
    points = code.double() * largest
    borders = blockwise.midpoints(points)[0].tolist()
    below_border = [bell.cdf(border) for border in borders]
    shares = 100 * np.diff([0, *below_border, 1])
    edges = [-3.2, *borders, 3.2]  # the ends of the tails are outside the figure
    for i in range(len(code)):
        x = np.linspace(edges[i], edges[i + 1], 60)
        colour = COLOURS["NF4" if i % 2 else "NF4+DQ"]
        ax.fill_between(x, pdf(x), color=colour, alpha=0.55, linewidth=0)
    ax.vlines(points, 0, pdf(points), color="black", linewidth=1)
    marks = {"linestyle": "none", "clip_on": False, "zorder": 5}
    ax.plot(points, 0 * points, **mark("NF4"), **marks)
    places = range(-3, 4)
    ax.set_xticks(places, [f"{place}\n({place / largest:.2f})" for place in places])
    below, above = (np.median(shares[half.numpy()]) for half in (code < 0, code > 0))
    counts = f"{(code < 0).sum()} slices below 0, {(code > 0).sum()} above, 1 at 0"
    return f"{counts}: most near {below:.1f} % and {above:.1f} % of the weights"


@draws
def plot_number_line(ax, weight: float):
    """Where one scaled weight lands on each code's number line, and what it is stored as.

    Args:
        weight: weight / absmax of its block, -1 to 1.
    """
    found = {}
    for row, name in enumerate(("INT4", "FP4", "NF4")):
        values = codebooks.code_by_name(name).unique()
        nearest = values[(values - weight).abs().argmin()].item()
        found[name] = f"{name} {abs(nearest - weight):.3f}"
        ax.plot(values, [row] * len(values), **mark(name), linewidth=0.8, markersize=7)
        ax.plot([weight, nearest], [row + 0.28, row], color="black")
        ax.text(1.06, row, f"{nearest:+.3f}", va="center", fontsize=10)
    ax.axvline(weight, linestyle=":", linewidth=1)
    ax.set_yticks(range(3), list(found))
    errors = ", ".join(reversed(found.values()))
    return f"{weight:+.2f} is stored with an error of: {errors}"


@draws
def plot_errors(ax, errors, blocksize: int, name: str):
    """RMSE over bits a weight, one line a datatype; one point (datatype, blocksize) is ringed.

    Args:
        errors: {datatype: {blocksize: rmse on a Gaussian, in standard deviations}}.
        blocksize, name: the point that is ringed.
    """
    for each, by_size in errors.items():
        ax.plot(by_size.keys(), by_size.values(), label=each, **mark(each))
    error = errors[name][blocksize]
    ring = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.6}
    ax.plot([blocksize], [error], "o", markersize=17, **ring)
    sizes = sorted(set().union(*errors.values()))
    bits = {size: double_quant.bits_per_weight(size, None) for size in sizes}
    log2_axis(ax, sizes, [f"{cost:.3g}\n({size})" for size, cost in bits.items()])
    ax.invert_xaxis()
    here = f"{name}, blocks of {blocksize}: {bits[blocksize]:.3f} bits a weight"
    return f"{here}, RMSE {error:.4f} on a Gaussian"


@draws
def plot_error_map(axes, weight, blocksize: int, name: str):
    """A corner of a layer's weights (16 rows, 128 columns), what is left of it in 4 bits, and ten
    times the difference; thin lines separate the blocks.

    Args:
        weight: (out, in), in units of its standard deviation; a block is `blocksize` neighbours in
            reading order.
        blocksize, name: how it is quantized.
    """
    restored = blockwise.round_trip(weight, codebooks.code_by_name(name), blocksize)
    corners = []
    for part in (weight, restored, 10 * (restored - weight)):
        corners.append(part[:16, :128])
    maps(axes, corners, 3, "std of the layer", aspect="auto")
    position = np.arange(weight.numel()).reshape(weight.shape)
    y, x = np.nonzero(position[:16, :128] % blocksize == 0)
    for ax, label in zip(axes, ("weights", name, "10 × error")):
        ax.vlines(x - 0.5, y - 0.5, y + 0.5, color="black", linewidth=0.8)
        ax.set(ylabel=label, xticks=range(0, 128, 32), yticks=[0, 8])
    axes[-1].set_xlabel("input (index); a row is an output")
    bits = double_quant.bits_per_weight(blocksize, None)
    error = blockwise.rmse(weight, restored)
    return f"{name}, blocks of {blocksize}: {bits:.3f} bits a weight, RMSE {error:.4f}"


@draws
def plot_usage(ax, shares, code):
    """How often each code value is used, beside the even share that "each bin has equal
    probability" would give.

    Args:
        shares: whose weights → (k,) shares of them, sum 1 (`blockwise.code_usage`).
        code: (k,) code values.
    """
    names = [f"{value:.2f}" for value in code]
    groups = {}
    found = []
    for whose, share in shares.items():
        percent = 100 * share
        groups[whose] = dict(zip(names, percent.tolist()))
        bits = blockwise.entropy_bits(share)
        found.append(f"{whose}: {percent.min():.1f} to {percent.max():.1f} %, {bits:.2f} bits")
    grouped_bars(ax, names, groups, [look("NF4"), look("other")])
    even = 100 / len(names)
    ax.axhline(even, linestyle="--", label=f"an even share, {even:.2f} %")
    ax.tick_params("x", rotation=45, labelsize=9)
    ax.margins(y=0.45)
    return " · ".join(found)


@draws
def plot_outlier(ax, block, outlier: float, code):
    """Errors of one block of weights, alone and after its first weight has become an outlier.

    Args:
        block: (n,) weights of one block.
        outlier: what replaces the first weight.
        code: (k,) code values.
    """
    spoilt = block.clone()
    spoilt[0] = outlier
    x = range(1, len(block))
    norms = []
    for weights, meaning, label in ((spoilt, "other", "with"), (block, "NF4", "without")):
        errors = (blockwise.round_trip(weights, code, len(weights)) - weights)[1:]
        ax.vlines(x, 0, errors, color=COLOURS[meaning], alpha=0.5, linewidth=1)
        line = {"linestyle": "none", "label": f"{label} an outlier of {outlier:g}"}
        ax.plot(x, errors, **mark(meaning), **line)
        norms.append(errors.norm())
    ax.margins(y=0.25)
    return f"The other {len(x)} weights' error is {norms[0] / norms[1]:.1f} times as large"


@draws
def plot_sizes(axes, panels):
    """A model's loss over the bytes of its quantized layers, one point for each number of bits, and
    the loss of the unquantized model as a dashed line.

    Args:
        panels: title → (n_weights, {bits of an index: loss}, the unquantized model first).
    """
    for ax, (title, (n_weights, losses)) in zip(axes, panels.items()):
        unquantized, *heights = losses.values()
        _, *n_bits = losses
        sizes = [n_weights * (bits + 0.5) / 8e6 for bits in n_bits]
        ax.plot(sizes, heights, **mark("NF4"))
        ax.axhline(unquantized, linestyle="--", color=COLOURS["16-bit"])
        for bits, size, height in zip(n_bits, sizes, heights):
            ax.annotate(f" {bits} bit: {height:.3g}", (size, height), va="bottom")
        ax.set(yscale="log", xlim=(0, 1.5 * max(sizes)))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set_title(f"{title}: unquantized {unquantized:.3g}")


@draws
def plot_formats(axes, errors):
    """RMSE over bits a weight of formats of four bits, for one kind of weights in each panel.

    Args:
        errors: whose weights → {format: {bits a weight: rmse in standard deviations}}.
    """
    for ax, (whose, formats) in zip(axes, errors.items()):
        for name, points in formats.items():
            meaning = name if name in COLOURS else "other"
            ax.plot(points.keys(), points.values(), **mark(meaning), markersize=8)
            ax.annotate(f" {name}", list(points.items())[-1], va="bottom", fontsize=9)
        best = min(formats, key=lambda name: min(formats[name].values()))
        ax.set_title(f"{whose}: least {best}")
        ax.set_xlim(4, 5.2)
    axes[0].set_ylabel("RMSE (standard deviations)")


NF4 = bnb.get_4bit_type("nf4", device="cpu")


def _nf4_values(tail: float) -> torch.Tensor:
    """bitsandbytes' own table; for another tail by torch's quantiles."""
    if tail == codebooks.TAIL_QUANTILE:
        return NF4

    def upper(n: int) -> torch.Tensor:
        return torch.special.ndtri(torch.linspace(tail, 0.5, n + 1, dtype=torch.float64)[:-1])

    values = torch.cat([-upper(7), torch.zeros(1), upper(8)]).sort().values
    return (values / values.max()).float()


check_nf4_values = Written(
    "nf4_values",
    reference=_nf4_values,
    inputs=lambda: [(0.9,), (codebooks.TAIL_QUANTILE,)],
    equals="bitsandbytes' table, and to torch's quantiles for another tail",
    hint="eight quantiles from the tail down to one half, which is left out; seven of the other "
    "side; zero; sorted, and divided by the largest",
    tolerance=1e-6,
)
"""Exercise 1: the sixteen values."""


def _quantize_block(block: torch.Tensor, code: torch.Tensor):
    """By the library, which needs 64 weights: zeros change no other weight of the block."""
    padded = torch.nn.functional.pad(block, (0, 64 - len(block)))
    packed, state = bnb.quantize_4bit(padded, blocksize=64, quant_type="nf4")
    index = torch.cat([packed >> 4, packed & 15], dim=1).flatten()
    return index[: len(block)].long(), state.absmax[0]


def _dequantize_block(index: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor):
    """By the library."""
    one_byte_each = index.to(torch.uint8)
    return bnb.dequantize_blockwise(one_byte_each, absmax=absmax[None], code=code, blocksize=64)


BLOCKS = [
    (torch.tensor([0.5, -2.0, 0.2, 0.0]), NF4),
    (torch.linspace(-0.2, 0.25, 64) ** 3, NF4),
]


check_quantize_block = Written(
    "quantize_block",
    reference=_quantize_block,
    inputs=lambda: BLOCKS,
    equals="bitsandbytes' quantize_4bit",
    hint="absmax is the largest magnitude; an index names the value nearest to weight / absmax",
)
"""Exercise 2: from weights to indices and a scale."""

check_dequantize_block = Written(
    "dequantize_block",
    reference=_dequantize_block,
    inputs=lambda: [(*_quantize_block(*block), NF4) for block in BLOCKS],
    equals="bitsandbytes' dequantize_blockwise",
    hint="look each index up in the code, then multiply by absmax",
)
"""Exercise 3: and back."""

check_max_error = exercise(
    "largest error",
    want=NF4.diff().max().item(),  # half of it, times absmax 2
    hint="half of the widest gap between neighbouring values, times absmax; the widest gap is at "
    "the negative end",
    tolerance=2e-3,
)
"""Exercise 4: the largest possible error of one weight in an NF4 block with absmax 2, to three
decimals.
"""

check_tail_quantile = exercise(
    "tail quantile",
    want=1 - (1 / 16 + 1 / 14) / 2,
    hint="four bits: halves of 1/16 and 1/15, that is 1/(2·16) and 1/(2·15); three bits have 8 "
    "values",
    tolerance=1e-4,
)
"""Exercise 5: the tail quantile of an 8-value (3-bit) NormalFloat code, to four decimals."""
