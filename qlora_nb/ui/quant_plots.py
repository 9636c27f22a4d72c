"""Figures of notebooks 03 and 04: data in, closed Figure out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from matplotlib.figure import Figure

from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui.style import COLOURS, HATCHES, MARKERS, kit_style, look, new_figure

PAPER_TABLE_2 = {"INT4": 34.34, "FP4": 31.07, "FP4-E3M0": 29.48, "NF4+DQ": 27.41}
"""Mean perplexity on Pile Common Crawl, models from 125M to 13B (QLoRA paper, table 2; FP4 is E2M1)."""
SHADES = {
    "codes": (COLOURS["NF4"], ""),
    "scales": (COLOURS["other"], "//"),
    "scales of scales": (COLOURS["16-bit"], ""),
    "mean": (COLOURS["16-bit"], ""),
    "rest": ("#D0D0D0", ".."),
}
"""Colour and hatch of each part of a 4-bit layer, and of what is not quantized."""


def plot_bell(code: torch.Tensor, tail_quantile: float = codebooks.TAIL_QUANTILE) -> Figure:
    """The bell curve cut into the share of each code value (by midpoints), the code values below it as ticks.

    Args:
        code: (k,) sorted values in [-1, 1].
        tail_quantile: probability that code value 1 stands for.
    """
    bell, edge = NormalDist(), NormalDist().inv_cdf(tail_quantile)
    points = code.double().numpy() * edge
    borders = [-3.2, *((points[:-1] + points[1:]) / 2), 3.2]
    fig, ax = new_figure(figsize=(8.4, 3.6))
    for i, (low, high) in enumerate(pairwise(borders)):
        x = np.linspace(low, high, 60)
        shade = COLOURS["NF4"] if i % 2 else COLOURS["NF4+DQ"]
        ax.fill_between(x, [bell.pdf(v) for v in x], color=shade, alpha=0.55, linewidth=0)
    ax.vlines(points, 0, [bell.pdf(v) for v in points], color=COLOURS["16-bit"], linewidth=1)
    ax.plot(points, [0] * len(points), MARKERS["NF4"], color=COLOURS["NF4"], markersize=6, clip_on=False, zorder=5)
    for i in (0, 3, 7, 11, 15):
        ax.annotate(
            f"{code[i].item():.3f}",
            (points[i], bell.pdf(points[i])),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=9,
        )
    with kit_style():
        ax.set(title="NF4: sixteen values, close together where weights are many", ylim=(0, 0.47))
        ax.set(xlabel="weight (standard deviations)", ylabel="density (1)")
    return fig


def plot_number_line(weight: float, name: str) -> Figure:
    """Where one scaled weight lands on each code's number line; the chosen code is drawn strongly.

    Args:
        weight: weight / absmax of its block, -1 to 1.
        name: NF4, FP4 or INT4.
    """
    fig, ax = new_figure(figsize=(8.4, 2.9))
    names = ["INT4", "FP4", "NF4"]
    errors = {}
    for row, each in enumerate(names):
        code = codebooks.code_by_name(each).unique()
        nearest = code[(code - weight).abs().argmin()].item()
        errors[each] = abs(nearest - weight)
        chosen = each == name
        style = {"marker": MARKERS[each], "color": COLOURS[each], "alpha": 1.0 if chosen else 0.35}
        ax.plot(code, [row] * len(code), linestyle="-", linewidth=0.8, markersize=8 if chosen else 6, **style)
        ax.plot([weight, nearest], [row + 0.28, row], color=COLOURS["16-bit"], alpha=style["alpha"], linewidth=1.5)
        ax.text(1.06, row, f"{nearest:+.3f}", va="center", fontweight="bold" if chosen else "normal")
    ax.axvline(weight, color=COLOURS["16-bit"], linestyle=":", linewidth=1)
    with kit_style():
        ax.set(
            title=f"{name} stores {weight:+.2f} with an error of {errors[name]:.3f}",
            xlabel="weight / absmax (1)",
            xlim=(-1.06, 1.22),
        )
        ax.set(yticks=range(3), yticklabels=names, ylim=(-0.4, 2.5))
    return fig


def plot_errors(errors: dict[str, dict[int, float]], blocksize: int, name: str, what: str = "a Gaussian") -> Figure:
    """RMSE over bits a weight, one line a datatype; one point (datatype, blocksize) is ringed.

    Args:
        errors: {datatype: {blocksize: rmse relative to the data's standard deviation}}.
        blocksize, name: the point that is ringed.
        what: the data, for the title.
    """
    fig, ax = new_figure(figsize=(8.4, 3.8))
    for each, by_size in errors.items():
        bits = [double_quant.bits_per_weight(b, None) for b in by_size]
        kind = each if each in COLOURS else "other"
        style = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 9 if kind == "other" else 6}
        ax.plot(bits, list(by_size.values()), label=each, linestyle={"AF4": "--", "Lloyd-Max": ":"}.get(each, "-"), **style)
    x, y = double_quant.bits_per_weight(blocksize, None), errors[name][blocksize]
    ax.plot([x], [y], "o", markersize=17, markerfacecolor="none", markeredgecolor=COLOURS["16-bit"], markeredgewidth=1.6)
    with kit_style():
        ax.set(title=f"{name}, blocks of {blocksize}: {x:.3f} bits a weight, RMSE {y:.4f} on {what}")
        ax.set(xlabel="bits a weight, 32-bit scales included (bit)", ylabel="RMSE (standard deviations)")
        ax.set_xscale("function", functions=(lambda v: np.log2(np.maximum(v - 4, 1e-4)), lambda v: 4 + 2.0**v))
        sizes = sorted({b for e in errors.values() for b in e})
        ax.set_xticks([double_quant.bits_per_weight(b, None) for b in sizes])
        ax.set_xticklabels([f"{double_quant.bits_per_weight(b, None):.3g}\n({b})" for b in sizes])
        ax.minorticks_off()
        ax.legend(ncols=2)
    return fig


@kit_style()
def plot_error_map(weight: torch.Tensor, blocksize: int, name: str, rows: int = 16, columns: int = 128) -> Figure:
    """A corner of a layer's weights, what is left of it in 4 bits, and ten times the difference; thin lines separate the blocks.

    Args:
        weight: (out, in), in units of its standard deviation; a block is `blocksize` neighbours in reading order.
        blocksize, name: how it is quantized.
        rows, columns: size of the corner.
    """
    restored = blockwise.round_trip(weight, codebooks.code_by_name(name), blocksize)
    bits, error = double_quant.bits_per_weight(blocksize, None), restored - weight
    fig, axes = new_figure(3, 1, figsize=(8.4, 4.6), sharex=True, sharey=True, layout=None)
    fig.subplots_adjust(left=0.07, right=0.9, top=0.93, bottom=0.11, hspace=0.08)
    corner = [t[:rows, :columns] for t in (weight, restored, 10 * error)]
    at = torch.arange(weight.numel()).reshape(weight.shape)[:rows, :columns]
    y, x = (at % blocksize == 0).nonzero().T.numpy()
    for ax, part, label in zip(axes, corner, ("weights", name, "10 × error")):
        image = ax.imshow(part.numpy(), cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest", aspect="auto")
        ax.vlines(x - 0.5, y - 0.5, y + 0.5, color="black", linewidth=0.8)
        ax.set(ylabel=label, xticks=range(0, columns, 32), yticks=[0, rows // 2])
        ax.grid(visible=False)
    fig.colorbar(image, cax=fig.add_axes((0.91, 0.11, 0.015, 0.82)), label="std of the layer", ticks=[-3, 0, 3])
    axes[0].set_title(f"{name}, blocks of {blocksize}: {bits:.3f} bits a weight, RMSE {blockwise.rmse(weight, restored):.4f}")
    axes[-1].set_xlabel("input (index); a row is an output")
    return fig


def plot_distributions(errors: dict[str, dict[str, float]]) -> Figure:
    """Grouped bars: RMSE by distribution and datatype; the best datatype of each distribution is marked.

    Args:
        errors: {distribution: {datatype: rmse relative to the standard deviation}}.
    """
    fig, ax = new_figure(figsize=(8.4, 3.4))
    names = list(next(iter(errors.values())))
    for i, name in enumerate(names):
        heights = [row[name] for row in errors.values()]
        at = np.arange(len(errors)) + 0.27 * (i - 1)
        bars = ax.bar(at, heights, 0.25, color=COLOURS[name], hatch=HATCHES[name], label=name)
        labels = [("best\n" if h == min(row.values()) else "") + f"{h:.3f}" for h, row in zip(heights, errors.values())]
        ax.bar_label(bars, labels, fontsize=9, padding=2)
    winners = {d: min(row, key=row.get) for d, row in errors.items()}
    with kit_style():
        ax.set(title="Best datatype: " + " · ".join(f"{d} {w}" for d, w in winners.items()), ylabel="RMSE (standard deviations)")
        ax.set(xticks=range(len(errors)), xticklabels=list(errors), xlabel="distribution of the weights")
        ax.set_ylim(top=1.25 * max(max(r.values()) for r in errors.values()))
        ax.legend(ncols=3, loc="upper right")
    return fig


def plot_usage(share: torch.Tensor, code: torch.Tensor) -> Figure:
    """How often each code value is used, beside the even share that "each bin has equal probability" would give."""
    percent = (100 * share).numpy()
    fig, ax = new_figure(figsize=(8.4, 3.2))
    ax.bar(range(len(percent)), percent, color=COLOURS["NF4"])
    even = 100 / len(percent)
    title = (
        f"Used from {percent.min():.1f} to {percent.max():.1f} %: {blockwise.entropy_bits(share):.2f} bits of information in 4"
    )
    ax.axhline(even, color=COLOURS["16-bit"], linestyle="--", label=f"an even share, {even:.2f} %")
    with kit_style():
        ax.set(title=title)
        ax.set(xlabel="NF4 value (1)", ylabel="share of the weights (%)", xticks=range(len(percent)))
        ax.set_xticklabels([f"{v:.2f}" for v in code.tolist()], rotation=45, fontsize=9)
        ax.legend()
    return fig


def plot_outlier(block: torch.Tensor, outlier: float, code: torch.Tensor) -> Figure:
    """Errors of one block of weights, alone and after its first weight has become an outlier.

    Args:
        block: (n,) weights of one block.
        outlier: what replaces the first weight.
        code: (k,) code values.
    """
    spoilt = block.clone()
    spoilt[0] = outlier
    error = [(blockwise.round_trip(b, code, len(b)) - b)[1:] for b in (block, spoilt)]
    rms = [e.square().mean().sqrt().item() for e in error]
    fig, ax = new_figure(figsize=(8.4, 3.2))
    for e, kind, label in ((error[1], "other", f"with one weight of {outlier:g}"), (error[0], "NF4", "without")):
        ax.vlines(range(1, len(block)), 0, e, color=COLOURS[kind], alpha=0.5, linewidth=1)
        ax.plot(range(1, len(block)), e, MARKERS[kind], color=COLOURS[kind], markersize=9 if kind == "other" else 5, label=label)
    with kit_style():
        ax.set(title=f"One outlier of {outlier:g}: the other {len(block) - 1} weights' error times {rms[1] / rms[0]:.1f}")
        ax.set(xlabel="position in the block", ylabel="error (standard deviations)")
        ax.legend(loc="upper right", ncols=2)
        top = 1.45 * max(e.abs().max().item() for e in error)
        ax.set_ylim(-top, top)
    return fig


@kit_style()
def plot_quality(panels: dict[str, Sequence]) -> Figure:
    """The loss that each set of weights adds (mean and standard deviation over the samples) beside the paper's table 2.

    Args:
        panels: {title: `quality.Quality` records of the same samples, the first of them the unquantized model's}.
    """
    fig, axes = new_figure(1, len(panels) + 1, figsize=(10.2, 3.9))
    paper = axes[-1]
    for ax, (title, (base, *quantized)) in zip(axes, panels.items()):
        added = [np.subtract(q.losses, base.losses) for q in quantized]
        means, spreads = [a.mean() for a in added], [a.std(ddof=1) for a in added]
        for i, (q, mean, spread) in enumerate(zip(quantized, means, spreads)):
            ax.bar(i, mean, yerr=spread, capsize=4, **look(q.name if q.name in COLOURS else "other"))
            ax.text(i, max(mean + spread, 0), f"{mean:+.2g}", ha="center", va="bottom", fontsize=8)
        top, low = max(m + s for m, s in zip(means, spreads)), min(m - s for m, s in zip(means, spreads))
        ax.axhline(0, color=COLOURS["16-bit"], linewidth=0.8)
        ax.set(ylim=(min(1.1 * low, 0), 1.2 * max(top, 1e-6)), xticks=range(len(quantized)), ylabel="added loss (nat)")
        ax.set_xticklabels([q.name.replace("+", "\n+") for q in quantized])
        ax.set_title(
            f"{title}:\nleast {quantized[int(np.argmin(means))].name}, most {quantized[int(np.argmax(means))].name}", fontsize=10
        )
    for i, (name, value) in enumerate(PAPER_TABLE_2.items()):
        paper.bar(i, value, **look("FP4" if name.startswith("FP4") else name))
        paper.text(i, value, f"{value:.2f}", ha="center", va="bottom", fontsize=9)
    paper.set(ylabel="mean perplexity (1)", xticks=range(4), ylim=(0, 40))
    paper.set_xticklabels(["Int4", "FP4\nE2M1", "FP4\nE3M0", "NF4\n+DQ"])
    paper.set_title("the paper, table 2:\nleast NF4+DQ, most Int4", fontsize=10)
    for ax in axes:
        ax.grid(axis="x", visible=False)
    return fig


def plot_ledger(ledgers: dict[str, dict[str, float]]) -> Figure:
    """What a weight costs beyond its four bits, one bar a variant.

    Args:
        ledgers: {variant: `double_quant.ledger(...)`}, in bits a weight.
    """
    fig, ax = new_figure(figsize=(8.4, 0.9 + 0.62 * len(ledgers)))
    for row, parts in enumerate(ledgers.values()):
        left = 0.0
        for part in ("scales", "scales of scales"):
            colour, hatch = SHADES[part]
            ax.barh(row, parts[part], left=left, color=colour, hatch=hatch, edgecolor="white", label=part if row == 0 else None)
            left += parts[part]
        ax.text(left, row, f"  4 + {left:.4g} = {sum(parts.values()):.4g} bits", va="center", fontsize=10)
    saved = [sum(p.values()) for p in ledgers.values()]
    with kit_style():
        ax.set(title=f"The scales cost {saved[0] - 4:.3g} bits a weight; quantized too, {saved[-1] - 4:.3g}")
        ax.set(xlabel="bits a weight beyond the four (bit)", yticks=range(len(ledgers)), yticklabels=list(ledgers))
        ax.set_xlim(0, 1.5 * max(s - 4 for s in saved))
        ax.set_ylim(len(ledgers) - 0.4, -0.6)
        ax.legend(loc="lower right")
    return fig


def plot_bits(blocksize: int, second_blocksize: int) -> Figure:
    """Bits a weight over the block size, without and with double quantization; one block size is read off.

    Args:
        blocksize: weights that share a scale.
        second_blocksize: scales that share a second-level scale.
    """
    sizes = [2**k for k in range(3, 13)]
    plain = [double_quant.bits_per_weight(b, None) for b in sizes]
    double = [double_quant.bits_per_weight(b, second_blocksize) for b in sizes]
    fig, ax = new_figure(figsize=(8.4, 3.6))
    ax.plot(sizes, plain, MARKERS["NF4"] + "-", color=COLOURS["NF4"], label="32-bit scales")
    ax.plot(sizes, double, MARKERS["NF4+DQ"] + "-", color=COLOURS["NF4+DQ"], label=f"8-bit scales, {second_blocksize} to a block")
    a, b = double_quant.bits_per_weight(blocksize, None), double_quant.bits_per_weight(blocksize, second_blocksize)
    ax.plot([blocksize, blocksize], [a, b], color=COLOURS["16-bit"], linewidth=2)
    ax.annotate(f"{a:.3f}", (blocksize, a), textcoords="offset points", xytext=(7, 5), fontweight="bold")
    ax.annotate(f"{b:.3f}", (blocksize, b), textcoords="offset points", xytext=(-7, -13), ha="right", fontweight="bold")
    with kit_style():
        ax.set(title=f"Blocks of {blocksize}: {a:.3f} bits a weight become {b:.3f}, {a - b:.3f} less")
        ax.set(xlabel="block size (weights)", ylabel="bits a weight (bit)", ylim=(3.6, 8.4))
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes)
        ax.set_xticklabels([str(s) for s in sizes])
        ax.minorticks_off()
        ax.legend()
    return fig


def plot_scales(scaled: torch.Tensor, code: torch.Tensor) -> Figure:
    """The centred scales of a model beside the 256 values they may become.

    Args:
        scaled: centred scales / second-level absmax, in [-1, 1].
        code: (256,) dynamic 8-bit map.
    """
    fig, (top, low) = new_figure(2, 1, figsize=(8.4, 3.8), sharex=True, height_ratios=[3, 1])
    top.hist(scaled.numpy(), bins=80, range=(-1, 1), color=COLOURS["NF4+DQ"])
    low.vlines(code, 0, 1, color=COLOURS["NF4"], linewidth=0.7)
    inside, near = (scaled.abs() < 0.1).double().mean().item(), int((code.abs() < 0.1).sum())
    with kit_style():
        top.set(
            title=f"{100 * inside:.0f} % of the scales lie within ±0.1, where {near} of the {len(code)} values lie",
            ylabel="scales",
        )
        low.set(xlabel="centred scale / second-level absmax (1)", ylabel="values", yticks=[], xlim=(-1.02, 1.02))
    return fig


def plot_model_bytes(rows: dict[str, dict[str, int]], n_weights: int) -> Figure:
    """Bytes of the quantized layers on the left, of the whole model on the right.

    Args:
        rows: {variant: {"codes", "scales", "scales of scales", "mean", "rest"}} in bytes; the first variant is unquantized
            and has its layers' bytes under "codes".
        n_weights: weights in the quantized layers.
    """
    fig, axes = new_figure(1, 2, figsize=(9.2, 3.4), sharey=True)
    unit, name = (2**20, "MiB") if max(sum(r.values()) for r in rows.values()) < 2**30 else (2**30, "GiB")
    for ax, with_rest in zip(axes, (False, True)):
        for y, parts in enumerate(rows.values()):
            left = 0.0
            for part, size in parts.items():
                if part == "rest" and not with_rest:
                    continue
                colour, hatch = (COLOURS["16-bit"], "") if y == 0 and part == "codes" else SHADES[part]
                ax.barh(y, size / unit, left=left, color=colour, hatch=hatch, edgecolor="white")
                left += size / unit
            bits = 8 * (sum(parts.values()) - parts["rest"]) / n_weights
            ax.text(
                left, y, f" {left:.3g} {name}" + ("" if with_rest else f", {bits:.3f} bits a weight"), va="center", fontsize=9
            )
        ax.set_xlim(
            0, (1.35 if with_rest else 1.9) * max(sum(p.values()) - (0 if with_rest else p["rest"]) for p in rows.values()) / unit
        )
    whole = [sum(p.values()) for p in rows.values()]
    layers = [w - p["rest"] for w, p in zip(whole, rows.values())]
    with kit_style():
        axes[0].set(
            title=f"Quantized layers: {layers[0] / layers[-1]:.1f} times smaller",
            yticks=range(len(rows)),
            yticklabels=list(rows),
            xlabel=f"size ({name})",
        )
        axes[1].set(title=f"Whole model: {whole[0] / whole[-1]:.1f} times (rest dotted)", xlabel=f"size ({name})")
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return fig


def plot_added_error(rows: dict[str, tuple[float, float]]) -> Figure:
    """RMSE with 32-bit scales and with 8-bit scales, layer by layer, and their difference.

    Args:
        rows: {layer: (rmse with 32-bit scales, rmse with 8-bit scales)}, relative to the layer's standard deviation.
    """
    plain, double = (np.array([r[i] for r in rows.values()]) for i in (0, 1))
    fig, (left, right) = new_figure(1, 2, figsize=(9.2, 3.4))
    left.plot(plain, MARKERS["NF4"], color=COLOURS["NF4"], markersize=9, label="32-bit scales")
    left.plot(double, MARKERS["NF4+DQ"], color=COLOURS["NF4+DQ"], markersize=5, label="8-bit scales")
    added = (double - plain) * 1e6
    right.vlines(range(len(plain)), 0, added, color=COLOURS["NF4+DQ"], linewidth=1.5)
    right.plot(added, MARKERS["NF4+DQ"], color=COLOURS["NF4+DQ"], markersize=5)
    with kit_style():
        left.set(
            title=f"Error of {len(rows)} layers: the same points",
            xlabel="layer",
            ylabel="RMSE (std of the layer)",
            ylim=(0, 1.35 * plain.max()),
        )
        left.legend(loc="upper right", ncols=2)
        right.set(title=f"Added: at most {max(added.max(), 0):.1f} millionths", xlabel="layer")
        right.set_ylabel("added RMSE (millionths of std)")
    return fig
