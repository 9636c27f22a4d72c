"""What the figures of notebook 02 show, beside numpy's SVD and plain arithmetic."""

from __future__ import annotations

import artists
import numpy as np
import pytest
import torch

from qlora_nb.lessons import n02
from qlora_nb.theory import lora

SINGLE = 1e-5
"""The kit computes in float32, the test in float64."""


# losses


def test_losses_are_drawn_step_by_step():
    losses = {"B zero": [1.0, 0.5, 0.25], "both zero": [2.0, 2.0, 2.0], "both random": [3.0, 1.5]}
    ax = n02.plot_losses(losses, "starts 3 times worse").axes[0]
    assert artists.title(ax) == "starts 3 times worse"
    assert artists.legend(ax) == ["B zero", "both zero", "both random"]
    assert artists.labels(ax) == ("step", "mean squared error")
    artists.check_in_view(ax)
    drawn = [line.tolist() for line in artists.lines(ax)]
    assert drawn == [
        [[0, 1.0], [1, 0.5], [2, 0.25]],
        [[0, 2.0], [1, 2.0], [2, 2.0]],
        [[0, 3.0], [1, 1.5]],
    ]
    assert ax.get_yscale() == "log"
    styles = {line.get_linestyle() for line in ax.lines}
    assert len(styles) == 3, "told apart without colour"


# captured energy


def energy_shares(update: np.ndarray) -> list[float]:
    """Cumulative share of the squared entries that the best matrix of every rank holds."""
    squares = np.linalg.svd(update, compute_uv=False) ** 2
    shares = []
    for r in range(1, len(squares) + 1):
        shares.append(sum(squares[:r]) / sum(squares))
    return shares


@pytest.mark.parametrize(("r", "marked"), [(2, 2), (8, 8), (64, 12)])
def test_captured_energy_is_drawn_over_the_rank(r, marked):
    generator = np.random.default_rng(0)
    updates = {"this update": generator.normal(size=(12, 3)) @ generator.normal(size=(3, 20))}
    updates["this update"] += 0.1 * generator.normal(size=(12, 20))
    updates["random"] = generator.normal(size=(12, 20))
    shares = {name: energy_shares(update) for name, update in updates.items()}
    curves = {}
    for name, update in updates.items():
        curves[name] = lora.captured_energy(torch.tensor(update))
    ax = n02.plot_captured(curves, r).axes[0]
    *drawn, point, mark = artists.lines(ax)
    assert len(drawn) == 2
    for line, expected in zip(drawn, shares.values()):
        assert line[:, 0].tolist() == list(range(1, 13))
        assert line[:, 1] == pytest.approx([100 * share for share in expected], rel=SINGLE)
    held = 100 * shares["this update"][marked - 1]
    assert point == pytest.approx(np.array([[marked, held]]), rel=SINGLE)
    assert mark[:, 0].tolist() == [marked, marked]
    assert mark[:, 1].tolist() == [0, 1], "from the bottom of the axes to the top"
    assert artists.title(ax) == f"Rank {marked} holds {held:.0f} % of this update"
    assert artists.legend(ax) == list(updates)
    assert artists.labels(ax) == ("rank r", "share of ΔW held (% of squares)")
    artists.check_in_view(ax)
    assert artists.ticks(ax.xaxis) == [(1, "1"), (2, "2"), (4, "4"), (8, "8")]
    assert ax.get_ylim() == (0, 104)


# the update and its best approximation


UPDATES = [((42, 38), 3), ((38, 42), 1), ((33, 33), 33), ((36, 40), 64)]


@pytest.mark.parametrize(("shape", "r"), UPDATES)
def test_update_shows_what_the_best_matrix_of_a_rank_leaves(shape, r):
    update = np.random.default_rng(1).normal(size=shape)
    u, s, v = np.linalg.svd(update, full_matrices=False)
    best = np.zeros(shape)
    for k in range(min(r, len(s))):
        best += s[k] * np.outer(u[:, k], v[k])
    left = 100 * np.sum((update - best) ** 2) / np.sum(update**2)
    tensor = torch.tensor(update, dtype=torch.float32)
    factors = lora.best_rank(tensor, min(shape))
    figure = n02.plot_update(tensor, factors, r)
    *axes, scale = figure.axes
    shown = [part[:32, :32] for part in (update, best, update - best)]
    for ax, expected in zip(axes, shown, strict=True):
        (image,) = artists.images(ax)
        assert image == pytest.approx(expected, abs=SINGLE)
        assert ax.images[0].get_clim() == (-2, 2)
        assert [place for place, _ in artists.ticks(ax.xaxis)] == [0, 16]
        assert [place for place, _ in artists.ticks(ax.yaxis)] == [0, 16]
        assert ax.get_xlabel() == "input (index)"
        artists.check_in_view(ax)
    assert axes[0].get_ylabel() == "output (index)"
    rank = min(r, *shape)
    titles = ["update ΔW", f"best of rank {rank}", f"left over: {left:.0f} %"]
    assert [artists.title(ax) for ax in axes] == titles
    assert scale.get_ylabel() == "change (std of ΔW)"
    assert [place for place, _ in artists.ticks(scale.yaxis)] == [-2, 0, 2]
    assert scale.get_ylim() == (-2, 2)


def test_update_shows_32_rows_and_columns():
    update = torch.tensor(np.random.default_rng(2).normal(size=(40, 48)), dtype=torch.float32)
    figure = n02.plot_update(update, lora.best_rank(update, 40), 2)
    (image,) = artists.images(figure.axes[0])
    assert np.array_equal(image, update[:32, :32].numpy())


# all of them


def test_every_figure_can_be_drawn_and_is_closed():
    update = torch.tensor(np.random.default_rng(3).normal(size=(48, 24)), dtype=torch.float32)
    factors = lora.best_rank(update, 24)
    artists.check_drawn(n02.plot_losses({"a": [1.0, 0.5], "b": [2.0, 2.0]}, "title"))
    artists.check_drawn(n02.plot_captured({"x": torch.linspace(0.1, 1, 24)}, 64))
    artists.check_drawn(n02.plot_update(update, factors, 64))
