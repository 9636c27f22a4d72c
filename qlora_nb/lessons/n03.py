"""Notebook 03: the figures and checkers of NF4."""

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch

from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, HATCHES, MARKERS, draws, log2_axis, look, maps, margins

PAPER_TABLE_2 = {"Int4": 34.34, "FP4-E2M1": 31.07, "FP4-E3M0": 29.48, "NF4+DQ": 27.41}
"""Mean perplexity on Pile Common Crawl, models from 125M to 13B (QLoRA paper, table 2)."""


@draws((8.4, 3.6), xlabel="weight (standard deviations)", ylabel="density (1)", ylim=(0, 0.47))
def plot_bell(ax, code: torch.Tensor, tail_quantile: float = codebooks.TAIL_QUANTILE) -> str:
    """The bell curve cut into the share of each code value (by midpoints), the code values below it
    as ticks.

    Args:
        code: (k,) sorted values in [-1, 1].
        tail_quantile: probability that code value 1 stands for.
    """
    bell = NormalDist()
    points = code.double().numpy() * bell.inv_cdf(tail_quantile)
    heights = [bell.pdf(v) for v in points]
    borders = (points[:-1] + points[1:]) / 2
    shares = np.diff(
        [0.0, *(bell.cdf(border) for border in borders), 1.0]
    )  # whole tails, of which the figure cuts the ends off
    for i, (low, high) in enumerate(pairwise([-3.2, *borders, 3.2])):
        x = np.linspace(low, high, 60)
        ax.fill_between(
            x,
            [bell.pdf(v) for v in x],
            color=COLOURS["NF4" if i % 2 else "NF4+DQ"],
            alpha=0.55,
            linewidth=0,
        )
    ax.vlines(points, 0, heights, color=COLOURS["16-bit"], linewidth=1)
    ax.plot(
        points,
        [0] * len(points),
        MARKERS["NF4"],
        color=COLOURS["NF4"],
        markersize=6,
        clip_on=False,
        zorder=5,
    )
    for i, side in {0: "right", 3: "right", 7: "center", 11: "left", 15: "left"}.items():
        ax.annotate(
            f"{code[i]:.3f}",
            (points[i], heights[i]),
            textcoords="offset points",
            xytext=(0, 4),
            ha=side,
            fontsize=9,
        )
    below, above = int((code < 0).sum()), int((code > 0).sum())
    least, most = 100 * shares.min(), 100 * shares.max()
    return f"{below} values below zero, {above} above: slices of {least:.1f} to {most:.1f} % of the weights"


@draws(
    (8.4, 2.9),
    grid=margins(0.07, 0.99, 0.17, 0.91),
    xlabel="weight / absmax (1)",
    xlim=(-1.06, 1.22),
    ylim=(-0.4, 2.5),
)
def plot_number_line(ax, weight: float, name: str) -> str:
    """Where one scaled weight lands on each code's number line; the chosen code is drawn strongly.

    Args:
        weight: weight / absmax of its block, -1 to 1.
        name: NF4, FP4 or INT4.
    """
    errors = {}
    for row, each in enumerate(("INT4", "FP4", "NF4")):
        code = codebooks.code_by_name(each).unique()
        nearest = code[(code - weight).abs().argmin()].item()
        errors[each] = abs(nearest - weight)
        alpha, size, bold = (1.0, 8, "bold") if each == name else (0.35, 6, "normal")
        ax.plot(
            code,
            [row] * len(code),
            MARKERS[each] + "-",
            color=COLOURS[each],
            alpha=alpha,
            linewidth=0.8,
            markersize=size,
        )
        ax.plot(
            [weight, nearest],
            [row + 0.28, row],
            color=COLOURS["16-bit"],
            alpha=alpha,
            linewidth=1.5,
        )
        ax.text(1.06, row, f"{nearest:+.3f}", va="center", fontsize=10, fontweight=bold)
    ax.axvline(weight, color=COLOURS["16-bit"], linestyle=":", linewidth=1)
    ax.set_yticks(range(3), list(errors))
    return f"{name} stores {weight:+.2f} with an error of {errors[name]:.3f}"


@draws(
    (8.4, 3.8),
    "best",
    2,
    xlabel="bits a weight, 32-bit scales included (bit)",
    ylabel="RMSE (standard deviations)",
)
def plot_errors(
    ax, errors: dict[str, dict[int, float]], blocksize: int, name: str, what: str = "a Gaussian"
) -> str:
    """RMSE over bits a weight, one line a datatype; one point (datatype, blocksize) is ringed.

    Args:
        errors: {datatype: {blocksize: rmse relative to the data's standard deviation}}.
        blocksize, name: the point that is ringed.
        what: the data, for the title.
    """
    sizes = sorted({size for by_size in errors.values() for size in by_size})
    for each, by_size in errors.items():
        kind, line = (
            each if each in COLOURS else "other",
            {"AF4": "--", "Lloyd-Max": ":"}.get(each, "-"),
        )
        style = {
            "color": COLOURS[kind],
            "marker": MARKERS[kind],
            "markersize": 9 if kind == "other" else 6,
        }
        ax.plot(list(by_size), list(by_size.values()), line, label=each, **style)
    bits, y = double_quant.bits_per_weight(blocksize, None), errors[name][blocksize]
    ax.plot(
        [blocksize],
        [y],
        "o",
        markersize=17,
        markerfacecolor="none",
        markeredgecolor=COLOURS["16-bit"],
        markeredgewidth=1.6,
    )
    log2_axis(
        ax, sizes, [f"{double_quant.bits_per_weight(size, None):.3g}\n({size})" for size in sizes]
    )
    ax.invert_xaxis()
    return f"{name}, blocks of {blocksize}: {bits:.3f} bits a weight, RMSE {y:.4f} on {what}"


@draws(
    (8.4, 4.6),
    grid={
        "nrows": 3,
        "sharex": True,
        "sharey": True,
        **margins(0.07, 0.9, 0.11, 0.93, hspace=0.08),
    },
)
def plot_error_map(
    axes, weight: torch.Tensor, blocksize: int, name: str, rows: int = 16, columns: int = 128
) -> str:
    """A corner of a layer's weights, what is left of it in 4 bits, and ten times the difference;
    thin lines separate the blocks.

    Args:
        weight: (out, in), in units of its standard deviation; a block is `blocksize` neighbours in
            reading order.
        blocksize, name: how it is quantized.
        rows, columns: size of the corner.
    """
    restored = blockwise.round_trip(weight, codebooks.code_by_name(name), blocksize)
    at = torch.arange(weight.numel()).reshape(weight.shape)[:rows, :columns]
    y, x = (at % blocksize == 0).nonzero().T.numpy()
    parts = [part[:rows, :columns] for part in (weight, restored, 10 * (restored - weight))]
    maps(axes, parts, 3, "std of the layer", aspect="auto")
    for ax, label in zip(axes, ("weights", name, "10 × error")):
        ax.vlines(x - 0.5, y - 0.5, y + 0.5, color="black", linewidth=0.8)
        ax.set(ylabel=label, xticks=range(0, columns, 32), yticks=[0, rows // 2])
    axes[-1].set_xlabel("input (index); a row is an output")
    error = blockwise.rmse(weight, restored)
    return f"{name}, blocks of {blocksize}: {double_quant.bits_per_weight(blocksize, None):.3f} bits a weight, RMSE {error:.4f}"


@draws(
    (8.4, 3.4),
    "upper right",
    3,
    xlabel="distribution of the weights",
    ylabel="RMSE (standard deviations)",
)
def plot_distributions(ax, errors: dict[str, dict[str, float]]) -> str:
    """Grouped bars: RMSE by distribution and datatype; the best datatype of each distribution is
    marked.

    Args:
        errors: {distribution: {datatype: rmse relative to the standard deviation}}.
    """
    best = {d: min(row, key=row.get) for d, row in errors.items()}
    for i, name in enumerate(next(iter(errors.values()))):
        heights = [row[name] for row in errors.values()]
        at = np.arange(len(errors)) + 0.27 * (i - 1)
        bars = ax.bar(at, heights, 0.25, **look(name), label=name)
        labels = [
            ("best\n" if name == best[d] else "") + f"{h:.3f}" for h, d in zip(heights, errors)
        ]
        ax.bar_label(bars, labels, fontsize=9, padding=2)
    ax.set_xticks(range(len(errors)), list(errors))
    ax.set_ylim(top=1.25 * max(max(row.values()) for row in errors.values()))
    return "Best datatype: " + " · ".join(f"{d} {name}" for d, name in best.items())


@draws((8.4, 3.2), "best", xlabel="NF4 value (1)", ylabel="share of the weights (%)")
def plot_usage(ax, share: torch.Tensor, code: torch.Tensor) -> str:
    """How often each code value is used, beside the even share that "each bin has equal
    probability" would give.
    """
    percent, even, bits = (100 * share).numpy(), 100 / len(share), blockwise.entropy_bits(share)
    ax.bar(range(len(percent)), percent, color=COLOURS["NF4"])
    ax.axhline(even, color=COLOURS["16-bit"], linestyle="--", label=f"an even share, {even:.2f} %")
    ax.set_xticks(range(len(percent)), [f"{v:.2f}" for v in code.tolist()], rotation=45, fontsize=9)
    return f"Used from {percent.min():.1f} to {percent.max():.1f} %: {bits:.2f} bits of information in 4"


@draws(
    (8.4, 3.2),
    "upper right",
    2,
    xlabel="position in the block",
    ylabel="error (standard deviations)",
)
def plot_outlier(ax, block: torch.Tensor, outlier: float, code: torch.Tensor) -> str:
    """Errors of one block of weights, alone and after its first weight has become an outlier.

    Args:
        block: (n,) weights of one block.
        outlier: what replaces the first weight.
        code: (k,) code values.
    """
    spoilt = block.clone()
    spoilt[0] = outlier
    alone, beside = ((blockwise.round_trip(b, code, len(b)) - b)[1:] for b in (block, spoilt))
    x = range(1, len(block))
    for e, kind, size, label in (
        (beside, "other", 9, f"with one weight of {outlier:g}"),
        (alone, "NF4", 5, "without"),
    ):
        ax.vlines(x, 0, e, color=COLOURS[kind], alpha=0.5, linewidth=1)
        ax.plot(x, e, MARKERS[kind], color=COLOURS[kind], markersize=size, label=label)
    top = 1.45 * max(e.abs().max().item() for e in (alone, beside))
    ax.set_ylim(-top, top)
    return f"One outlier of {outlier:g}: the other {len(x)} weights' error times {beside.norm() / alone.norm():.1f}"


def _labelled_bars(
    ax, heights: dict[str, float], meanings: list[str], form: str, **settings
) -> None:
    """Bars drawn by their meanings, the height on each (in this format), long names broken into
    lines.
    """
    names = [name.replace("+", "\n+").replace("-", "\n") for name in heights]
    drawn = {
        "color": [COLOURS[m] for m in meanings],
        "hatch": [HATCHES[m] for m in meanings],
        "edgecolor": "white",
    }
    bars = ax.bar(names, heights.values(), **drawn, capsize=4, **settings)
    ax.bar_label(bars, fmt=form, fontsize=8)
    ax.grid(axis="x", visible=False)


@draws((10.2, 3.9))
def plot_quality(ax, panels: dict[str, list]) -> None:
    """The loss that each set of weights adds (mean and standard deviation over the samples) beside
    the paper's table 2.

    Args:
        panels: {title: `quality.Quality` records of the same samples, the first of them the
            unquantized model's}.
    """
    figure = ax.figure
    ax.remove()
    *axes, paper = figure.subplots(1, len(panels) + 1)
    for panel, (title, (base, *quantized)) in zip(axes, panels.items()):
        added = np.array([np.subtract(q.losses, base.losses) for q in quantized])
        means, spreads = (
            dict(zip((q.name for q in quantized), added.mean(axis=1))),
            added.std(axis=1, ddof=1),
        )
        _labelled_bars(
            panel, means, [n if n in COLOURS else "other" for n in means], "{:+.2g}", yerr=spreads
        )
        heights = np.array([*means.values()])
        panel.axhline(0, color=COLOURS["16-bit"], linewidth=0.8)
        panel.set(
            ylim=(min(1.1 * min(heights - spreads), 0), 1.2 * max(*(heights + spreads), 1e-6)),
            ylabel="added loss (nat)",
        )
        panel.set_title(
            f"{title}:\nleast {min(means, key=means.get)}, most {max(means, key=means.get)}",
            fontsize=10,
        )
    _labelled_bars(paper, PAPER_TABLE_2, ["INT4", "FP4", "FP4", "NF4+DQ"], "{:.2f}")
    paper.set(ylabel="mean perplexity (1)", ylim=(0, 40))
    paper.set_title("the paper, table 2:\nleast NF4+DQ, most Int4", fontsize=10)


NF4 = codebooks.nf4_code()

hint = "absmax is 1, so look for the nearest value in the table; indices count from 0 at -1"

check_indices = exercise(
    "indices", blockwise.quantize(torch.tensor([0.5, -1.0, 0.1, 0.0]), NF4, blocksize=4)[0], hint
)
"""03, exercise 1: the NF4 indices of the block [0.5, -1.0, 0.1, 0.0]."""

check_byte = exercise(
    "byte",
    blockwise.pack(torch.tensor([12, 5]))[0],
    "the first index is the high nibble: it counts 16-fold",
)
"""03, exercise 2: the byte that holds the indices 12 and 5."""

hint = "four bits: halves of 1/32 and 1/30, that is 2·16 and 2·15; three bits have 8 codes, so 2·8 and 2·7"

check_tail_quantile = exercise("tail quantile", 1 - (1 / 16 + 1 / 14) / 2, hint, 1e-4)
"""03, exercise 3: the tail quantile of an 8-value (3-bit) NormalFloat code, to four decimals."""

hint = "half of the widest gap between neighbouring values, times absmax; the widest gap is at the negative end"

check_max_error = exercise("largest error", 2 * NF4.diff().max().item() / 2, hint, 2e-3)
"""03, exercise 4: the largest possible error of one weight in an NF4 block with absmax 2, to three
decimals.
"""
