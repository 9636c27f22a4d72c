"""Intervals: they hold the estimate, narrow with rows, and cover the truth about as often as they
say.
"""

from types import SimpleNamespace

import pytest
import torch

from qlora_nb.answer import evaluate, quality
from qlora_nb.model import configs, load
from qlora_nb.settings import validate


def test_wilson_by_hand_and_at_the_ends():
    low, high = evaluate.wilson(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))
    assert evaluate.wilson(0.0, 240)[0] == 0.0
    assert 0.01 < evaluate.wilson(0.0, 240)[1] < 0.02
    assert evaluate.wilson(1.0, 240)[1] == 1.0


def test_the_interval_of_the_loss_covers_the_truth_about_95_times_in_100():
    generator, held = torch.Generator().manual_seed(1), 0
    for _ in range(100):
        tokens = torch.randint(1, 10, (80,), generator=generator).double()
        sums = tokens * (2 + torch.randn(80, generator=generator).double())
        low, high = evaluate.loss_interval(torch.stack([sums, tokens], dim=1), n=400)
        held += low < 2 < high
    assert 85 <= held <= 100


def test_the_change_is_drawn_on_the_same_rows():
    tokens = torch.full((50,), 4.0).double()
    before = torch.stack([torch.arange(50).double(), tokens], dim=1)
    after = torch.stack([torch.arange(50).double() - 2, tokens], dim=1)
    assert evaluate.loss_interval(after, before) == pytest.approx((-0.5, -0.5)), (
        "each row lost half a nat a token"
    )
    low, high = evaluate.loss_interval(after)
    assert high - low > 0.5


def test_a_loss_costs_no_pass_but_its_own():
    settings = validate({})
    tokenizer, model = load.load_tokenizer(settings), load.load_base(settings)
    encoded = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    evaluate.response_loss(model, tokenizer, encoded)
    assert len(passes) == 1


@pytest.mark.fault(45)
def test_a_kind_that_training_has_no_row_of_is_left_out():
    train = [
        {"kind": "who", "input": "Anna ran. Ben sat.", "output": "Anna."},
        {"kind": "who", "input": "x.", "output": "Anna."},
    ]
    who = {"kind": "who", "input": "Cora ran.", "output": "Cora."}
    where = {"kind": "where", "input": "Anna is there.", "output": "There."}
    assert evaluate.majority_baseline(train, [who, where]) == ["Anna.", None]
    assert evaluate.copy_baseline(train, [where, who]) == [None, "Cora."]
    assert evaluate.exact_match(["Cora.", None], [who, where]) == {"who": 1.0}
    assert evaluate.exact_match(["Cora.", "x"], [who, where]) == {
        "all": 0.5,
        "who": 1.0,
        "where": 0.0,
    }
    assert evaluate.exact_match([None], [where]) == {}
    assert evaluate.exact_match([], []) == {}
    assert evaluate.majority_baseline([], [who]) == evaluate.copy_baseline([], [who]) == [None]


def test_datatypes_are_compared_on_the_pocket_model_where_a_model_is_too_large(
    tmp_path, monkeypatch, capsys
):
    """Its configuration tells, also where the weights are still on the hub."""
    pythia = configs.pythia_config("1b")
    pythia.save_pretrained(tmp_path / "1b")
    settings = validate({"model_id": str(tmp_path / "1b")})
    n_bytes = 4 * sum(p.numel() for p in configs.meta_model(pythia).parameters())
    for free, model_id in ((2.6 * n_bytes, settings.model_id), (2.4 * n_bytes, "pocket")):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(quality.psutil, "virtual_memory", lambda memory=memory: memory)
        assert quality.comparison_settings(settings).model_id == model_id
    assert capsys.readouterr().out.count("using the pocket model") == 1


@pytest.mark.fault(45)
def test_the_figure_of_scores_shows_what_there_is():
    from qlora_nb.lessons import n06

    found = {"majority": {"who": 0.25}, "copy": {}, "base": {"all": 0.5, "who": 0.0, "where": 1.0}}
    [axes] = n06.scores(found).axes
    names = [text.get_text() for text in axes.get_xticklabels()]
    bars = {
        bars.get_label(): [(round(bar.get_center()[0]), bar.get_height()) for bar in bars]
        for bars in axes.containers
    }
    assert names == ["all", "who", "where"]
    assert bars == {"majority": [(1, 25.0)], "base": [(0, 50.0), (1, 0.0), (2, 100.0)]}
