"""What the figures of notebook 02 show, beside PEFT, numpy's SVD and plain arithmetic."""

from __future__ import annotations

import math

import artists
import numpy as np
import peft
import pytest
import torch
from pythias import PYTHIAS, adapter_numels
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from qlora_nb.lessons import n02
from qlora_nb.theory import lora

EXACT = 1e-12
"""Double precision in another order of the same few operations."""
SINGLE = 1e-5
"""The kit computes in float32, the test in float64."""


def adapted(n_in: int, n_out: int, **settings) -> torch.nn.Module:
    """A linear layer that PEFT has given an adapter."""
    model = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **settings))


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
    assert ax.get_ylim()[0] == 0
    styles = {line.get_linestyle() for line in ax.lines}
    assert len(styles) == 3, "told apart without colour"


# scales


@pytest.mark.parametrize(("ranks", "lora_alpha"), [((1, 4, 16, 64), 16), ((2, 8, 32), 24.0)])
def test_scales_are_those_of_peft(ranks, lora_alpha):
    ax = n02.plot_scales(ranks, lora_alpha, n_in=96, seed=3).axes[0]
    assert artists.legend(ax) == ["no scale", "alpha / r (LoRA)", "alpha / √r (rsLoRA)"]
    assert artists.labels(ax) == ("rank r", "output size (std)")
    artists.check_in_view(ax)
    assert artists.ticks(ax.xaxis) == [(r, str(r)) for r in ranks]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    raw, plain, rslora = artists.lines(ax)
    for line in (raw, plain, rslora):
        assert line[:, 0].tolist() == list(ranks)
    for line, use_rslora in ((plain, False), (rslora, True)):
        for i, r in enumerate(ranks):
            layer = adapted(4, 4, r=r, lora_alpha=lora_alpha, use_rslora=use_rslora)
            scaling = layer.base_model.model[0].scaling["default"]
            assert line[i, 1] / raw[i, 1] == pytest.approx(scaling, rel=EXACT)


def test_scales_start_from_the_output_that_theory_expects():
    """A is uniform in ±1/√in as PEFT draws it, B is 0.01 times a Gaussian: 0.01 · √(r/3)."""
    n_in = 256
    ranks = (1, 2, 4, 8, 16, 32, 64, 128)
    drawn_by_peft = adapted(n_in, 256, r=128).base_model.model[0].lora_A["default"].weight
    assert drawn_by_peft.abs().max() <= 1 / math.sqrt(n_in)
    raw = []
    for seed in range(4):
        ax = n02.plot_scales(ranks, 16, n_in, seed).axes[0]
        raw.append(artists.lines(ax)[0][:, 1])
    assert not np.array_equal(raw[0], raw[1]), "the seed counts"
    ax = n02.plot_scales(ranks, 16, n_in).axes[0]
    assert np.array_equal(raw[0], artists.lines(ax)[0][:, 1]), "seed 0 unless told"
    raw = np.array(raw)
    expected = 0.01 * np.sqrt(np.array(ranks) / 3)
    # 64 inputs: the size at one rank is known to 1/√128, about 9 %; more ranks average it out
    assert raw == pytest.approx(np.tile(expected, (4, 1)), rel=4 * 0.1)
    assert raw[:, 5:] == pytest.approx(np.tile(expected[5:], (4, 1)), rel=0.1)
    title = "At random B LoRA's path shrinks as 1/√r, rsLoRA's stays"
    assert artists.title(ax) == title
    _, plain, rslora = artists.lines(ax)
    assert plain[5, 1] / plain[7, 1] == pytest.approx(2, rel=0.1)
    assert rslora[5, 1] / rslora[7, 1] == pytest.approx(1, rel=0.1)


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
    assert artists.labels(ax) == ("rank r", "captured (% of energy)")
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


# trained numbers


@pytest.mark.parametrize(
    ("r", "targets", "highlight"),
    [
        (16, "all-linear", "12b"),
        (4, "attention", "410m"),
        (1, "feed-forward", "14m"),
        (64, "query_key_value", "1b"),
    ],
)
def test_counts_of_every_pythia(r, targets, highlight):
    ax = n02.plot_counts(r, targets, highlight).axes[0]
    kinds = ["query_key_value"]
    if targets != "query_key_value":
        kinds.append(targets)
    groups = artists.bars(ax)
    assert len(groups) == len(kinds)
    labels = []
    for kind, group in zip(kinds, groups):
        shares = []
        for size, (_, _, n_parameters) in PYTHIAS.items():
            shares.append(100 * sum(adapter_numels(size, r, kind)) / n_parameters)
        assert group[:, 3] == pytest.approx(shares, rel=EXACT)
        assert group[:, 1].tolist() == [0] * 9
        assert group[:, 2] == pytest.approx(0.8 / len(kinds))
        labels += [f"{share:.2g}" for share in shares]
    assert artists.texts(ax) == labels
    ends = np.concatenate([np.column_stack([g[:, 0] + g[:, 2] / 2, g[:, 3]]) for g in groups])
    assert artists.places(ax) == pytest.approx(ends), "each number on its own bar"
    for i in range(9):
        assert groups[0][i, 0] == pytest.approx(i - 0.4), "the middle above the size's name"
        assert groups[-1][i, 0] + groups[-1][i, 2] == pytest.approx(i + 0.4)
    assert artists.ticks(ax.xaxis) == list(enumerate(PYTHIAS))
    assert artists.legend(ax) == ["query_key_value (PEFT's default)", *kinds[1:]]
    assert artists.labels(ax) == ("Pythia (size)", "trained (% of all parameters)")
    artists.check_in_view(ax)
    n_trained = sum(adapter_numels(highlight, r, targets))
    share = 100 * n_trained / PYTHIAS[highlight][2]
    title = f"pythia-{highlight}, r = {r}, {targets}: {n_trained:,} trained ({share:.2g} %)"
    assert artists.title(ax) == title


def test_counts_of_pythia_12b_at_rank_16_without_more_words():
    title = artists.title(n02.plot_counts(16).axes[0])
    assert title == "pythia-12b, r = 16, all-linear: 47,185,920 trained (0.4 %)"
    assert n02.count("12b", 16, "query_key_value") == 11_796_480


@pytest.mark.parametrize("targets", ["query_key_value", "attention", "feed-forward", "all-linear"])
def test_count_is_what_peft_trains(targets):
    """On a Pythia of the smallest size; PEFT without a choice adapts query_key_value alone."""
    modules = {
        "query_key_value": None,
        "attention": ["query_key_value", "dense"],
        "feed-forward": ["dense_h_to_4h", "dense_4h_to_h"],
        "all-linear": "all-linear",
    }
    widths = {"vocab_size": 50304, "hidden_size": 128, "intermediate_size": 512}
    config = GPTNeoXConfig(**widths, num_hidden_layers=6, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        lora_config = peft.LoraConfig(r=8, target_modules=modules[targets], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n02.count("14m", 8, targets) == trained == sum(adapter_numels("14m", 8, targets))


# all of them


def test_every_figure_can_be_drawn_and_is_closed():
    update = torch.tensor(np.random.default_rng(3).normal(size=(48, 24)), dtype=torch.float32)
    factors = lora.best_rank(update, 24)
    artists.check_drawn(n02.plot_losses({"a": [1.0, 0.5], "b": [2.0, 2.0]}, "title"))
    artists.check_drawn(n02.plot_scales((1, 16), 16, 32))
    artists.check_drawn(n02.plot_captured({"x": torch.linspace(0.1, 1, 24)}, 64))
    artists.check_drawn(n02.plot_update(update, factors, 64))
    artists.check_drawn(n02.plot_counts(8, "feed-forward", "70m"))
