"""What the figures of notebook 05 show, beside published sizes and plain loops."""

from __future__ import annotations

import ast
import math
import re
from dataclasses import replace

import artists
import nbformat
import numpy as np
import pytest
from conftest import NOTEBOOKS
from pythias import PYTHIAS, adapter_numels, frozen_bytes, state_bytes

from qlora_nb import cards
from qlora_nb.lessons import n05
from qlora_nb.memory import budget, dry_run, estimates, ledger, step_sizes
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs
from qlora_nb.settings import validate
from qlora_nb.theory import paging
from qlora_nb.ui import charts, checks

MIB = 2**20
GIB = 2**30
PAGE = 2 * MIB
EXACT = 1e-12
"""Double precision in another order of the same few operations."""


# one step


PARTS = [
    "frozen weights",
    "LoRA weights",
    "gradients",
    "states, not paged",
    "states, paged",
    "kept for the backward pass",
    "working memory",
]
"""Bottom to top."""


def step_by_hand(size: str, r: int, tokens: int, bits: int) -> list[tuple[str, list[float]]]:
    """(phase, bytes of each of `PARTS`) of every moment of a step.

    What a layer needs while it works comes from the dry run.
    """
    n_layers, hidden, _ = PYTHIAS[size]
    dry = dry_run.dry_run(Plan(configs.pythia_config(size), length=tokens, r=r))
    weights = frozen_bytes(size)
    adapter = 4 * sum(adapter_numels(size, r))
    paged, fixed = state_bytes(size, r, bits)
    kept = 2 * tokens * hidden  # a layer's input in 16 bit
    moments = []
    for i in range(n_layers):
        now = [weights, adapter, 0, fixed, paged, (i + 1) * kept, dry.forward]
        moments.append(("forward", now))
    moments.append(("loss", [weights, adapter, 0, fixed, paged, n_layers * kept, dry.loss]))
    for i in range(n_layers):
        gradients = adapter * i / n_layers
        now = [weights, adapter, gradients, fixed, paged, (n_layers - i) * kept, dry.backward]
        moments.append(("backward", now))
    moments.append(("optimizer", [weights, adapter, adapter, fixed, paged, 0, 0]))
    return moments


STEPS = [  # size, r, tokens, card (GiB), bits, is the card's line drawn?, is the axis cut?
    ("14m", 8, 128, 24.0, 32, False, False),
    ("12b", 16, 2048, 8.5, 32, True, True),
    ("12b", 64, 512, 6.0, 8, True, True),
    ("410m", 32, 1024, 1.0, 8, True, False),
]


@pytest.mark.parametrize(("size", "r", "tokens", "card", "bits", "line", "cut"), STEPS)
def test_step_stacks_the_parts_moment_by_moment(size, r, tokens, card, bits, line, cut):
    ax = n05.plot_step(size, r, tokens, card, bits).axes[0]
    moments = step_by_hand(size, r, tokens, bits)
    assert len(ax.collections) == len(PARTS)
    last = len(moments) - 1
    for i, (_, now) in enumerate(moments):
        x = i + 0.1 if i < last else i - 0.1
        end = 0.0
        for area, part in zip(ax.collections, now, strict=True):
            # the rotary frequencies are left out by hand: some hundred bytes of the weights
            begin, end = end, end + part / GIB
            assert artists.span(area, x) == pytest.approx((begin, end), rel=1e-5)
    n_layers = PYTHIAS[size][0]
    *card_line, loss, backward, optimizer = artists.lines(ax)
    for mark, at in ((loss, n_layers), (backward, n_layers + 1), (optimizer, 2 * n_layers + 1)):
        assert mark.tolist() == [[at - 0.5, 0], [at - 0.5, 1]], "where a phase begins"
    names = [area.get_label() for area in ax.collections]
    assert names == PARTS
    key = list(reversed(PARTS))
    if line:
        (at_the_card,) = card_line
        assert at_the_card.tolist() == [[0, card], [1, card]]
        key.insert(0, f"card {card:g} GiB")
    else:
        assert not card_line
    assert artists.legend(ax) == key
    middles = [(n_layers - 1) / 2, n_layers, n_layers + 1 + (n_layers - 1) / 2, 2 * n_layers + 1]
    phases = ["forward", "loss ", "backward", "  optimizer"]
    assert artists.ticks(ax.xaxis) == list(zip(middles, phases))
    assert ax.get_xlim() == (-0.5, last + 0.5)
    words = "memory (GiB), axis cut" if cut else "memory (GiB)"
    assert artists.labels(ax) == ("one step (layer by layer)", words)


@pytest.mark.parametrize(("size", "r", "tokens", "card", "bits", "line", "cut"), STEPS)
def test_step_tells_its_peak_and_whether_it_fits(size, r, tokens, card, bits, line, cut):
    ax = n05.plot_step(size, r, tokens, card, bits).axes[0]
    moments = step_by_hand(size, r, tokens, bits)
    totals = [sum(now) / GIB for _, now in moments]
    peak = max(totals)
    phase = moments[totals.index(peak)][0]
    fits = "fits" if peak <= card else "does not fit"
    words = f"pythia-{size}, r = {r}, {tokens:,} tokens: peak {peak:.2f} GiB ({phase})"
    assert artists.title(ax) == f"{words}, {fits} {card:g} GiB"
    low, high = ax.get_ylim()
    assert peak < high
    highest = peak
    if line:
        assert low < card < high
        highest = max(peak, card)
    else:
        assert high < card
    if cut:
        assert 0 < low < moments[0][1][0] / GIB, "the cut leaves a part of the weights"
    else:
        assert low == 0
    assert high - low < 1.5 * (highest - low), "most of the axes is used"


def test_steps_are_drawn_that_fit_and_that_do_not():
    """Else the title above would have been tested with one word alone."""
    found = set()
    for size, r, tokens, card, bits, _, _ in STEPS:
        title = artists.title(n05.plot_step(size, r, tokens, card, bits).axes[0])
        found.add("does not fit" in title)
    assert found == {True, False}


# which states are paged


@pytest.mark.parametrize(
    ("ranks", "size", "r"), [((4, 16, 64), "12b", 16), ([8, 32], "410m", 32), ((1, 128), "1b", 128)]
)
def test_paged_share_is_a_table_with_the_readers_cell_framed(ranks, size, r):
    ax = n05.plot_paged_share(ranks, size, r).axes[0]
    expected = []
    for each in PYTHIAS:
        splits = [state_bytes(each, rank) for rank in ranks]
        expected.append([100 * paged / (paged + fixed) for paged, fixed in splits])
    (image,) = artists.images(ax)
    assert image == pytest.approx(np.array(expected), rel=EXACT)
    assert 16 not in ranks or image[-1, ranks.index(16)] == 68.75, "pythia-12b, as notebook 05 says"
    assert ax.images[0].get_clim() == (0, 130)
    texts = []
    places = []
    for i, row in enumerate(expected):
        for j, share in enumerate(row):
            texts.append(f"{share:.0f}")
            places.append([j, i])
    assert artists.texts(ax) == texts
    assert artists.places(ax).tolist() == places
    assert artists.ticks(ax.xaxis) == [(j, str(rank)) for j, rank in enumerate(ranks)]
    assert artists.ticks(ax.yaxis) == list(enumerate(PYTHIAS))
    (frame,) = ax.patches
    column = list(ranks).index(r)
    row = list(PYTHIAS).index(size)
    assert frame.get_bbox().get_points().tolist() == [
        [column - 0.5, row - 0.5],
        [column + 0.5, row + 0.5],
    ]
    assert not frame.get_fill(), "the number in it can be read"
    assert frame.get_edgecolor() == (0, 0, 0, 1)
    words = f"{expected[row][column]:.0f} % of the state bytes are paged"
    assert artists.title(ax) == f"pythia-{size}, r = {r}: {words}"
    assert artists.labels(ax) == ("rank r", "Pythia (size)")
    artists.check_in_view(ax)


# a run of steps


def totals_of(s: paging.StepSizes) -> list[int]:
    """Bytes wanted at every moment of a step."""
    base = s.weights + s.adapter + s.paged + s.fixed
    found = []
    for i in range(s.n_layers):
        found.append(base + (i + 1) * s.kept + s.forward)
    found.append(base + s.n_layers * s.kept + s.loss)
    for i in range(s.n_layers):
        found.append(base + (s.n_layers - i) * s.kept + s.backward + s.gradients * i // s.n_layers)
    found.append(base + s.gradients)
    return found


def run_by_hand(steps: list[paging.StepSizes], budget: int) -> tuple[list[int], list[int], bool]:
    """Bytes to RAM and back in every step, least recently used first, and whether all survive; in
    the step that does not none are counted.
    """
    on_card = []  # pages, least recently used first
    seen = set()
    out = []
    back = []
    for s in steps:
        out.append(0)
        back.append(0)
        for total in totals_of(s):
            room = budget // PAGE - math.ceil((total - s.paged) / PAGE)
            if room < 0:
                return [*out[:-1], 0], [*back[:-1], 0], False
            while len(on_card) > room:
                on_card.pop(0)
                out[-1] += PAGE
        for page in range(math.ceil(s.paged / PAGE)):
            if page in on_card:
                on_card.remove(page)
            else:
                if room == 0:
                    return [*out[:-1], 0], [*back[:-1], 0], False
                if len(on_card) == room:
                    on_card.pop(0)
                    out[-1] += PAGE
                if page in seen:
                    back[-1] += PAGE
            seen.add(page)
            on_card.append(page)
    return out, back, True


MEMORY = {
    "weights": 20 * MIB,
    "adapter": 2 * MIB,
    "gradients": 2 * MIB,
    "paged": 12 * MIB,
    "fixed": MIB,
    "kept": MIB,
    "forward": 2 * MIB,
    "backward": 3 * MIB,
    "loss": 4 * MIB,
}
USUAL = paging.StepSizes(n_layers=2, **MEMORY)
SPIKE = replace(USUAL, kept=4 * MIB)
RUNS = {  # what happens: steps, card (MiB), steps without paging, steps with paging
    "all fits": ([USUAL, USUAL], 60, 2, 2),
    "a spike": ([USUAL, USUAL, SPIKE, USUAL], 43, 3, 4),
    "never room for all states": ([USUAL, SPIKE, USUAL], 37, 1, 3),
    "too large a spike": ([USUAL, USUAL, replace(SPIKE, kept=20 * MIB), USUAL], 43, 3, 3),
    "nothing is paged": ([replace(USUAL, paged=0), replace(SPIKE, paged=0)], 26, 1, 1),
}


@pytest.mark.parametrize("what", RUNS)
def test_run_shows_what_is_wanted_beside_the_card(what):
    steps, card_mib, n_plain, _ = RUNS[what]
    card = card_mib / 1024
    ax = n05.plot_run(steps, card).axes[0]
    wanted = [max(totals_of(s)) / GIB for s in steps]
    states = [s.paged / GIB for s in steps]
    whole, paged = artists.bars(ax)
    assert whole[:, 3] == pytest.approx(wanted)
    assert whole[:, 1].tolist() == [0] * len(steps)
    assert paged[:, 3] == pytest.approx(states)
    assert paged[:, 1] == pytest.approx([w - s for w, s in zip(wanted, states)]), "on top"
    numbers = list(range(1, len(steps) + 1))
    for group in (whole, paged):
        assert group[:, 0] + group[:, 2] / 2 == pytest.approx(numbers)
    (line,) = artists.lines(ax)
    assert line.tolist() == [[0, card], [1, card]]
    end = "survives" if wanted[n_plain - 1] <= card else f"out of memory in step {n_plain}"
    assert artists.title(ax) == f"Not paged: {end}"
    key = ["wanted at the peak", "of it states that can be paged"]
    assert artists.legend(ax) == [f"card {card:.2f} GiB", *key]
    assert [place for place, _ in artists.ticks(ax.xaxis)] == numbers
    low, high = ax.get_ylim()
    assert low == 0 or low < min(paged[:, 1]), "what is cut off is no state"
    assert max(*wanted, card) < high < 2 * max(*wanted, card)
    words = "memory (GiB), axis cut" if low > 0 else "memory (GiB)"
    assert artists.labels(ax) == ("step", words)
    artists.check_in_view(ax)


@pytest.mark.parametrize("gb_per_s", [12.0, 0.05])
@pytest.mark.parametrize("what", RUNS)
def test_run_shows_what_is_moved(what, gb_per_s):
    steps, card_mib, _, n_paged = RUNS[what]
    ax = n05.plot_run(steps, card_mib / 1024, gb_per_s).axes[1]
    out, back, survives = run_by_hand(steps, card_mib * MIB)
    assert len(out) == n_paged
    evicted, fetched = artists.bars(ax)
    assert evicted[:, 3] == pytest.approx([n / MIB for n in out])
    assert fetched[:, 3] == pytest.approx([n / MIB for n in back])
    numbers = np.arange(n_paged) + 1
    for group in (evicted, fetched):
        assert group[:, 1].tolist() == [0] * n_paged
        assert group[:, 2] == pytest.approx(0.4)
    assert evicted[:, 0] + 0.4 == pytest.approx(numbers), "side by side at the step's number"
    assert fetched[:, 0] == pytest.approx(numbers)
    if survives:
        most = max(there + here for there, here in zip(out, back))
        seconds = most / (gb_per_s * 1e9)
        end = f"survives, {seconds:.2g} s for the transfers"
    else:
        end = f"out of memory in step {n_paged}"
    assert artists.title(ax) == f"Paged: {end}"
    assert artists.legend(ax) == ["to RAM (evicted)", "to the card (faults)"]
    assert artists.labels(ax) == ("step", "moved (MiB)")
    artists.check_in_view(ax)
    assert [place for place, _ in artists.ticks(ax.xaxis)] == list(range(1, len(steps) + 1))
    assert ax.get_xlim() == pytest.approx((0.4, len(steps) + 0.6))
    assert ax.get_ylim() == pytest.approx((0, 1.5 * max(*out, *back, MIB) / MIB))


def test_runs_move_bytes_both_ways_and_end_in_every_way():
    """The spike wants 35 MiB besides the states, 18 of 21 pages: of their 6 pages 3 go out."""
    moved = {what: run_by_hand(steps, card * MIB) for what, (steps, card, _, _) in RUNS.items()}
    assert moved["all fits"] == ([0, 0], [0, 0], True)
    assert moved["a spike"] == ([0, 0, 3 * PAGE, 0], [0, 0, 3 * PAGE, 0], True)
    assert max(moved["never room for all states"][1]) == 6 * PAGE
    assert not moved["too large a spike"][2]


def test_run_of_a_pythia_survives_where_the_states_can_leave():
    steps = []
    for tokens in (16_000, 16_000, 16_000, 17_500, 16_000):
        steps.append(step_sizes.step_sizes("12b", 64, tokens))
    left, right = n05.plot_run(steps, gpu_gib=24.0).axes
    assert artists.title(left) == "Not paged: out of memory in step 4"
    assert artists.title(right).startswith("Paged: survives, ")
    told = n05.plot_run(steps, 24.0, gb_per_s=12.0).axes[1]
    assert artists.title(right) == artists.title(told), "a bus of 12 GB/s unless told"


# thrashing


@pytest.mark.parametrize(("n_pages", "room"), [(10, 9), (10, 10), (10, 1), (7, 3), (1, 1), (4, 9)])
def test_a_sweep_moves_everything_or_nothing(n_pages, room):
    """Least recently used out first: the page that is touched next has always just gone out."""
    moved = 2 * n_pages if room < n_pages else 0
    assert n05.sweep_moved(n_pages, room) == moved


THRASHING = [(200 * MIB, 12.0), (61 * MIB, 3.0), (2**22 + 1, 0.5)]


@pytest.mark.parametrize(("paged_bytes", "gb_per_s"), THRASHING)
def test_thrashing_is_all_or_nothing_beside_what_does_not_fit(paged_bytes, gb_per_s):
    ax = n05.plot_thrashing(paged_bytes, gb_per_s).axes[0]
    n_pages = math.ceil(paged_bytes / PAGE)
    moved, least = artists.lines(ax)
    rooms = (moved[:, 0] * n_pages / 100).round().astype(int).tolist()
    assert rooms == sorted(set(rooms))
    assert rooms[0] <= max(1, 0.1 * n_pages)
    assert {n_pages - 1, n_pages} <= set(rooms), "the step from one page short to enough"
    assert rooms[-1] >= 1.05 * n_pages or n_pages < 20
    for line in (moved, least):
        assert line[:, 0] == pytest.approx([100 * room / n_pages for room in rooms])
    whole = 2 * paged_bytes / GIB
    for room, all_moved, little in zip(rooms, moved[:, 1], least[:, 1]):
        missing = max(0, n_pages - room)
        assert all_moved == pytest.approx(whole if missing else 0)
        assert little == pytest.approx(whole * missing / n_pages)
    seconds = 2 * paged_bytes / (gb_per_s * 1e9)
    words = f"{whole:.3g} GiB, {seconds:.2g} s a step"
    assert artists.title(ax) == f"One page short moves all of it out and in: {words}"
    assert artists.legend(ax) == ["least recently used", "only what does not fit"]
    axis = ("room for the paged states (% of their size)", "moved in a step (GiB)")
    assert artists.labels(ax) == axis
    artists.check_in_view(ax)
    assert ax.get_ylim() == pytest.approx((0, 1.15 * whole))
    assert ax.lines[1].get_linestyle() == "--", "told apart without colour"


@pytest.mark.parametrize(
    ("paged_bytes", "why"),
    [(0, "None of these states is paged"), (100_000, "One page holds all paged states")],
)
def test_thrashing_says_when_there_is_nothing_to_move(paged_bytes, why):
    ax = n05.plot_thrashing(paged_bytes, 12.0).axes[0]
    for line in artists.lines(ax):
        assert line.tolist() == [[100, 0]]
    assert artists.title(ax) == f"{why}: nothing to move"


# ways to make a step smaller


def cell_with(words: str) -> str:
    """The code cell of the notebook that holds these words."""
    cells = nbformat.read(NOTEBOOKS / "05_paged_optimizers.ipynb", 4).cells
    [source] = [c.source for c in cells if c.cell_type == "code" and words in c.source]
    return source


def ways_side_by_side(pythia: str, capsys) -> tuple:
    """The figure as the notebook draws it, and what it prints."""
    space = {
        "budget": budget,
        "cards": cards,
        "charts": charts,
        "compare_guess": checks.compare_guess,
        "estimates": estimates,
        "guess_saved": None,
        "ledger": ledger,
        "replace": replace,
        "settings": validate({"pythia": pythia}),
        "steps": [step_sizes.step_sizes(pythia, 64, 2048)],
    }
    lines = cell_with("guess_kept, ").splitlines()
    plan = "\n".join(line for line in lines if line.startswith(("config = ", "plan = ")))
    space |= {"Plan": Plan, "configs": configs}
    exec(plan, space)
    exec(cell_with("plans = {"), space)
    *before, last = ast.parse(cell_with("charts.memory_bars(")).body
    exec(compile(ast.Module(before, []), "05", "exec"), space)
    figure = eval(compile(ast.Expression(last.value), "05", "eval"), space)
    return figure, capsys.readouterr().out


@pytest.mark.parametrize("size", ["12b", "1b"])
def test_ways_side_by_side_by_hand(size, capsys):
    figure, said = ways_side_by_side(size, capsys)
    (ax,) = figure.axes
    ways = [text for _, text in artists.ticks(ax.yaxis)]
    both = "checkpointing, accumulation"
    alone = ["nothing done", "paging", "8-bit states", "accumulation", "checkpointing"]
    assert ways == [*alone, both, f"{both}, paging"]
    unit = 2**30
    parts = {}
    for group in ax.containers:
        parts[group.get_label()] = [bar.get_width() * unit for bar in group]
    n_layers, hidden, _ = PYTHIAS[size]
    kept = dict(zip(ways, parts["kept for the backward pass"]))
    inputs = n_layers * 4 * 512 * hidden * 2
    assert kept["checkpointing"] == pytest.approx(inputs, rel=1e-6)
    assert kept[both] == kept[f"{both}, paging"] == pytest.approx(inputs / 4, rel=1e-6)
    assert kept["nothing done"] == kept["paging"] == kept["8-bit states"] > 15 * inputs
    assert kept["accumulation"] == pytest.approx(kept["nothing done"] / 4, rel=1e-6)
    states = dict(zip(ways, parts["optimizer states"]))
    paged, fixed = state_bytes(size, 64)
    assert paged > 0.9 * fixed
    counters = 4 * len(adapter_numels(size, 64))  # torch's AdamW has one for each tensor
    for way in ("nothing done", "accumulation", "checkpointing", both):
        assert states[way] == pytest.approx(paged + fixed + counters, rel=1e-9)
    assert states["paging"] == states[f"{both}, paging"] == pytest.approx(fixed)
    assert states["8-bit states"] == pytest.approx(sum(state_bytes(size, 64, 8)) + 2048)
    trained = 4 * sum(adapter_numels(size, 64))
    gradients = dict(zip(ways, parts["gradients"]))
    assert gradients["accumulation"] == pytest.approx(trained), "kept between the passes"
    assert gradients["nothing done"] == 0
    assert parts["LoRA weights"] == pytest.approx([trained] * len(ways))
    ends = np.sum(list(parts.values()), axis=0)
    assert artists.texts(ax) == [f" {end / unit:.2f}" for end in ends]
    for way, end in zip(ways, ends):
        saved = (ends[0] - end) / unit
        case = " if the card is full" if way.endswith("paging") else ""
        assert re.search(rf"^{way} +saves +{saved:.2f} GiB{case}$", said, re.M)
    assert "checkpointing: operations × 1." in said
    seconds = 2 * paged / 12e9
    assert f"{seconds:.2f} s for the way out and back" in said


# all of them


def test_every_figure_can_be_drawn_and_is_closed():
    artists.check_drawn(n05.plot_step("14m", 8, 128, 24.0))
    artists.check_drawn(n05.plot_paged_share((4, 8), "14m", 8))
    artists.check_drawn(n05.plot_run([USUAL, SPIKE], 37 / 1024))
    artists.check_drawn(n05.plot_thrashing(0, 12.0))
    artists.check_drawn(n05.plot_thrashing(100_000, 12.0))
    artists.check_drawn(n05.plot_thrashing(200 * MIB, 12.0))
