"""What the figures of notebook 08 show, beside plain arithmetic; and the record behind them, its
summary computed another way.
"""

from __future__ import annotations

import itertools
import json
import math

import artists
import nbformat
import numpy as np
import pytest
import torch
from conftest import NOTEBOOKS, ROOT

from qlora_nb import recorded
from qlora_nb.lessons import n08
from qlora_nb.ui import style

RECORD = json.loads((recorded.FOLDER / "optimizers.json").read_text(encoding="utf-8"))
CLAIMS = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
CELLS = nbformat.read(NOTEBOOKS / "08_optimizers.ipynb", 4).cells
RUNS = list(RECORD["runs"].values())
RACE = RECORD["summary"]["race"]
T_975 = {2: 4.302653, 4: 2.776445}
"""Student's t of a two-sided 95 % interval, by degrees of freedom (any table of it)."""


def test_estimates_are_drawn_over_the_exact_ones():
    exact = torch.tensor([1.0, 2.0, 4.0, 8.0])
    drawn = {1: exact * 1.5, 10: exact * torch.tensor([1.1, 1.1, 0.9, 0.9]), 1000: exact.clone()}
    figure = n08.estimates(exact, drawn)
    titles = [artists.title(ax) for ax in figure.axes]
    assert titles == ["1 draw: off by 50 %", "10 draws: off by 10 %", "1,000 draws: off by 0 %"]
    for ax, estimate in zip(figure.axes, drawn.values(), strict=True):
        equal, marks = artists.lines(ax)
        assert np.allclose(equal, np.column_stack([exact, exact]))
        assert np.allclose(marks, np.column_stack([exact, estimate]))
        assert ax.lines[1].get_linestyle() == "None"
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert ax.get_xlabel() == "exact second derivative"
        artists.check_in_view(ax)
    assert figure.axes[0].get_ylabel() == "estimate"
    artists.check_drawn(figure)


def test_clipped_shares_are_drawn_in_per_cent():
    shares = {0.04: [0.5, 1.0, 1.0], 5.0: [0.25, 0.75, 0.5], 50.0: [0.0, 0.125, 0.0]}
    figure = n08.clipped(shares)
    ax = figure.axes[0]
    drawn = [line.tolist() for line in artists.lines(ax)]
    assert drawn == [
        [[1, 50.0], [2, 100.0], [3, 100.0]],
        [[1, 25.0], [2, 75.0], [3, 50.0]],
        [[1, 0.0], [2, 12.5], [3, 0.0]],
    ]
    assert artists.legend(ax) == ["ρ = 0.04", "ρ = 5", "ρ = 50"]
    assert artists.labels(ax) == ("optimizer step", "clipped (%)")
    assert len({line.get_linestyle() for line in ax.lines}) == 3, "told apart without colour"
    artists.check_in_view(ax)
    artists.check_drawn(figure)


def test_rates_are_drawn_and_a_run_that_diverged_has_no_mark():
    groups = {
        "AdamW": {1e-3: 0.9, 1e-2: 0.3, 1e-1: None},
        "r = 1": {1e-3: 0.8, 1e-2: 0.4},
    }
    figure = n08.rates(groups)
    ax = figure.axes[0]
    assert [line.tolist() for line in artists.lines(ax)] == [
        [[1e-3, 0.9], [1e-2, 0.3]],
        [[1e-3, 0.8], [1e-2, 0.4]],
    ]
    assert artists.title(ax) == "Lowest: AdamW, 0.300 nats"
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(groups)
    assert len({line.get_marker() for line in ax.lines}) == 2, "told apart without colour"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.lines[0].get_color() == style.COLOURS["AdamW"]
    artists.check_in_view(ax)
    artists.check_drawn(figure)


def test_the_race_is_drawn_against_steps_seconds_and_bytes():
    curves = {"AdamW": {10: 2.0, 20: 1.0}, "Lion": {10: 1.5, 20: 0.5}}
    of_each = {
        "AdamW": {
            "seconds a step": 0.2,
            "state bytes": 8192,
            "loss": {"mean": 1.0, "low": 0.9, "high": 1.2},
        },
        "Lion": {
            "seconds a step": 0.1,
            "state bytes": 4096,
            "loss": {"mean": 0.5, "low": 0.4, "high": 0.7},
        },
    }
    figure = n08.race(curves, of_each)
    by_step, by_second, by_byte = figure.axes
    assert [line.tolist() for line in artists.lines(by_step)] == [
        [[10, 2.0], [20, 1.0]],
        [[10, 1.5], [20, 0.5]],
    ]
    assert [line.tolist() for line in artists.lines(by_second)] == [
        [[2.0, 2.0], [4.0, 1.0]],
        [[1.0, 1.5], [2.0, 0.5]],
    ]
    points = {}
    for container in by_byte.containers:
        [(x, y)] = np.column_stack(container.lines[0].get_data())
        [reach] = artists.segments(container.lines[2][0])
        points[x] = y, *reach[:, 1].round(9)
    assert points == {8.0: (1.0, 0.9, 1.2), 4.0: (0.5, 0.4, 0.7)}
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels == ["step", "time (s)", "optimizer states (KiB)"]
    assert by_step.get_ylabel() == "held-out loss (nats)"
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["AdamW", "Lion"]
    artists.check_drawn(figure)


# the record


def of(name: str, **wanted) -> list[dict]:
    """The runs of an optimizer with these values."""
    found = []
    for run in RUNS:
        if run["optimizer"] == name and all(run[key] == value for key, value in wanted.items()):
            found.append(run)
    return found


def best_runs(name: str) -> list[dict]:
    """Its best setting's five seeds."""
    setting = {"lr": RACE[name]["lr"], "rho": RACE[name]["rho"]}
    return sorted(of(name, steps=80, setup=None, **setting), key=lambda run: run["seed"])


def interval(values) -> tuple[float, float, float]:
    values = np.array(values)
    half = T_975[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def check_interval(found: dict, values) -> None:
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(interval(values), abs=2e-4)


def test_all_were_tried_at_the_same_rates_and_the_best_two_with_five_seeds():
    rates = RECORD["settings"]["rates"]
    assert set(RACE) == {"AdamW", "AdamW, 8-bit states", "Lion", "Muon", "Sophia-G"}
    for name, found in RACE.items():
        rhos = RECORD["settings"]["rhos"] if name == "Sophia-G" else [None]
        first = of(name, steps=80, setup=None, seed=0)
        assert {(run["lr"], run["rho"]) for run in first} == {(a, b) for a in rates for b in rhos}
        assert min(rates) < found["lr"] < max(rates), "the best rate is not at the grid's end"
        losses = sorted(first, key=lambda run: run["loss"] or math.inf)
        means = []
        for run in losses[:2]:
            five = of(name, steps=80, setup=None, lr=run["lr"], rho=run["rho"])
            assert sorted(run["seed"] for run in five) == [0, 1, 2, 3, 4]
            means.append(np.mean([run["loss"] for run in five]))
        chosen = np.mean([run["loss"] for run in best_runs(name)])
        assert chosen == pytest.approx(min(means))


@pytest.mark.parametrize("name", RACE)
def test_the_summary_is_that_of_its_runs(name):
    losses = [run["loss"] for run in best_runs(name)]
    adamw = [run["loss"] for run in best_runs("AdamW")]
    check_interval(RACE[name]["loss"], losses)
    check_interval(RACE[name]["minus AdamW"], np.subtract(losses, adamw))
    assert RACE[name]["state bytes"] == best_runs(name)[0]["state bytes"]


def worth(loss: float, ladder: list[tuple[int, float]]) -> float:
    """AdamW's steps to this loss: the first piece of the ladder that reaches it."""
    ladder = sorted(ladder)
    if loss >= ladder[0][1]:
        return ladder[0][0]
    for (early, above), (late, below) in itertools.pairwise(ladder):
        if loss >= below:
            share = math.log(above / loss) / math.log(above / below)
            return early * (late / early) ** share
    return ladder[-1][0]


@pytest.mark.parametrize("name", RACE)
def test_speeds_are_read_from_adamws_ladder(name):
    speeds = []
    for run in best_runs(name):
        rungs = of("AdamW", lr=RACE["AdamW"]["lr"], seed=run["seed"], setup=None)
        ladder = [(rung["steps"], rung["loss"]) for rung in rungs]
        assert sorted(steps for steps, _ in ladder) == [20, 40, 80, 160]
        falling = [loss for _, loss in sorted(ladder)]
        assert falling == sorted(falling, reverse=True), "more steps end lower"
        speeds.append(worth(run["loss"], ladder) / 80)
    check_interval(RACE[name]["AdamW's steps a step"], speeds)
    if name == "AdamW":
        assert speeds == pytest.approx([1] * 5)


@pytest.mark.parametrize("name", RACE)
def test_half_the_steps_beside_all_of_adamws(name):
    setting = {"lr": RACE[name]["lr"], "rho": RACE[name]["rho"]}
    half = sorted(of(name, steps=40, setup=None, **setting), key=lambda run: run["seed"])
    adamw = [run["loss"] for run in best_runs("AdamW")]
    found = RECORD["summary"]["half the steps minus AdamW's all"][name]
    check_interval(found, np.subtract([run["loss"] for run in half], adamw))


def test_ranks_and_targets_are_summed_up_from_their_runs():
    made = [run for run in RUNS if run["setup"]]
    assert len(made) <= 30
    for setup, found in RECORD["summary"]["setups"].items():
        name = None if setup == "r 8" else setup
        runs = of("AdamW", setup=name, lr=found["lr"], steps=80)[:3]
        assert sorted(run["seed"] for run in runs) == [0, 1, 2]
        check_interval(found["loss"], [run["loss"] for run in runs])
        assert {run["trained"] for run in runs} == {found["trained"]}


def test_states_have_the_bytes_of_their_numbers():
    for run in RUNS:
        per_number = run["state bytes"] / run["trained"]
        if run["optimizer"] in ("Lion", "Muon"):
            assert per_number == 4
        elif run["optimizer"] == "AdamW, 8-bit states":
            assert 2 < per_number < 8  # small tensors stay in 32 bit
        else:
            assert per_number == 8


def test_the_claim_says_what_the_record_says():
    [row] = [line for line in CLAIMS.splitlines() if "recorded/optimizers.json" in line]
    speed = RACE["Sophia-G"]["AdamW's steps a step"]
    words = (
        f"{speed['mean']:.2f} of AdamW's (95 % interval {speed['low']:.2f} to {speed['high']:.2f})"
    )
    assert words in row
    for name in ("Lion", "Muon", "AdamW, 8-bit states"):
        assert RACE[name]["minus AdamW"]["low"] < 0 < RACE[name]["minus AdamW"]["high"]
    untuned = RECORD["summary"]["AdamW at 2e-4"]["mean"] / RACE["AdamW"]["loss"]["mean"]
    assert "ten times the loss" in row
    assert round(untuned) == 10


def test_what_notebook_08_says_of_the_record():
    """Each sentence of steps 5 to 7 that a number carries."""
    text = "\n".join(c.source for c in CELLS if c.cell_type == "markdown")
    assert "Sophia-G ends clearly higher, and its 80 steps are worth fewer" in text
    assert RACE["Sophia-G"]["minus AdamW"]["low"] > 0
    assert RACE["Sophia-G"]["AdamW's steps a step"]["high"] < 1
    assert "Muon's lies at a rate three times as high as AdamW's, Sophia's at a third of it" in text
    assert RACE["Muon"]["lr"] / RACE["AdamW"]["lr"] == pytest.approx(10 / 3)
    assert RACE["AdamW"]["lr"] / RACE["Sophia-G"]["lr"] == pytest.approx(3)
    assert "one at which most numbers, or all, are clipped" in text
    assert RACE["Sophia-G"]["clipped (share)"] > 0.5
    best = {}
    for run in of("Sophia-G", steps=80, setup=None, seed=0):
        best[run["rho"]] = min(best.get(run["rho"], math.inf), run["loss"])
    smallest, second, third, largest = (best[rho] for rho in sorted(best))
    assert "At the smallest two ρ the best losses are nearly the same" in text
    assert second / smallest == pytest.approx(1, abs=0.05)
    assert largest > third > 1.1 * second, "and larger ρ are worse at their best rate"
    assert "A quarter of the steps at the tuned rate ends far below all of them" in text
    twenty = np.mean([run["loss"] for run in of("AdamW", steps=20)])
    assert twenty < 0.5 * RECORD["summary"]["AdamW at 2e-4"]["mean"]
    setups = RECORD["summary"]["setups"]
    assert "full tuning at a tenth of it" in text
    assert setups["r 8"]["lr"] / setups["full tuning"]["lr"] == pytest.approx(10)
    ranks = [setups[name] for name in ("r 1", "r 8", "r 64")]
    assert "The three ranks have their valley at the same rate" in text
    assert len({found["lr"] for found in ranks}) == 1
    assert "The ranks cannot be told apart" in text
    ends = [(found["loss"]["low"], found["loss"]["high"]) for found in ranks]
    assert max(low for low, _ in ends) < min(high for _, high in ends)
    assert "Full tuning ends lower than any adapter" in text
    lowest = min(found["loss"]["mean"] for found in setups.values())
    assert setups["full tuning"]["loss"]["mean"] == lowest
    assert "attention alone, with fewer numbers, ends lower than the feed-forward part" in text
    attention, feed_forward = setups["attention only"], setups["feed-forward only"]
    assert attention["trained"] < feed_forward["trained"]
    assert attention["loss"]["mean"] < feed_forward["loss"]["mean"]
