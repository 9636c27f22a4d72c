"""Notebook 05: the figures and checkers of paged optimizers."""

import math
from collections.abc import Sequence

import numpy as np

from qlora_nb import cards
from qlora_nb.memory import step_sizes
from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import paging
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, MARKERS, draws, look, margins, stacked_bars

PARTS = {
    "frozen weights": (COLOURS["NF4+DQ"], ""),
    "LoRA weights": (COLOURS["LoRA"], ".."),
    "gradients": (COLOURS["LoRA"], "xx"),
    "states, not paged": (COLOURS["optimizer"], "++"),
    "states, paged": (COLOURS["optimizer"], ""),
    "kept for the backward pass": (COLOURS["other"], "--"),
    "working memory": (COLOURS["INT4"], "//"),
}
"""Colour and hatch of each part of a step's memory, bottom to top."""


@draws((8.8, 4.2), grid=margins(0.09, 0.74, 0.125, 0.93), xlabel="one step (layer by layer)")
def plot_step(ax, pythia: str, r: int, tokens: int, gpu_gib: float, bits: int = 32) -> None:
    """Memory through one step, stacked by part, under the card's line.

    Args:
        pythia: size.
        r: LoRA rank.
        tokens: tokens in one forward pass.
        gpu_gib: the card (GiB).
        bits: width of the optimizer states.
    """
    moments = paging.step_timeline(step_sizes.step_sizes(pythia, r, tokens, bits))
    fullest, n = max(moments, key=lambda m: m.total), PYTHIA[pythia].n_layers
    highest = fullest.total / cards.GIB
    heights, (colours, hatches) = (
        [[m.parts[name] / cards.GIB for m in moments] for name in PARTS],
        zip(*PARTS.values()),
    )
    drawn = {
        "colors": colours,
        "hatch": hatches,
        "edgecolor": "white",
        "linewidth": 0,
        "step": "mid",
    }
    ax.stackplot(range(len(moments)), heights, labels=list(PARTS), **drawn)
    top = 1.02 * max(highest, gpu_gib if gpu_gib < 1.5 * highest else 0)
    if gpu_gib < top:
        ax.axhline(
            gpu_gib, color="black", linewidth=1.5, linestyle="--", label=f"card {gpu_gib:g} GiB"
        )
    weights = moments[0].parts["frozen weights"] / cards.GIB
    bottom = 0.9 * min(weights, gpu_gib) if weights > 0.5 * highest else 0.0
    for begins in (n, n + 1, 2 * n + 1):
        ax.axvline(begins - 0.5, color="black", linewidth=0.6, linestyle=":")
    ax.set_xticks(
        [n / 2 - 0.5, n, n + 0.5 + n / 2, 2 * n + 1],
        ["forward", "loss ", "backward", "  optimizer"],
    )
    ax.set(xlim=(-0.5, len(moments) - 0.5), ylim=(bottom, bottom + 1.1 * (top - bottom)))
    ax.set_ylabel("memory (GiB)" + (", axis cut" if bottom else ""))
    ax.locator_params(axis="y", nbins=6)  # few ticks: text is what takes time in a redraw
    fits = "fits" if highest <= gpu_gib else "does not fit"
    title = f"pythia-{pythia}, r = {r}, {tokens:,} tokens: peak {highest:.2f} GiB ({fullest.phase}), {fits} {gpu_gib:g} GiB"
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, reverse=True)
    ax.set_title(
        title, y=1.0
    )  # told where: looking for a free height takes a seventh of the drawing


def paged_shares(ranks: Sequence[int]) -> np.ndarray:
    """(sizes, ranks) share of the 32-bit optimizer states' bytes that bitsandbytes would page on a
    GPU.
    """
    splits = np.array([[step_sizes.state_split(size, r) for r in ranks] for size in PYTHIA])
    return splits[..., 0] / splits.sum(axis=-1)


@draws((7.6, 4.4), xlabel="rank r (1)", ylabel="Pythia (size)")
def plot_paged_share(ax, ranks: Sequence[int], pythia: str, r: int) -> str:
    """Which states are paged, for every Pythia and rank; the reader's own cell is framed if it is
    there.
    """
    shares = 100 * paged_shares(ranks)
    ax.imshow(shares, cmap="PuRd", vmin=0, vmax=130, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        ax.text(
            j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 70 else "black"
        )
    if r in ranks:
        x, y = list(ranks).index(r) - 0.5, list(PYTHIA).index(pythia) - 0.5
        ax.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color="black", linewidth=2.5)
    ax.set(
        xticks=range(len(ranks)), xticklabels=ranks, yticks=range(len(PYTHIA)), yticklabels=PYTHIA
    )
    ax.grid(visible=False)
    share = 100 * paged_shares([r])[list(PYTHIA).index(pythia), 0]
    return f"pythia-{pythia}, r = {r}: {share:.0f} % of the state bytes are paged"


@draws(
    (9.0, 3.8), grid={"ncols": 2, **margins(0.08, 0.99, 0.14, 0.92, wspace=0.22)}, xlabel="step (1)"
)
def plot_run(
    axes, steps: Sequence[paging.StepSizes], gpu_gib: float, gb_per_s: float = 12.0
) -> None:
    """A run of steps with and without paging: memory wanted beside the card, and bytes moved.

    Args:
        steps: the sizes of each step.
        gpu_gib: the card (GiB).
        gb_per_s: bandwidth of the bus between card and RAM (10^9 bytes a second).
    """
    plain, paged = (
        paging.simulate(steps, int(gpu_gib * cards.GIB), paging=p) for p in (False, True)
    )
    wanted = np.array([max(m.total for m in paging.step_timeline(s)) / cards.GIB for s in steps])
    states = np.array([s.paged / cards.GIB for s in steps])
    left, right = axes
    x = np.arange(len(steps)) + 1
    left.bar(x, wanted, **look("other", ""), label="wanted at the peak")
    left.bar(
        x,
        states,
        bottom=wanted - states,
        **look("optimizer", ""),
        label="of it states that can be paged",
    )
    left.axhline(gpu_gib, color="black", linestyle="--", label=f"card {gpu_gib:.2f} GiB")
    low, high = min(*wanted, gpu_gib), max(*wanted, gpu_gib)
    floor = max(0.0, low - max(2 * max(states), high - low, 0.05 * high))
    left.set(
        ylim=(floor, high + 0.55 * (high - floor)),
        ylabel="memory (GiB)" + (", axis cut" if floor else ""),
    )
    moved_in, moved_out = (
        [getattr(record, k) / 2**20 for record in paged] for k in ("bytes_in", "bytes_out")
    )
    right.bar(
        x[: len(paged)] - 0.2, moved_out, 0.4, **look("optimizer", "//"), label="to RAM (evicted)"
    )
    right.bar(x[: len(paged)] + 0.2, moved_in, 0.4, **look("NF4"), label="to the card (faults)")
    right.set(
        xlim=(0.4, len(steps) + 0.6),
        ylim=(0, 1.5 * max(*moved_in, *moved_out, 1)),
        ylabel="moved (MiB)",
    )
    took = f"survives, {max(record.seconds(gb_per_s) for record in paged):.2g} s for the transfers"
    for ax, records, way, well in (
        (left, plain, "Not paged", "survives"),
        (right, paged, "Paged", took),
    ):
        end = (
            well if records[-1].survived else f"out of memory in step {len(records)}"
        )  # the record after it is not made
        ax.set_title(f"{way}: {end}", fontsize=11)
        ax.legend(fontsize=8, loc="upper left")
        ax.locator_params(axis="y", nbins=5)  # few ticks: text is what takes time in a redraw
        ax.set_xticks(x)


def sweep_moved(n_pages: int, room: int, sweeps: int = 3) -> int:
    """Pages moved (both ways) in the last of several passes over all pages, with room for so many
    on the card.
    """
    memory = paging.UnifiedMemory(room)
    for _ in range(sweeps):
        before = memory.pages_in + memory.pages_out
        for page in range(n_pages):
            memory.touch(page)
    return memory.pages_in + memory.pages_out - before


@draws(
    legend="lower left",
    xlabel="room for the paged states (% of their size)",
    ylabel="moved in a step (GiB)",
)
def plot_thrashing(ax, paged_bytes: int, gb_per_s: float) -> str:
    """Bytes moved a step over the room left for the paged states: least-recently-used against the
    least that is possible.

    Args:
        paged_bytes: the optimizer states that may leave the card (`StepSizes.paged`); it touches
            their pages one after another in every step.
        gb_per_s: bandwidth (10^9 bytes a second).
    """
    n_pages = max(1, math.ceil(paged_bytes / paging.PAGE_BYTES))
    state_gib = paged_bytes / cards.GIB
    rooms = sorted({max(1, round(f * n_pages / 20)) for f in range(1, 23)} | {max(1, n_pages - 1)})
    moved = [sweep_moved(n_pages, room) / n_pages * state_gib for room in rooms]
    least = [2 * max(0, n_pages - room) / n_pages * state_gib for room in rooms]
    x = [100 * room / n_pages for room in rooms]
    ax.plot(
        x,
        moved,
        MARKERS["optimizer"] + "-",
        color=COLOURS["optimizer"],
        label="least recently used",
    )
    ax.plot(x, least, "o--", color=COLOURS["16-bit"], markersize=3, label="only what does not fit")
    ax.set_ylim(0, 1.15 * max(*moved, 1e-9))
    if not paged_bytes:
        return "None of these states is paged: nothing to move"
    if not any(moved):
        return "One page holds all paged states: nothing to move"
    seconds = max(moved) * cards.GIB / (gb_per_s * 1e9)
    return f"One page short moves every paged state: {max(moved):.3g} GiB, {seconds:.2g} s a step"


@draws((8.0, 3.2), "lower right", xlabel="states of one block (MiB)", ylabel="optimizer (name)")
def plot_state_bytes(ax, measured: dict[str, dict[str, int]]) -> str:
    """Bytes of optimizer states by optimizer, stacked by kind.

    Args:
        measured: optimizer name → "states" and "scales of 8-bit states" → bytes.
    """
    looks = {"states": look("optimizer"), "scales of 8-bit states": look("other", "//")}
    totals = stacked_bars(ax, measured, looks, 2**20, lambda total: f" {total:.2f} MiB")
    ax.set_xlim(0, 1.2 * max(totals))
    ax.invert_yaxis()
    return f"8-bit states are {max(totals) / min(totals):.2f} times smaller, scales counted"


hint = "lora_A has r · in elements, lora_B has out · r; the rule is 100,000 elements"

_paged = exercise(
    "[lora_A, lora_B] paged", [int(paging.is_paged(16 * side)) for side in (5120, 20480)], hint
)


def check_paged(answer: object) -> bool:
    """Exercise 1: which states of pythia-12b's dense_h_to_4h (5120 → 20480) are paged at r = 16:
    [lora_A, lora_B], bools too.
    """
    return _paged(
        [int(v) if isinstance(v, bool) else v for v in answer]
        if isinstance(answer, (list, tuple))
        else answer
    )


hint = "two states of one byte an element, and for each state one float32 a block of 256"

check_bytes_8bit = exercise("bytes", paging.state_bytes(81_920, 8), hint, 1e-9)
"""Exercise 2: bytes of both 8-bit Adam states of a tensor with 81,920 elements."""

hint = (
    "the second touch of page 0 makes page 1 the least recently used, so page 3 pushes out page 1"
)

check_faults = exercise(
    "faults", paging.replay_spec([("touch", page) for page in (0, 1, 2, 0, 3, 1)], 3)[0], hint
)
"""Exercise 3: page faults when 0, 1, 2, 0, 3, 1 are touched with room for three pages, least
recently used out first.
"""

hint = "the pages travel twice: out for the spike, and back for the optimizer"

check_overflow = exercise(
    "seconds",
    paging.StepRecord(0, True, bytes_in=12 * 10**8, bytes_out=12 * 10**8).seconds(12),
    hint,
)
"""Exercise 4: seconds to push 1.2 · 10^9 bytes out and bring them back over a bus of 12 · 10^9
bytes a second.
"""
