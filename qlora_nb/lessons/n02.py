"""Notebook 02: the figures and checkers of LoRA."""

import numpy as np
import torch
from matplotlib import cycler
from matplotlib.patches import Rectangle

from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import lora
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, MARKERS, draws, log2_axis, look, maps, margins

LINES = cycler(
    color=[COLOURS["LoRA"], COLOURS["16-bit"], COLOURS["other"]], linestyle=["-", "--", "-."]
)
"""`LINES()` gives how to draw one line after another, from the first again after the last."""

TARGETS = {
    "query_key_value": slice(0, 1),
    "attention": slice(0, 2),
    "feed-forward": slice(2, 4),
    "all-linear": slice(0, 4),
}
"""Which of a block's four linear layers (shapes.gpt_neox) each choice of targets adapts."""


@draws((6.4, 3.6), aspect="equal", anchor="W")
def plot_parts(ax, n_in: int, n_out: int, r: int) -> str:
    """W and the two thin matrices, drawn to one scale.

    Args:
        n_in, n_out: sizes of the layer.
        r: rank.
    """
    unit = max(n_in, n_out)
    gap, thick = 0.28 * unit, max(r, 0.012 * unit)
    b_left, a_left = n_in + gap, n_in + 2 * gap + thick
    boxes = [
        (
            0,
            n_out,
            n_in,
            {"facecolor": "#E6E6E6", "edgecolor": "black"},
            f"W, frozen\n{n_out:,} × {n_in:,}",
        ),
        (
            b_left,
            n_out,
            thick,
            {"facecolor": COLOURS["LoRA"], "edgecolor": "white"},
            f"B\n{n_out:,} × {r}",
        ),
        (
            a_left,
            thick,
            n_in,
            {"facecolor": COLOURS["LoRA"], "edgecolor": "white"},
            f"A\n{r} × {n_in:,}",
        ),
    ]
    for left, height, width, drawn, text in boxes:
        ax.add_patch(Rectangle((left, -height), width, height, **drawn))
        ax.text(left + width / 2, -height - 0.03 * unit, text, ha="center", va="top", fontsize=10)
    for x, y, sign in ((b_left - gap / 2, -n_out / 2, "+"), (a_left - gap / 2, -0.08 * unit, "·")):
        ax.text(x, y, sign, ha="center", va="center", fontsize=22, fontweight="bold")
    ax.set(
        xlim=(-0.02 * unit, a_left + n_in + 0.5 * thick + 0.05 * unit),
        ylim=(-n_out - 0.3 * unit, 0.03 * unit),
    )
    ax.axis("off")
    return f"Two thin matrices hold {100 * lora.n_parameters(r, [(n_in, n_out)]) / (n_in * n_out):.2g} % as many numbers as W"


@draws(legend="best", xlabel="step (1)", ylabel="mean squared error (1)")
def plot_losses(ax, losses: dict[str, list[float]], title: str) -> str:
    """Loss over steps, one line a way of starting A and B."""
    for (name, values), line in zip(losses.items(), LINES()):
        ax.plot(values, **line, label=name, linewidth=2)
    ax.set_ylim(bottom=0)
    return title


@draws(legend="best", xlabel="rank r (1)", ylabel="output size (std)")
def plot_scales(ax, ranks: tuple[int, ...], lora_alpha: float, n_in: int, seed: int = 0) -> str:
    """Size of the LoRA path's output over the rank, for three scales; entries of A and B
    independent.

    Args:
        ranks: the ranks to try.
        lora_alpha: alpha.
        n_in: inputs of the layer; A is drawn as PEFT draws it, B with standard deviation 0.01.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, n_in, generator=generator)
    a = (torch.rand(max(ranks), n_in, generator=generator) * 2 - 1) / n_in**0.5
    b = torch.randn(max(ranks), 256, generator=generator) * 0.01
    raw = [(x @ a[:r].T @ b[:r]).std().item() for r in ranks]
    kinds = {
        "no scale": ("other", "-"),
        "alpha / r (LoRA)": ("LoRA", "--"),
        "alpha / √r (rsLoRA)": ("16-bit", "-."),
    }
    for rslora, (name, (kind, line)) in zip((None, False, True), kinds.items()):
        values = [
            size * (1 if rslora is None else lora.scale(lora_alpha, r, rslora))
            for r, size in zip(ranks, raw)
        ]
        ax.plot(ranks, values, line, marker=MARKERS[kind], color=COLOURS[kind], label=name)
    log2_axis(ax, ranks)
    ax.set_yscale("log")
    return "At random B LoRA's path shrinks as 1/√r, rsLoRA's stays"


@draws(legend="lower right", xlabel="rank r (1)", ylabel="captured (% of energy)", ylim=(0, 104))
def plot_captured(ax, curves: dict[str, torch.Tensor], r: int) -> str:
    """Share of an update that the best rank-r matrix holds, over r.

    Args:
        curves: name → cumulative energy (`lora.captured_energy`); the first is the finding, the
            others are for comparison.
        r: the rank to mark.
    """
    for (name, curve), line in zip(curves.items(), LINES()):
        ax.plot(range(1, len(curve) + 1), 100 * curve, **line, label=name, linewidth=2)
    first = next(iter(curves.values()))
    r = min(r, len(first))
    held = 100 * first[r - 1]
    ax.plot([r], [held], MARKERS["LoRA"], color=COLOURS["LoRA"], markersize=11)
    ax.axvline(r, color=COLOURS["other"], linewidth=1, linestyle=":")
    log2_axis(ax, [2**i for i in range(len(first).bit_length())])
    return f"Rank {r} holds {held:.0f} % of this update"


@draws(
    (8.4, 3.2),
    grid={"ncols": 3, "sharey": True, **margins(0.07, 0.88, 0.11, 0.88, wspace=0.2)},
    xlabel="input (index)",
)
def plot_update(
    axes, update: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], r: int, size: int = 32
) -> None:
    """A corner of the update, of its best rank-r matrix, and what is left, in one colour scale.

    Args:
        update: (out, in) ΔW, in units of its standard deviation.
        factors: (A, B) of `lora.best_rank` at full rank; their first r rows and columns are the
            best of rank r.
        r: rank of the approximation; more than the matrix has counts as all.
        size: rows and columns shown.
    """
    a, b = factors
    r = min(r, len(a))
    corner, near = update[:size, :size], b[:size, :r] @ a[:r, :size]
    left = 100 * (b[:, r:] ** 2).sum().item() / (b**2).sum().item()
    maps(axes, (corner, near, corner - near), 2, "change (std of ΔW)")
    for ax, title in zip(axes, ("update ΔW", f"best of rank {r}", f"left over: {left:.0f} %")):
        ax.set(title=title, xticks=[0, size // 2], yticks=[0, size // 2])
    axes[0].set_ylabel("output (index)")


def count(size: str, r: int, targets: str) -> int:
    """Trained numbers of a Pythia at a rank for a choice of targets (a key of `TARGETS`)."""
    return PYTHIA[size].n_layers * lora.n_parameters(r, PYTHIA[size].linears[TARGETS[targets]])


@draws(
    (8.4, 3.8),
    "best",
    grid=margins(0.08, 0.99, 0.14, 0.92),
    xlabel="Pythia (size)",
    ylabel="trained (% of all parameters)",
)
def plot_counts(ax, r: int, targets: str = "all-linear", highlight: str = "12b") -> str:
    """Trained share of every Pythia at one rank, for the chosen targets beside PEFT's default.

    Args:
        r: rank.
        targets: a key of `TARGETS`.
        highlight: the size whose numbers are in the title.
    """
    kinds = {"query_key_value": "other"} | {targets: "LoRA"}
    width = 0.8 / len(kinds)
    for k, (kind, colour) in enumerate(kinds.items()):
        shares = {size: 100 * count(size, r, kind) / PYTHIA[size].n_parameters for size in PYTHIA}
        x = np.arange(len(shares)) + (k - (len(kinds) - 1) / 2) * width
        name = f"{kind} (PEFT's default)" if kind == "query_key_value" else kind
        bars = ax.bar(x, shares.values(), width, **look(colour), label=name)
        ax.bar_label(bars, [f"{share:.2g}" for share in shares.values()], fontsize=8)
    ax.set_xticks(range(len(PYTHIA)), list(PYTHIA))
    return f"pythia-{highlight}, r = {r}, {targets}: {count(highlight, r, targets):,} trained ({shares[highlight]:.2g} %)"


X, W = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])

A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-2.0]])

hint = "A has r · in numbers, B has out · r, and nothing else is trained"

check_count = exercise("trained numbers", lora.n_parameters(8, [(768, 3072)]), hint, 1e-9)
"""Exercise 1: trained numbers of rank 8 on a layer from 768 to 3072."""

hint = "x Aᵀ is one number, 3; times B it is [3, -6]; scale that by alpha / r and add x"

check_output = exercise("y", lora.forward(X, W, A, B, 2), hint)
"""Exercise 2: y for x = [1, 2], W = identity, A = [[1, 1]], B = [[1], [-2]], alpha = 2."""

check_alpha = exercise(
    "alpha", lora.scale(16, 64) * 16, "the scale is alpha / r: 16 / 64 must stay what it is"
)
"""Exercise 3: the alpha that keeps the scale of (alpha 16, r 64) when r becomes 16."""

check_break_even = exercise(
    "rank", 5120 * 15360 / (5120 + 15360), "solve r · (in + out) = in · out", 1e-9
)
"""Exercise 4: the rank at which LoRA on a 5120 → 15360 layer trains as many numbers as the layer
has.
"""
