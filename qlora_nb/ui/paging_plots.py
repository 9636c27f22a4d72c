"""Figures of notebook 05: data in, closed Figure out."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from qlora_nb.engine import ledger
from qlora_nb.engine.shapes import PYTHIA
from qlora_nb.theory import paging
from qlora_nb.ui.style import COLOURS, MARKERS, finish, kit_style, look, margins, new_figure, stacked_bars
from qlora_nb.ui.widgets import choice, choice_slider, explore, float_slider

GIB = ledger.GIB
PARTS = {
    "frozen weights": ("NF4+DQ", ""),
    "LoRA weights": ("LoRA", ".."),
    "gradients": ("LoRA", "xx"),
    "states, not paged": ("optimizer", "++"),
    "states, paged": ("optimizer", ""),
    "kept for the backward pass": ("other", "--"),
    "working memory": ("INT4", "//"),
}
"""Colour and hatch of each part of a step's memory, bottom to top."""


def step_of(pythia: str, r: int, tokens: int, bits: int = 32) -> list[paging.Moment]:
    """The timeline of one step of a Pythia (see `ledger.step_sizes`)."""
    return paging.step_timeline(ledger.step_sizes(pythia, r, tokens, bits))


@kit_style()
def plot_step(pythia: str, r: int, tokens: int, gpu_gib: float, bits: int = 32) -> Figure:
    """Memory through one step, stacked by part, under the card's line.

    Args:
        pythia: size.
        r: LoRA rank.
        tokens: tokens in one forward pass.
        gpu_gib: the card (GiB).
        bits: width of the optimizer states.
    """
    moments = step_of(pythia, r, tokens, bits)
    names, totals = [m.phase for m in moments], [m.total / GIB for m in moments]
    highest, n = max(totals), names.count("forward")
    _, ax = new_figure(figsize=(8.8, 4.2), **margins(0.09, 0.74, 0.125, 0.93))
    floor = np.zeros(len(moments))
    for name, (colour, hatch) in PARTS.items():
        height = np.array([m.parts[name] / GIB for m in moments])
        drawn = {"facecolor": COLOURS[colour], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.fill_between(range(len(moments)), floor, floor + height, **drawn, step="mid", label=name)
        floor += height
    top = 1.02 * max(highest, gpu_gib if gpu_gib < 1.5 * highest else 0)
    if gpu_gib < top:
        ax.axhline(gpu_gib, color="black", linewidth=1.5, linestyle="--", label=f"card {gpu_gib:g} GiB")
    weights = moments[0].parts["frozen weights"] / GIB
    bottom = 0.9 * min(weights, gpu_gib) if weights > 0.5 * highest else 0.0
    for phase in ("loss", "backward", "optimizer"):
        ax.axvline(names.index(phase) - 0.5, color="black", linewidth=0.6, linestyle=":")
    ax.set_xticks([n / 2 - 0.5, n, n + 0.5 + n / 2, 2 * n + 1], ["forward", "loss ", "backward", "  optimizer"])
    ax.set(xlim=(-0.5, len(moments) - 0.5), ylim=(bottom, bottom + 1.1 * (top - bottom)))
    ax.locator_params(axis="y", nbins=6)  # few ticks: text is what takes time in a redraw
    peak = f"peak {highest:.2f} GiB ({names[totals.index(highest)]})"
    fits = "fits" if highest <= gpu_gib else "does not fit"
    title = f"pythia-{pythia}, r = {r}, {tokens:,} tokens: {peak}, {fits} {gpu_gib:g} GiB"
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, reverse=True)
    ax.set_title(title, y=1.0)  # told where: looking for a free height takes a seventh of the drawing
    ax.set(xlabel="one step (layer by layer)", ylabel="memory (GiB)" + (", axis cut" if bottom else ""))
    return ax.figure


def paged_shares(ranks: Sequence[int], bits: int = 32) -> np.ndarray:
    """(sizes, ranks) share of the optimizer-state bytes that bitsandbytes would page on CUDA."""
    splits = np.array([[ledger.state_split(size, r, bits) for r in ranks] for size in PYTHIA])
    return splits[..., 0] / splits.sum(axis=-1)


@kit_style()
def plot_paged_share(ranks: Sequence[int], pythia: str, r: int, bits: int = 32) -> Figure:
    """Which states are paged, for every Pythia and rank; the reader's own cell is framed if it is there."""
    shares = 100 * paged_shares(ranks, bits)
    paged, fixed = ledger.state_split(pythia, r, bits)
    _, ax = new_figure(figsize=(7.6, 4.4))
    ax.imshow(shares, cmap="PuRd", vmin=0, vmax=130, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        ax.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 70 else "black")
    if r in ranks:
        x, y = list(ranks).index(r) - 0.5, list(PYTHIA).index(pythia) - 0.5
        ax.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color="black", linewidth=2.5)
    ax.set_xticks(range(len(ranks)), [str(k) for k in ranks])
    ax.set_yticks(range(len(PYTHIA)), list(PYTHIA))
    ax.grid(visible=False)
    title = f"pythia-{pythia}, r = {r}: {100 * paged / (paged + fixed):.0f} % of the state bytes are paged"
    return finish(ax, title, "rank r (1)", "Pythia (size)")


def run_of(pythia: str, r: int, usual: int, spike: int, bits: int = 32) -> list[paging.StepSizes]:
    """Six steps of `usual` tokens with one of `spike` tokens in the fourth place."""
    return [ledger.step_sizes(pythia, r, t, bits) for t in (usual, usual, usual, spike, usual, usual)]


@kit_style()
def plot_run(pythia: str, r: int, usual: int, spike: int, *, gpu_gib: float, gb_per_s: float = 12.0) -> Figure:
    """The six steps with and without paging: memory wanted beside the card, and bytes moved.

    Args:
        pythia, r: model and rank.
        usual, spike: tokens in a usual pass and in the long one.
        gpu_gib: the card (GiB).
        gb_per_s: bandwidth of the bus between card and RAM (10^9 bytes a second).
    """
    steps = run_of(pythia, r, usual, spike)
    plain, paged = (paging.simulate(steps, int(gpu_gib * GIB), paging=p) for p in (False, True))
    wanted = np.array([max(m.total for m in paging.step_timeline(s)) / GIB for s in steps])
    states = np.array([s.paged / GIB for s in steps])
    fig, (left, right) = new_figure(1, 2, figsize=(9.0, 3.8), **margins(0.08, 0.99, 0.14, 0.92, wspace=0.22))
    x = np.arange(len(steps)) + 1
    left.bar(x, wanted, **look("other", ""), label="wanted at the peak")
    left.bar(x, states, bottom=wanted - states, **look("optimizer", ""), label="of it states that can be paged")
    left.axhline(gpu_gib, color="black", linestyle="--", label=f"card {gpu_gib:.2f} GiB")
    low, high = min(*wanted, gpu_gib), max(*wanted, gpu_gib)
    floor = max(0.0, low - max(2 * max(states), high - low, 0.05 * high))
    left.set(ylim=(floor, high + 0.55 * (high - floor)), ylabel="memory (GiB)" + (", axis cut" if floor else ""))
    moved_in, moved_out = ([getattr(record, k) / 2**20 for record in paged] for k in ("bytes_in", "bytes_out"))
    right.bar(x[: len(paged)] - 0.2, moved_out, 0.4, **look("optimizer", "//"), label="to RAM (evicted)")
    right.bar(x[: len(paged)] + 0.2, moved_in, 0.4, **look("NF4"), label="to the card (faults)")
    right.set(xlim=(0.4, len(steps) + 0.6), ylim=(0, 1.5 * max(*moved_in, *moved_out, 1)), ylabel="moved (MiB)")
    seconds = max(record.seconds(gb_per_s) for record in paged)
    survives = {"Not paged": "survives", "Paged": f"survives, {seconds:.2g} s for the transfers"}
    for ax, records, (way, well) in zip((left, right), (plain, paged), survives.items()):
        end = well if records[-1].survived else f"out of memory in step {len(records)}"  # the record after it is not made
        ax.set_title(f"{way}: {end}", fontsize=11)
        ax.legend(fontsize=8, loc="upper left")
        ax.locator_params(axis="y", nbins=5)  # few ticks: text is what takes time in a redraw
        ax.set(xticks=x, xlabel="step (1)")
    return fig


def sweep_moved(n_pages: int, room: int, sweeps: int = 3) -> int:
    """Pages moved (both ways) in the last of several passes over all pages, with room for so many on the card."""
    memory = paging.UnifiedMemory(room)
    for _ in range(sweeps):
        before = memory.pages_in + memory.pages_out
        for page in range(n_pages):
            memory.touch(page)
    return memory.pages_in + memory.pages_out - before


@kit_style()
def plot_thrashing(n_pages: int, state_gib: float, gb_per_s: float) -> Figure:
    """Bytes moved a step over the room left for the states: least-recently-used against the least that is possible.

    Args:
        n_pages: pages that the optimizer touches, one after another, in every step.
        state_gib: what they hold (GiB).
        gb_per_s: bandwidth (10^9 bytes a second).
    """
    near = {n_pages - 1, n_pages, n_pages + max(1, n_pages // 10)}
    rooms = sorted({max(1, round(f * n_pages / 20)) for f in range(1, 21)} | near - {0})
    moved = [sweep_moved(n_pages, room) / n_pages * state_gib for room in rooms]
    least = [2 * max(0, n_pages - room) / n_pages * state_gib for room in rooms]
    _, ax = new_figure()
    x = [100 * room / n_pages for room in rooms]
    ax.plot(x, moved, MARKERS["optimizer"] + "-", color=COLOURS["optimizer"], label="least recently used")
    ax.plot(x, least, "o--", color=COLOURS["16-bit"], markersize=3, label="only what does not fit")
    ax.set_ylim(0, 1.15 * max(*moved, 1e-9))
    seconds = max(moved) * GIB / gb_per_s / 1e9
    title = f"One page short moves everything: {max(moved):.3g} GiB, {seconds:.2g} s a step"
    title = title if max(moved) else "One page holds all states: nothing to move"
    return finish(ax, title, "room for the states (% of their size)", "moved in a step (GiB)", legend="lower left")


@kit_style()
def plot_state_bytes(measured: dict[str, dict[str, int]]) -> Figure:
    """Bytes of optimizer states by optimizer, stacked by kind.

    Args:
        measured: optimizer name → kind of tensor → bytes.
    """
    kinds = list(dict.fromkeys(kind for parts in measured.values() for kind in parts))
    _, ax = new_figure(figsize=(8.0, 3.2))
    looks = dict(zip(kinds, (look("optimizer"), look("other", "//"), look("16-bit"))))
    totals = stacked_bars(ax, measured, looks, 2**20, lambda total: f" {total:.2f} MiB")
    ax.set_xlim(0, 1.2 * max(totals))
    ax.invert_yaxis()
    title = f"8-bit states are {max(totals) / min(totals):.2f} times smaller, scales counted"
    return finish(ax, title, "states of one block (MiB)", "optimizer (name)", legend="lower right")


def explore_step(pythia: str, r: int, tokens: int, gpu_gib: float):
    """`plot_step` under controls for size, rank, tokens and state width; the card stays."""
    return explore(
        lambda pythia, r, tokens, bits: plot_step(pythia, r, tokens, gpu_gib, bits),
        pythia=choice("Pythia", list(PYTHIA), pythia),
        r=choice_slider("rank r", sorted({1, 4, 8, 16, 32, 64, 128, 256, r}), r),
        tokens=choice_slider("tokens in a pass", sorted({128, 512, 1024, 2048, 4096, 8192, 16384, tokens}), tokens),
        bits=choice("optimizer states (bits)", [32, 8], 32),
    )


def explore_run(pythia: str, r: int, usual: int, spike: int, gpu_gib: float):
    """`plot_run` under sliders for the card (around the given one, by a few times the paged states) and the bus."""
    span = max(0.02 * gpu_gib, 3 * ledger.step_sizes(pythia, r, usual).paged / GIB)
    return explore(
        lambda gpu_gib, gb_per_s: plot_run(pythia, r, usual, spike, gpu_gib=gpu_gib, gb_per_s=gb_per_s),
        gpu_gib=float_slider("card (GiB)", gpu_gib, max(gpu_gib - span, gpu_gib / 10), gpu_gib + span, span / 40),
        gb_per_s=choice_slider("bus (GB/s)", [3.0, 6.0, 12.0, 25.0, 50.0], 12.0),
    )
