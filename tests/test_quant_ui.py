"""Notebooks 03 and 04: widgets, exercise checkers, quality measurements, and what the text says."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import ipywidgets as W
import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from matplotlib.figure import Figure

from qlora_nb import recorded
from qlora_nb.answer import quality
from qlora_nb.lessons import n03, n04
from qlora_nb.memory import ledger
from qlora_nb.model import load
from qlora_nb.model.linear_layers import linear_layers
from qlora_nb.settings import resolve
from qlora_nb.theory import blockwise, codebooks, double_quant
from qlora_nb.ui import widgets

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SIZES = [32, 64, 4096]
X = torch.randn(2**15, generator=torch.Generator().manual_seed(0))
ERRORS = {
    n: {s: blockwise.rmse(X, blockwise.round_trip(X, codebooks.code_by_name(n), s)) for s in SIZES}
    for n in ("NF4", "FP4", "INT4")
}


def ends(control: W.Widget) -> list:
    """First and last value of a control, and every value of a short list."""
    if isinstance(control, (W.SelectionSlider, W.Dropdown)):
        return [option[1] if isinstance(option, tuple) else option for option in control.options]
    return [control.min, control.max]


def drive(panel: W.VBox) -> None:
    """Move every control to its ends: each time another picture must be shown."""
    *controls, _, shown = panel.children
    for control in controls:
        pictures = set()
        for value in ends(control):
            if control.value == value:  # go away and come back
                control.value = next(other for other in ends(control) if other != value)
            panel.result = None
            control.value = value
            assert isinstance(panel.result, Figure), (control.description, value)
            assert panel.result.axes[0].get_title(loc="left")
            pictures.add(shown.value)
        assert len(pictures) == len(ends(control)), control.description


def test_widgets_of_03_at_both_ends():
    drive(
        widgets.explore(
            n03.plot_number_line,
            weight=widgets.float_slider("weight / absmax", 0.31, -1.0, 1.0, 0.01),
        )
    )
    for shape in ((40, 192), (8, 30)):  # the second is smaller than the corner that is shown
        drive(
            widgets.explore(
                partial(n03.plot_error_map, torch.randn(shape)),
                blocksize=widgets.choice_slider("block size (weights)", SIZES, 64),
                name=widgets.choice("datatype", list(ERRORS), "NF4"),
            )
        )


def test_widget_of_04_at_both_ends():
    drive(
        widgets.explore(
            n04.plot_bits,
            blocksize=widgets.choice_slider("block size (weights)", [8, 64, 4096], 64),
            second_blocksize=widgets.choice_slider(
                "second block size (scales)", [16, 256, 1024], 256
            ),
        )
    )


EXERCISES = {
    "check_tail_quantile": [
        (0.9330, "right"),
        (0.9677083, "too large"),
        (1 - 1 / 16, "too large"),
        ([0.9330], "shape wrong"),
    ],
    "check_max_error": [
        (0.304, "right"),
        (0.152, "too small"),
        (0.608, "too large"),
        (0.277, "too small"),
    ],
    "check_saved_bytes": [
        (782_332, "right"),
        (782_336, "too large"),
        (786_432, "too large"),
        (782_332 / 2**20, "too small"),
    ],
}


def lesson_of(checker: str):
    """The module of the notebook that has this exercise."""
    return n03 if hasattr(n03, checker) else n04


@pytest.mark.parametrize(
    ("name", "answer", "said"), [(n, a, s) for n, cases in EXERCISES.items() for a, s in cases]
)
def test_exercises_know_right_from_plausibly_wrong(name, answer, said, capsys):
    getattr(lesson_of(name), name)(answer)
    printed = capsys.readouterr().out
    assert said in printed
    assert printed.endswith(": right.\n") is (said == "right")


@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_not_attempted(name, capsys):
    getattr(lesson_of(name), name)(None)
    assert "not attempted yet" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pocket():
    settings = resolve({})
    return settings, load.load_base(settings, four_bit=False), load.load_tokenizer(settings)


def test_weights_come_back_after_a_replacement_and_after_an_error(pocket):
    _, model, _ = pocket
    before = {n: m.weight.clone() for n, m in linear_layers(model).items()}

    def ruined():
        with quality.replaced_weights(model, torch.zeros_like):
            assert all(not m.weight.any() for m in linear_layers(model).values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ruined()
    assert all(torch.equal(before[n], m.weight) for n, m in linear_layers(model).items())


def test_recall_does_not_depend_on_batching_or_padding(pocket, monkeypatch):
    _, model, tokenizer = pocket
    facts = [
        {"prompt": "Anna Vale lives in", "answer": "town"},
        {"prompt": "Ben Vale works as a", "answer": "baker"},
        {"prompt": "It was", "answer": "cold"},
    ]

    def losses(asked):
        monkeypatch.setattr(quality.pocket, "read", lambda name: asked)
        return quality.recall(model, tokenizer)[0]

    together = losses(facts)
    alone = torch.cat([losses([fact]) for fact in facts])
    assert torch.allclose(together, alone, atol=1e-4)


def test_text_losses_equal_the_models_own_loss(pocket):
    _, model, tokenizer = pocket
    texts = ["Anna went to the garden at noon.", "It was a cold day. Ben found a red kite."]
    ours = quality.text_losses(model, tokenizer, texts)
    for text, loss in zip(texts, ours):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(
                loss.item(), abs=1e-4
            )


def test_a_simulated_nf4_model_computes_what_the_loaded_one_does(pocket):
    settings, model, tokenizer = pocket
    loaded = load.load_base(settings)
    ids = tokenizer("Anna went to the garden", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    with quality.replaced_weights(model, double_quant.round_trip):
        simulated = model(input_ids=ids).logits
    assert torch.allclose(loaded(input_ids=ids).logits, simulated, atol=1e-3)


@pytest.mark.parametrize("double", [False, True])
def test_stored_bytes_equal_the_formula(pocket, double):
    settings, model, _ = pocket
    loaded = load.load_base(settings.replace(double_quant=double))
    want = {}
    for module in linear_layers(model).values():
        second = 256 if double else None
        for part, size in double_quant.storage_bytes(module.weight.numel(), second).items():
            want[part] = want.get(part, 0) + size
    found = ledger.stored_bytes(loaded)
    rest = found.pop("rest")
    assert found == want
    # the library counts codes and the rest, and leaves the scales out
    assert rest == loaded.get_memory_footprint() - want["codes"]


@pytest.mark.parametrize("name", ["03_nf4_explained", "04_double_quantization"])
def test_notebook_habits(name):
    """Anatomy that can be checked without running: parameters, guesses, exercises, cell lengths."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    tags = [t for c in cells for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1
    assert tags.count("key-results") == 1
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lengths = sorted(len(source.splitlines()) for source in code)
    assert lengths[-1] <= 25
    assert lengths[len(lengths) // 2] <= 5
    kinds = "".join(c["cell_type"][0] for c in cells)
    assert "ccc" not in kinds, "three code cells in a row"
    everything = "\n".join(code)
    for guess in re.findall(r"^(guess_\w+) = None", everything, re.M):
        assert len(re.findall(rf"\b{guess}\b", everything)) >= 2, f"{guess} is never compared"
    assert tags.count("exercise") >= 2


def test_03_reads_the_bell_as_it_is_drawn():
    """The figure and the sizes of its slices are tested in test_figures_quant.py."""
    text = notebook_text("03_nf4_explained")
    halves = "Seven values share the half below zero, eight the half above"
    assert f"{halves}, so the slices below are the larger ones" in text
    assert "areas are alike" not in text


def test_where_fp4_has_its_hole_there_are_not_most_weights():
    scaled = (X.reshape(-1, 64) / X.reshape(-1, 64).abs().amax(dim=1, keepdim=True)).abs()

    def share(low, high):
        return ((scaled > low) & (scaled < high)).double().mean().item()

    assert share(0.02, 0.1) < 0.25
    assert share(0.02, 0.1) > share(0.12, 0.2), "but they lie most densely there"
    assert "where most weights are" not in notebook_text("03_nf4_explained")
    fp4 = get_4bit_type("fp4", device="cpu").abs()
    assert not ((fp4 > 0.006) & (fp4 < 0.166)).any()
    assert "a hole beside zero" in codebooks.__doc__


def test_what_03_answers_beside_the_number_line():
    """NF4's widest gap; a weight that FP4 stores ten times better; and FP4's hole."""
    nf4 = get_4bit_type("nf4", device="cpu")
    fp4 = get_4bit_type("fp4", device="cpu").unique()
    assert nf4.diff().argmax() == 0, "between -1 and the next value"
    off = {name: (code - 0.67).abs().min() for name, code in {"NF4": nf4, "FP4": fp4}.items()}
    assert off["NF4"] > 10 * off["FP4"]
    for weight in (0.02, 0.1):
        nearest = fp4[(fp4 - weight).abs().argmin()].item()
        assert nearest == pytest.approx(0.0052, abs=1e-4) or nearest == pytest.approx(
            0.1667, abs=1e-4
        )


def test_what_03_answers_beside_the_errors():
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def error(name, size):
        return blockwise.rmse(x, blockwise.round_trip(x, codebooks.code_by_name(name), size))

    assert error("FP4", 32) > error("NF4", 512)
    assert 1 - error("NF4", 32) / error("NF4", 64) == pytest.approx(0.05, abs=0.01)
    assert error("INT4", 1024) < 0.98 * error("FP4", 1024)
    assert error("INT4", 4096) == pytest.approx(error("FP4", 4096), rel=5e-3), "they meet"
    cut = {}
    for t in (0.9, 0.95, codebooks.TAIL_QUANTILE, 0.99, 0.999):
        cut[t] = blockwise.rmse(x, blockwise.round_trip(x, n03.check_nf4_values.reference(t), 64))
    assert min(cut, key=cut.get) == 0.95, "NF4's is not the least"
    assert max(list(cut.values())[:3]) < 1.03 * min(cut.values()), "hardly changes"
    assert cut[0.999] > 1.5 * cut[0.99] > 1.5 * cut[codebooks.TAIL_QUANTILE]


def test_what_03_says_of_the_recorded_bits():
    models_of = json.loads((recorded.FOLDER / "bits_smollm2.json").read_text())["models"]
    (part,) = models_of.values()
    unquantized, *rest = (sum(q["losses"]) / len(q["losses"]) for q in part["qualities"])
    added = [loss - unquantized for loss in rest]  # 8, 4, 3 and 2 bits
    assert [q["name"] for q in part["qualities"]][1:] == ["8 bit", "4 bit", "3 bit", "2 bit"]
    assert added[0] < 0.2 * added[1], "from 8 to 4 bits the loss rises"
    assert added[2] > 3 * added[1], "from 4 to 3 the added loss is several times as large"
    assert rest[3] > 2 * unquantized, "with 2 bits the model is broken"


def test_af4_is_behind_nf4_even_on_its_own_measure():
    scaled = (X.reshape(-1, 64) / X.reshape(-1, 64).abs().amax(dim=1, keepdim=True)).reshape(-1, 1)
    mean_error = {
        name: (scaled - get_4bit_type(name, device="cpu")).abs().amin(dim=1).mean()
        for name in ("nf4", "af4")
    }
    assert mean_error["nf4"] < mean_error["af4"]
    error = {}
    for name in ("nf4", "af4"):
        error[name] = blockwise.rmse(X, blockwise.round_trip(X, get_4bit_type(name, device="cpu")))
    assert error["nf4"] < error["af4"], "and in RMSE, as 03 says"


def test_what_03_says_of_the_recorded_losses():
    models_of = json.loads((recorded.FOLDER / "quality_smollm2.json").read_text())["models"]
    gaps = {}
    for what, part in models_of.items():
        losses = {q["name"]: torch.tensor(q["losses"]) for q in part["qualities"]}
        added = {
            name: (loss - losses["unquantized"]).mean().item()
            for name, loss in losses.items()
            if name != "unquantized"
        }
        assert min(added, key=added.get) in ("NF4", "NF4+DQ"), "NF4 is best in all of them"
        assert added["NF4+DQ"] == pytest.approx(added["NF4"], rel=0.05), (
            "double quantization costs next to nothing"
        )
        gap = losses["INT4"] - losses["FP4"]
        gaps[what] = (gap.mean() / gap.std() * len(gap) ** 0.5).item()
    facts, stories, answers = (
        gaps[what] for what in ("pocket", "smollm2", "smollm2, real answers")
    )
    assert -2 < facts < 0  # INT4 before FP4, by less than two standard errors
    assert 0.5 < abs(stories) < 1.5  # about as large as its standard error
    assert answers > 3  # by several


def notebook_text(name: str) -> str:
    """All markdown of a notebook in one line."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return " ".join(
        " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").split()
    )
