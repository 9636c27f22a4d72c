"""Notebook 02: the figures of LoRA and the checkers of its exercises.

The figures: the loss of a layer for three ways of starting A and B; the size of the low-rank path's
output over the rank, with LoRA's scale and rsLoRA's; how much of a fully fine-tuned layer's update
the best matrix of each rank holds, and a corner of that update; the trained share of every Pythia.
The formulas are in `theory/lora.py`.
"""

import numpy as np
import torch
from matplotlib import cycler

from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import lora
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import (
    COLOURS,
    draws,
    grouped_bars,
    log2_axis,
    look,
    maps,
    margins,
    mark,
)

LINES = cycler(
    color=[COLOURS["LoRA"], COLOURS["16-bit"], COLOURS["other"]], linestyle=["-", "--", "-."]
)
"""How one line after another is drawn, from the first again after the last."""

TARGETS = {
    "query_key_value": slice(0, 1),
    "attention": slice(0, 2),
    "feed-forward": slice(2, 4),
    "all-linear": slice(0, 4),
}
"""Which of a block's four linear layers (`Pythia.linears`) each choice of targets adapts."""


@draws(legend="best", prop_cycle=LINES, xlabel="step", ylabel="mean squared error")
def plot_losses(ax, losses, title: str):
    """Loss over steps, one line a way of starting A and B.

    Args:
        losses: {way of starting: loss of every step}.
        title: the finding.
    """
    for name, values in losses.items():
        ax.plot(values, label=name, linewidth=2)
    ax.set_ylim(bottom=0)
    return title


@draws(legend="best", xlabel="rank r", ylabel="output size (std)")
def plot_scales(ax, ranks, lora_alpha: float, n_in: int, seed: int = 0):
    """Size of the LoRA path's output over the rank, for three scales; entries of A and B
    independent.

    Args:
        ranks: the ranks to try.
        lora_alpha: alpha.
        n_in: inputs of the layer; A is drawn as PEFT draws it, B with standard deviation 0.01.
        seed: of x, A and B.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, n_in, generator=generator)
    uniform = torch.rand(max(ranks), n_in, generator=generator) * 2 - 1
    a = uniform / n_in**0.5
    b = torch.randn(max(ranks), 256, generator=generator) * 0.01
    sizes = []
    for r in ranks:
        y = x @ a[:r].T @ b[:r]
        sizes.append(y.std().item())
    plain = [lora.scale(lora_alpha, r) for r in ranks]
    rslora = [lora.scale(lora_alpha, r, rslora=True) for r in ranks]

    def line(values, style, meaning, label):
        ax.plot(ranks, values, style, label=label, **mark(meaning))

    line(sizes, "-", "other", "no scale")
    line(np.multiply(sizes, plain), "--", "LoRA", "alpha / r (LoRA)")
    line(np.multiply(sizes, rslora), "-.", "16-bit", "alpha / √r (rsLoRA)")
    log2_axis(ax, ranks)
    ax.set_yscale("log")
    return "At random B LoRA's path shrinks as 1/√r, rsLoRA's stays"


@draws(
    legend="lower right",
    prop_cycle=LINES,
    xlabel="rank r",
    ylabel="captured (% of energy)",
    ylim=(0, 104),
)
def plot_captured(ax, curves, r: int):
    """Share of an update that the best rank-r matrix holds, over r.

    Args:
        curves: name → cumulative energy (`lora.captured_energy`); the first is the finding, the
            others are for comparison.
        r: the rank to mark.
    """
    for name, curve in curves.items():
        ranks = range(1, len(curve) + 1)
        ax.plot(ranks, 100 * curve, label=name, linewidth=2)
    first, *_ = curves.values()
    r = min(r, len(first))
    held = 100 * first[r - 1]
    ax.plot([r], [held], **mark("LoRA"), markersize=11)
    ax.axvline(r, color=COLOURS["other"], linewidth=1, linestyle=":")
    n_ticks = len(first).bit_length()
    log2_axis(ax, [2**i for i in range(n_ticks)])
    return f"Rank {r} holds {held:.0f} % of this update"


@draws(
    (8.4, 3.2),
    grid={"ncols": 3, "sharey": True, **margins()},
    xlabel="input (index)",
)
def plot_update(axes, update, factors, r: int):
    """A corner of the update (32 rows and columns), of its best rank-r matrix, and what is left, in
    one colour scale.

    Args:
        update: (out, in) ΔW, in units of its standard deviation.
        factors: (A, B) of `lora.best_rank` at full rank; their first r rows and columns are the
            best of rank r.
        r: rank of the approximation; more than the matrix has counts as all.
    """
    a, b = factors
    r = min(r, len(a))
    energy = (b**2).sum(dim=0)
    left = 100 * energy[r:].sum() / energy.sum()
    corner = update[:32, :32]
    near = b[:32, :r] @ a[:r, :32]
    maps(axes, (corner, near, corner - near), 2, "change (std of ΔW)")
    titles = ("update ΔW", f"best of rank {r}", f"left over: {left:.0f} %")
    for ax, title in zip(axes, titles):
        ax.set(title=title, xticks=[0, 16], yticks=[0, 16])
    axes[0].set_ylabel("output (index)")


def count(size: str, r: int, targets: str) -> int:
    """Trained numbers of a Pythia at a rank for a choice of targets (a key of `TARGETS`)."""
    pythia = PYTHIA[size]
    return pythia.n_layers * lora.n_parameters(r, pythia.linears[TARGETS[targets]])


@draws(
    (8.4, 3.8),
    "best",
    grid=margins(),
    xlabel="Pythia (size)",
    ylabel="trained (% of all parameters)",
)
def plot_counts(ax, r: int, targets: str = "all-linear", highlight: str = "12b"):
    """Trained share of every Pythia at one rank, for the chosen targets beside PEFT's default.

    Args:
        r: rank.
        targets: a key of `TARGETS`.
        highlight: the size whose numbers are in the title.
    """
    looks = {"query_key_value": look("other"), targets: look("LoRA")}
    names = {"query_key_value": "query_key_value (PEFT's default)"}
    shares = {}
    for kind in looks:
        percent = {}
        for size, pythia in PYTHIA.items():
            percent[size] = 100 * count(size, r, kind) / pythia.n_parameters
        shares[names.get(kind, kind)] = percent
    grouped_bars(ax, list(PYTHIA), shares, looks.values())
    for bars in ax.containers:
        ax.bar_label(bars, fmt="{:.2g}", fontsize=8)
    n_trained = count(highlight, r, targets)
    share = percent[highlight]
    return f"pythia-{highlight}, r = {r}, {targets}: {n_trained:,} trained ({share:.2g} %)"


check_count = exercise(
    "trained numbers",
    want=lora.n_parameters(8, [(768, 3072)]),
    hint="A has r · in numbers, B has out · r, and nothing else is trained",
)
"""Exercise 1: trained numbers of rank 8 on a layer from 768 to 3072."""

x = torch.tensor([1.0, 2.0])
lora_a = torch.tensor([[1.0, 1.0]])
lora_b = torch.tensor([[1.0], [-2.0]])
check_output = exercise(
    "y",
    want=lora.forward(x, torch.eye(2), lora_a, lora_b, lora_alpha=2),
    hint="x Aᵀ is one number, 3; times B it is [3, -6]; scale that by alpha / r and add x",
)
"""Exercise 2: y for x = [1, 2], W = identity, A = [[1, 1]], B = [[1], [-2]], alpha = 2."""

check_alpha = exercise(
    "alpha",
    want=lora.scale(16, 64) * 16,
    hint="the scale is alpha / r: 16 / 64 must stay what it is",
)
"""Exercise 3: the alpha that keeps the scale of (alpha 16, r 64) when r becomes 16."""

check_break_even = exercise(
    "rank",
    want=5120 * 15360 / (5120 + 15360),
    hint="solve r · (in + out) = in · out",
)
"""Exercise 4: the rank at which LoRA on a 5120 → 15360 layer trains as many numbers as the layer
has.
"""
