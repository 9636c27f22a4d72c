"""Notebook 03: the figures of NF4 and the checkers of its exercises.

The figures: the bell curve cut into the share of each code value; where one weight lands on the
number line of each datatype; RMSE over bits a weight and by distribution; a corner of a layer with
what 4 bits leave of it; how often each code value is used; what an outlier does to its block; the
loss that quantized weights add, beside the paper's table. The arithmetic is in
`theory/codebooks.py` and `theory/blockwise.py`.
"""

from statistics import NormalDist

import numpy as np
import pandas
import torch

from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import (
    COLOURS,
    LOOKS,
    draws,
    grouped_bars,
    log2_axis,
    look,
    maps,
    margins,
    mark,
)

PAPER_TABLE_2 = {"Int4": 34.34, "FP4-E2M1": 31.07, "FP4-E3M0": 29.48, "NF4+DQ": 27.41}
"""Mean perplexity on Pile Common Crawl, models from 125M to 13B (QLoRA paper, table 2)."""


@draws((8.4, 3.6), xlabel="weight (standard deviations)", ylabel="density", ylim=(0, 0.47))
def plot_bell(ax, code, tail_quantile: float = codebooks.TAIL_QUANTILE):
    """The bell curve cut into the share of each code value (by midpoints), the code values below it
    as ticks.

    Args:
        code: (k,) sorted values in [-1, 1].
        tail_quantile: probability that code value 1 stands for.
    """
    bell = NormalDist()
    pdf = np.vectorize(bell.pdf)
    points = code.double() * bell.inv_cdf(tail_quantile)
    borders = blockwise.midpoints(points)[0].tolist()
    below_border = [bell.cdf(border) for border in borders]
    shares = 100 * np.diff([0, *below_border, 1])
    edges = [-3.2, *borders, 3.2]  # the ends of the tails are outside the figure
    for i in range(len(code)):
        x = np.linspace(edges[i], edges[i + 1], 60)
        colour = COLOURS["NF4" if i % 2 else "NF4+DQ"]
        ax.fill_between(x, pdf(x), color=colour, alpha=0.55, linewidth=0)
    heights = pdf(points)
    ax.vlines(points, 0, heights, color="black", linewidth=1)
    marks = {"linestyle": "none", "clip_on": False, "zorder": 5}
    ax.plot(points, 0 * points, **mark("NF4"), **marks)
    font = {"textcoords": "offset points", "xytext": (0, 4), "fontsize": 9}
    sides = {0: "right", 3: "right", 7: "center", 11: "left", 15: "left"}
    for i, side in sides.items():
        top = (points[i], heights[i])
        ax.annotate(f"{code[i]:.3f}", top, ha=side, **font)
    values = f"{(code < 0).sum()} values below zero, {(code > 0).sum()} above"
    return f"{values}: slices of {shares.min():.1f} to {shares.max():.1f} % of the weights"


@draws(
    (8.4, 2.9),
    grid=margins(bottom=0.17, top=0.91),
    xlabel="weight / absmax",
    xlim=(-1.06, 1.22),
    ylim=(-0.4, 2.5),
)
def plot_number_line(ax, weight: float, name: str):
    """Where one scaled weight lands on each code's number line; the chosen code is drawn strongly.

    Args:
        weight: weight / absmax of its block, -1 to 1.
        name: NF4, FP4 or INT4.
    """
    errors = {}
    for row, each in enumerate(("INT4", "FP4", "NF4")):
        values = codebooks.code_by_name(each).unique()
        nearest = values[(values - weight).abs().argmin()].item()
        errors[each] = abs(nearest - weight)
        alpha = 0.35
        size = 6
        bold = "normal"
        if each == name:
            alpha = 1.0
            size = 8
            bold = "bold"
        line = {"alpha": alpha, "linewidth": 0.8, "markersize": size}
        ax.plot(values, [row] * len(values), **mark(each), **line)
        path = [weight, nearest]
        ax.plot(path, [row + 0.28, row], alpha=alpha)
        ax.text(1.06, row, f"{nearest:+.3f}", va="center", fontsize=10, fontweight=bold)
    ax.axvline(weight, linestyle=":", linewidth=1)
    ax.set_yticks(range(3), list(errors))
    return f"{name} stores {weight:+.2f} with an error of {errors[name]:.3f}"


@draws(
    (8.4, 3.8),
    "best",
    2,
    xlabel="bits a weight, 32-bit scales included (bit)",
    ylabel="RMSE (standard deviations)",
)
def plot_errors(ax, errors, blocksize: int, name: str, what: str = "a Gaussian"):
    """RMSE over bits a weight, one line a datatype; one point (datatype, blocksize) is ringed.

    Args:
        errors: {datatype: {blocksize: rmse relative to the data's standard deviation}}.
        blocksize, name: the point that is ringed.
        what: the data, for the title.
    """
    styles = {"AF4": "--", "Lloyd-Max": ":"}
    for each, by_size in errors.items():
        if each in styles:
            line = {"linestyle": styles[each], "markersize": 9, **mark("other")}
        else:
            line = mark(each)
        ax.plot(by_size.keys(), by_size.values(), label=each, **line)
    error = errors[name][blocksize]
    ring = {"markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 1.6}
    ax.plot([blocksize], [error], "o", markersize=17, **ring)
    sizes = sorted(set().union(*errors.values()))
    bits = {size: double_quant.bits_per_weight(size, None) for size in sizes}
    log2_axis(ax, sizes, [f"{cost:.3g}\n({size})" for size, cost in bits.items()])
    ax.invert_xaxis()
    here = f"{name}, blocks of {blocksize}: {bits[blocksize]:.3f} bits a weight"
    return f"{here}, RMSE {error:.4f} on {what}"


@draws((8.4, 4.6), grid={"nrows": 3, "sharex": True, "sharey": True, **margins(hspace=0.08)})
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


@draws(
    (8.4, 3.4),
    "upper right",
    3,
    xlabel="distribution of the weights",
    ylabel="RMSE (standard deviations)",
)
def plot_distributions(ax, errors):
    """Grouped bars: RMSE by distribution and datatype; the best datatype of each distribution is
    marked.

    Args:
        errors: {distribution: {datatype: rmse relative to the standard deviation}}.
    """
    frame = pandas.DataFrame(errors)
    looks = [look(name) for name in frame.index]
    grouped_bars(ax, list(errors), frame.T.to_dict(), looks)
    best = frame.idxmin()
    labels = frame.map("{:.3f}".format)
    for distribution, name in best.items():
        labels.loc[name, distribution] = f"best\n{frame.loc[name, distribution]:.3f}"
    for bars, texts in zip(ax.containers, labels.values):
        ax.bar_label(bars, texts, fontsize=9, padding=2)
    ax.set_ylim(top=1.25 * frame.max(axis=None))
    found = " · ".join(f"{distribution} {name}" for distribution, name in best.items())
    return f"Best datatype: {found}"


@draws((8.4, 3.2), "best", xlabel="NF4 value", ylabel="share of the weights (%)")
def plot_usage(ax, share, code):
    """How often each code value is used, beside the even share that "each bin has equal
    probability" would give.

    Args:
        share: (k,) shares of the weights, sum 1 (`blockwise.code_usage`).
        code: (k,) code values.
    """
    percent = 100 * share
    even = 100 / len(share)
    ax.bar(range(len(share)), percent, color=COLOURS["NF4"])
    ax.axhline(even, linestyle="--", label=f"an even share, {even:.2f} %")
    names = [f"{value:.2f}" for value in code]
    ax.set_xticks(range(len(share)), names, rotation=45, fontsize=9)
    bits = blockwise.entropy_bits(share)
    used = f"Used from {percent.min():.1f} to {percent.max():.1f} %"
    return f"{used}: {bits:.2f} bits of information in 4"


@draws(
    (8.4, 3.2),
    "upper right",
    2,
    xlabel="position in the block",
    ylabel="error (standard deviations)",
)
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

    def errors(weights, meaning, size, label):
        """Draw and return the errors of all weights but the first."""
        restored = blockwise.round_trip(weights, code, len(weights))
        found = (restored - weights)[1:]
        ax.vlines(x, 0, found, color=COLOURS[meaning], alpha=0.5, linewidth=1)
        line = {"linestyle": "none", "markersize": size, "label": label}
        ax.plot(x, found, **mark(meaning), **line)
        return found

    beside = errors(spoilt, "other", 9, f"with one weight of {outlier:g}")
    alone = errors(block, "NF4", 5, "without")
    top = 1.45 * float(torch.cat([alone, beside]).abs().max())
    ax.set_ylim(-top, top)
    times = beside.norm() / alone.norm()
    return f"One outlier of {outlier:g}: the other {len(x)} weights' error times {times:.1f}"


def _labelled_bars(ax, heights, meanings, form, errors=None):
    """Bars drawn by their meanings, the height on each (in this format), long names broken into
    lines.
    """
    names = [name.replace("+", "\n+").replace("-", "\n") for name in heights]
    colours, hatches, _ = zip(*[LOOKS[meaning] for meaning in meanings])
    drawn = {"color": colours, "hatch": hatches, "edgecolor": "white"}
    bars = ax.bar(names, heights.values(), yerr=errors, capsize=4, **drawn)
    ax.bar_label(bars, fmt=form, fontsize=8)
    ax.grid(axis="x", visible=False)


@draws((10.2, 3.9))
def plot_quality(ax, panels):
    """The loss that each set of weights adds (mean and standard deviation over the samples) beside
    the paper's table 2.

    Args:
        panels: {title: `quality.Quality` records of the same samples, the first of them the
            unquantized model's}.
    """
    figure = ax.figure
    ax.remove()
    *axes, paper = figure.subplots(1, len(panels) + 1)
    for panel, (title, qualities) in zip(axes, panels.items()):
        losses = pandas.DataFrame({quality.name: quality.losses for quality in qualities})
        base, *names = losses
        added = losses[names].sub(losses[base], axis=0)
        means = added.mean()
        spreads = added.std()
        meanings = [name if name in COLOURS else "other" for name in names]
        _labelled_bars(panel, means.to_dict(), meanings, "{:+.2g}", errors=spreads)
        panel.axhline(0, linewidth=0.8)
        lowest = (means - spreads).min()
        highest = (means + spreads).max()
        panel.set_ylim(min(1.1 * lowest, 0), 1.2 * max(highest, 1e-6))
        panel.set_ylabel("added loss (nat)")
        least = means.idxmin()
        most = means.idxmax()
        panel.set_title(f"{title}:\nleast {least}, most {most}", fontsize=10)
    _labelled_bars(paper, PAPER_TABLE_2, ["INT4", "FP4", "FP4", "NF4+DQ"], "{:.2f}")
    paper.set(ylabel="mean perplexity", ylim=(0, 40))
    paper.set_title("the paper, table 2:\nleast NF4+DQ, most Int4", fontsize=10)


NF4 = codebooks.nf4_code()

block = torch.tensor([0.5, -1.0, 0.1, 0.0])
indices, _ = blockwise.quantize(block, NF4, blocksize=4)
check_indices = exercise(
    "indices",
    want=indices,
    hint="absmax is 1, so look for the nearest value in the table; indices count from 0 at -1",
)
"""Exercise 1: the NF4 indices of the block [0.5, -1.0, 0.1, 0.0]."""

check_byte = exercise(
    "byte",
    want=blockwise.pack(torch.tensor([12, 5]))[0],
    hint="the first index is the high nibble: it counts 16-fold",
)
"""Exercise 2: the byte that holds the indices 12 and 5."""

check_tail_quantile = exercise(
    "tail quantile",
    want=1 - (1 / 16 + 1 / 14) / 2,
    hint="four bits: halves of 1/32 and 1/30, that is 2·16 and 2·15; three bits have 8 codes, "
    "so 2·8 and 2·7",
    tolerance=1e-4,
)
"""Exercise 3: the tail quantile of an 8-value (3-bit) NormalFloat code, to four decimals."""

check_max_error = exercise(
    "largest error",
    want=NF4.diff().max(),  # half of it, times absmax 2
    hint="half of the widest gap between neighbouring values, times absmax; the widest gap is at "
    "the negative end",
    tolerance=2e-3,
)
"""Exercise 4: the largest possible error of one weight in an NF4 block with absmax 2, to three
decimals.
"""
