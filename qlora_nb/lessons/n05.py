"""Notebook 05: the figures of paged optimizers and the checkers of its exercises.

The figures: memory through one training step, part by part, under the card's size; the share of the
optimizer states that bitsandbytes pages, for every Pythia and rank; a run of steps with and without
paging; bytes moved over the room left for the states. The simulation is in `theory/paging.py`, the
sizes of a Pythia's step in `memory/step_sizes.py`. The reader's pager is compared with Python's own
cache.
"""

import math
from functools import lru_cache

import numpy as np
import pandas
from matplotlib.patches import Rectangle

from qlora_nb import cards
from qlora_nb.memory import step_sizes
from qlora_nb.pythia import PYTHIA
from qlora_nb.theory import paging
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import LOOKS, draws, look, mark
from qlora_nb.ui.written import Written

PARTS = {
    "frozen weights": "4-bit weights",
    "LoRA weights": "LoRA weights",
    "gradients": "gradients",
    "states, not paged": "optimizer states",
    "states, paged": "paged optimizer states",
    "kept for the backward pass": "kept for the backward pass",
    "working memory": "working memory",
}
"""Each part of a step's memory, bottom to top, and its name in the table of looks."""


def memory_axis(ax, stays: float, highest: float, room: float = 0.1) -> None:
    """The y axis of a figure of memory (GiB). It starts at 0, or where most of the axes would show
    what never changes, just below that.

    Args:
        stays: what never changes.
        highest: what must be seen.
        room: share of the axis that is left above it.
    """
    bottom = 0.0
    ax.set_ylabel("memory (GiB)")
    if stays > 0.5 * highest:
        bottom = 0.9 * stays
        ax.set_ylabel("memory (GiB), axis cut")
    ax.set_ylim(bottom, highest + room * (highest - bottom))
    ax.locator_params(axis="y", nbins=6)  # few ticks: text is what takes time in a redraw


@draws
def plot_step(ax, pythia: str, r: int, tokens: int, gpu_gib: float, bits: int = 32):
    """Memory through one step, stacked by part, under the card's line.

    Args:
        pythia: size.
        r: LoRA rank.
        tokens: tokens in one forward pass.
        gpu_gib: the card (GiB).
        bits: width of the optimizer states.
    """
    moments = paging.step_timeline(step_sizes.step_sizes(pythia, r, tokens, bits))
    parts = pandas.DataFrame([moment.parts for moment in moments])[list(PARTS)] / cards.GIB
    colours, hatches, _ = zip(*[LOOKS[meaning] for meaning in PARTS.values()])
    drawn = {"colors": colours, "hatch": hatches, "edgecolor": "white", "linewidth": 0}
    ax.stackplot(parts.index, parts.T, labels=parts, step="mid", **drawn)
    peak = max(moments, key=lambda moment: moment.total)
    highest = peak.total / cards.GIB
    top = highest
    if gpu_gib < 1.5 * highest:
        top = max(highest, gpu_gib)
        ax.axhline(gpu_gib, linestyle="--", label=f"card {gpu_gib:g} GiB")
    memory_axis(ax, min(parts["frozen weights"][0], gpu_gib), top)
    n = PYTHIA[pythia].n_layers
    for start in (n, n + 1, 2 * n + 1):
        ax.axvline(start - 0.5, linewidth=0.6, linestyle=":")
    middles = [n / 2 - 0.5, n, n + 0.5 + n / 2, 2 * n + 1]
    ax.set_xticks(middles, ["forward", "loss ", "backward", "  optimizer"])
    ax.set_xlim(-0.5, len(moments) - 0.5)
    fits = "fits" if highest <= gpu_gib else "does not fit"
    words = f"pythia-{pythia}, r = {r}, {tokens:,} tokens: peak {highest:.2f} GiB ({peak.phase})"
    return f"{words}, {fits} {gpu_gib:g} GiB"


@draws
def plot_paged_share(ax, ranks, pythia: str, r: int):
    """The share of the 32-bit optimizer states' bytes that bitsandbytes pages on a GPU, for every
    Pythia and rank; the reader's own cell is framed.

    Args:
        ranks: the columns.
        pythia, r: size and rank of the reader's own cell.
    """
    percent = []
    for size in PYTHIA:
        splits = np.array([step_sizes.state_split(size, rank) for rank in ranks])
        percent.append(100 * splits[:, 0] / splits.sum(axis=1))
    percent = np.array(percent)
    ax.imshow(percent, cmap="PuRd", vmin=0, vmax=130, aspect="auto")
    for (i, j), share in np.ndenumerate(percent):
        colour = "white" if share > 70 else "black"
        ax.text(j, i, f"{share:.0f}", ha="center", va="center", color=colour)
    row = list(PYTHIA).index(pythia)
    column = list(ranks).index(r)
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2.5))
    ax.set_xticks(range(len(ranks)), ranks)
    ax.set_yticks(range(len(PYTHIA)), PYTHIA)
    ax.grid(visible=False)
    return f"pythia-{pythia}, r = {r}: {percent[row, column]:.0f} % of the state bytes are paged"


@draws
def plot_run(axes, steps, gpu_gib: float, gb_per_s: float = 12.0):
    """A run of steps with and without paging: memory wanted beside the card, and bytes moved.

    Args:
        steps: the sizes of each step (`paging.StepSizes`).
        gpu_gib: the card (GiB).
        gb_per_s: bandwidth of the bus between card and RAM (10^9 bytes a second).
    """
    budget = int(gpu_gib * cards.GIB)
    plain = paging.simulate(steps, budget, paging=False)
    paged = paging.simulate(steps, budget)
    left, right = axes
    x = np.arange(len(steps)) + 1

    wanted = []
    for sizes in steps:
        wanted.append(max(moment.total for moment in paging.step_timeline(sizes)))
    wanted = np.array(wanted) / cards.GIB
    states = np.array([sizes.paged for sizes in steps]) / cards.GIB
    left.bar(x, wanted, label="wanted at the peak", **look("other", hatch=""))
    label = "of it states that can be paged"
    left.bar(x, states, bottom=wanted - states, label=label, **look("optimizer", hatch=""))
    left.axhline(gpu_gib, linestyle="--", label=f"card {gpu_gib:.2f} GiB")
    memory_axis(left, min(*(wanted - states), gpu_gib), max(*wanted, gpu_gib), room=0.55)

    done = x[: len(paged)]  # there is no record after a step that does not fit
    moved_out = [record.bytes_out / 2**20 for record in paged]
    moved_in = [record.bytes_in / 2**20 for record in paged]
    right.bar(done - 0.2, moved_out, 0.4, label="to RAM (evicted)", **look("optimizer", hatch="//"))
    back = look("optimizer", hatch="", alpha=0.5)
    right.bar(done + 0.2, moved_in, 0.4, label="to the card (faults)", **back)
    right.set_ylim(0, 1.5 * max(*moved_in, *moved_out, 1))
    right.set(xlim=(0.4, len(steps) + 0.6), ylabel="moved (MiB)")

    longest = max(record.seconds(gb_per_s) for record in paged)
    titles = ["Not paged: survives", f"Paged: survives, {longest:.2g} s for the transfers"]
    if not plain[-1].survived:
        titles[0] = f"Not paged: out of memory in step {len(plain)}"
    if not paged[-1].survived:
        titles[1] = f"Paged: out of memory in step {len(paged)}"
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=11)
        ax.legend(fontsize=8, loc="upper left")
        ax.set_xticks(x)


def sweep_moved(n_pages: int, room: int) -> int:
    """Pages moved in the second of two passes over all pages, with room for so many on the card:
    each fault brings one in and sends one out.
    """
    sweep = list(range(n_pages))
    return 2 * (misses_of_a_cache(sweep + sweep, room) - n_pages)


@draws
def plot_thrashing(ax, paged_bytes: int, gb_per_s: float):
    """Bytes moved a step over the room left for the paged states: least-recently-used against the
    least that is possible.

    Args:
        paged_bytes: the optimizer states that may leave the card (`StepSizes.paged`); it touches
            their pages one after another in every step.
        gb_per_s: bandwidth (10^9 bytes a second).
    """
    n_pages = max(1, math.ceil(paged_bytes / paging.PAGE_BYTES))
    rooms = np.round(np.arange(1, 23) * n_pages / 20).astype(int)
    rooms = np.unique(np.maximum(1, [*rooms, n_pages - 1]))
    page_gib = paged_bytes / n_pages / cards.GIB
    moved = page_gib * np.array([sweep_moved(n_pages, room) for room in rooms.tolist()])
    least = page_gib * 2 * np.maximum(0, n_pages - rooms)
    percent = 100 * rooms / n_pages
    ax.plot(percent, moved, label="least recently used", **mark("optimizer"))
    line = {"linestyle": "--", "markersize": 3, "label": "only what does not fit"}
    ax.plot(percent, least, **mark("other"), **line)
    most = max(moved)
    ax.set_ylim(0, 1.15 * max(most, 1e-9))
    if not paged_bytes:
        return "None of these states is paged: nothing to move"
    if not most:
        return "One page holds all paged states: nothing to move"
    seconds = most * cards.GIB / (gb_per_s * 1e9)
    return f"One page short moves all of it out and in: {most:.3g} GiB, {seconds:.2g} s a step"


def misses_of_a_cache(touches: list[int], room: int) -> int:
    """Faults as Python's own least-recently-used cache counts them: a page is a result that it has
    or has not kept.
    """

    @lru_cache(maxsize=room)
    def page(number):
        return number

    for number in touches:
        page(number)
    return page.cache_info().misses


def touches_to_try() -> list[tuple]:
    """Pages and room: six touches by hand, a sweep one page short, and 300 at random."""
    at_random = np.random.default_rng(0).integers(12, size=300).tolist()
    return [([0, 1, 2, 0, 3, 0], 3), ([*range(10), *range(10)], 9), (at_random, 7)]


check_lru_pager = Written(
    "lru_pager",
    misses_of_a_cache,
    touches_to_try,
    "the misses of Python's functools.lru_cache",
    hint="each touch makes its page the most recently used, a fault or not; a fault on a full card "
    "first sends the least recently used page away, and its next touch is a fault again",
)
"""Exercise 1: page faults, least recently used out first."""

check_bytes_8bit = exercise(
    "bytes",
    want=paging.state_bytes(81_920, bits=8),
    hint="two states of one byte an element, and for each state one float32 a block of 256",
)
"""Exercise 2: bytes of both 8-bit Adam states of a tensor with 81,920 elements."""
