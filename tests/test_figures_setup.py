"""Every number in the tables of notebook 01 and in the panels, against plans, answers and sums made
here by hand.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace

import drawn
import nbformat
import pytest
import recorded_tables
import torch
from conftest import NOTEBOOKS

from qlora_nb import cards, machine, recorded, sources
from qlora_nb.answer import adapters, generate
from qlora_nb.lessons import n01
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs, data, device, load
from qlora_nb.pythia import PYTHIA
from qlora_nb.settings import validate
from qlora_nb.ui import charts, panels, widgets

GIB = 2**30
SIZES = {
    "70m": {"layers": 6, "hidden": 512, "vocab": 50304},
    "160m": {"layers": 12, "hidden": 768, "vocab": 50304},
    "410m": {"layers": 24, "hidden": 1024, "vocab": 50304},
}
"""Pythia paper, table 1."""
SMALL = {
    "profile": "full",
    "model_id": "EleutherAI/pythia-70m",
    "compute_dtype": "float16",
    "r": 4,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "optim": "paged_adamw_32bit",
    "lora_dropout": 0.0,
    "loss_chunk": 32,
    "max_new_tokens": 20,
}


def plan(size: str, train: bool, on_gpu: bool = True, **changes) -> Plan:
    """The plan of `SMALL` (with changes), field by field."""
    values = SMALL | {"gradient_checkpointing": True, "head_4bit": False} | changes
    return Plan(
        config=configs.pythia_config(size),
        train=train,
        batch=values["per_device_train_batch_size"] if train else 1,
        length=values["max_length"],
        accumulation=values["gradient_accumulation_steps"],
        new_tokens=values["max_new_tokens"],
        double_quant=values.get("double_quant", True),
        head_4bit=values["head_4bit"],
        embedding_on_cpu=values.get("embedding_on_cpu", False),
        r=values["r"],
        lora_dropout=values["lora_dropout"],
        autocast=train and on_gpu,  # float16
        optim=values["optim"],
        checkpointing=values["gradient_checkpointing"],
        loss_chunk=values["loss_chunk"],
        on_gpu=on_gpu,
    )


def still(size: str, r: int) -> dict[str, float]:
    """Bytes of what does not move, from three sizes of the model: 16 bit, double quantization."""
    shape = SIZES[size]
    hidden, layers = shape["hidden"], shape["layers"]
    weights = 12 * hidden**2 * layers
    return {
        "4-bit weights": weights / 2,
        "LoRA weights": 4
        * r
        * 16
        * hidden
        * layers,  # in + out of the four linear layers: 4 + 2 + 5 + 5 widths
    }


def widths(ax, row: int) -> dict[str, float]:
    """Part → length of its bar in this row; parts of no length left out."""
    lengths = {part: boxes[row][2] for part, boxes in drawn.bars(ax).items()}
    return {part: length for part, length in lengths.items() if length}


def parts(found: ledger.Ledger, unit: float) -> dict[str, float]:
    """What a figure of memory shows of a ledger, by the names of its parts."""
    names = {
        "4-bit codes": "4-bit weights",
        "scales (absmax)": "scales",
        "scales of the scales": "scales",
        "code tables and offsets": "scales",
        "embedding and head": "unquantized rest",
        "biases and norms": "unquantized rest",
        "buffers": "unquantized rest",
        "CUDA context, kernels, reserve": "CUDA itself",
    }
    sums = {}
    for line in found.lines:
        part = names.get(line.name, line.name)
        sums[part] = sums.get(part, 0) + line.bytes / unit
    return sums


def unit_of(peaks: list[ledger.Ledger]) -> int:
    """Bytes of one unit of the figure: a GiB where a bar is longer than half a GiB, else a MiB."""
    if max(found.total_bytes for found in peaks) > GIB / 2:
        return GIB
    return 2**20


def check_bars(ax, row: int, found: ledger.Ledger, unit: float) -> None:
    """One bar of a figure of memory shows this ledger, and its length is written at its end."""
    assert widths(ax, row) == pytest.approx(parts(found, unit))
    x, y, text = drawn.texts(ax)[row]
    assert x == pytest.approx(found.total_bytes / unit)
    assert (y, text) == (row, f" {found.total_bytes / unit:.2f}")


# --- the figures of one plan ---


@pytest.mark.parametrize("gpu_gib", [None, 0.6, 8.0])
def test_plan_figure_shows_both_peaks(gpu_gib):
    settings = validate(SMALL)
    [ax] = panels.plan_figure(settings, gpu_gib).axes
    peaks = [budget.peak(plan("70m", train, on_gpu=gpu_gib is not None)) for train in (True, False)]
    unit = unit_of(peaks)
    for row, found in enumerate(peaks):
        check_bars(ax, row, found, unit)
        for part, size in still("70m", r=4).items():
            assert widths(ax, row)[part] == pytest.approx(size / unit)
    assert drawn.y_ticks(ax) == [(0, "fine-tuning\npythia-70m"), (1, "answering\npythia-70m")]
    assert ("CUDA itself" in drawn.bars(ax)) == (gpu_gib is not None)
    if gpu_gib is None:
        assert len(ax.lines) == 0
        assert drawn.title(ax).startswith("The largest part: ")
    else:
        assert ax.lines[0].get_xdata() == [gpu_gib * GIB / unit] * 2
        over = [name.replace("\n", " ") for name in over_the_card(peaks, gpu_gib)]
        said = drawn.title(ax).replace("\n", " ")
        if over:
            assert said == f"Over {gpu_gib:g} GiB: {', '.join(over)}"
        else:
            assert said == f"All fit {gpu_gib:g} GiB"


def over_the_card(peaks: list[ledger.Ledger], gpu_gib: float) -> list[str]:
    names = ("fine-tuning\npythia-70m", "answering\npythia-70m")
    return [
        name for name, found in zip(names, peaks, strict=True) if found.total_bytes / GIB > gpu_gib
    ]


# --- from tuning a model whole to QLoRA ---


def test_tuned_whole_has_a_gradient_and_two_means_for_every_weight():
    in_16_bit = replace(plan("70m", train=True), four_bit=False)
    [ax] = charts.memory_bars({"whole": recorded_tables.tuned_whole(in_16_bit)}).axes
    drawn_parts = {part: length * GIB for part, length in widths(ax, 0).items()}
    n_weights = 70_426_624  # Pythia paper, table 1
    assert drawn_parts["unquantized rest"] == pytest.approx(2 * n_weights, rel=1e-5)  # and buffers
    assert drawn_parts["gradients"] == pytest.approx(2 * n_weights)
    assert drawn_parts["optimizer states"] == pytest.approx(8 * n_weights)
    assert "LoRA weights" not in drawn_parts
    others = ("kept for the backward pass", "working memory", "CUDA itself")
    with_lora = parts(budget.peak(in_16_bit), unit=1)
    for part in others:
        assert drawn_parts[part] == pytest.approx(with_lora[part])


@pytest.mark.parametrize("r", [4, 64])
def test_with_pages_draws_apart_what_bitsandbytes_pages(r):
    found = recorded_tables.with_pages(plan("70m", train=True, r=r))
    assert found.total_bytes == budget.peak(plan("70m", train=True, r=r)).total_bytes
    [ax] = charts.memory_bars({"QLoRA": found}, 8.0).axes
    drawn_parts = {part: length * GIB for part, length in widths(ax, 0).items()}
    # at rank 64 the long sides alone (4 · 512) have 100,000 elements; at rank 4 none has
    paged = 2 * 4 * 64 * 2048 * 2 * 6 if r == 64 else 0
    assert drawn_parts.get("paged optimizer states", 0) == pytest.approx(paged)
    all_states = 8 * r * 16 * 512 * 6
    assert drawn_parts["optimizer states"] == pytest.approx(all_states - paged)
    x, _, text = drawn.texts(ax)[0]
    assert x == pytest.approx(found.total_gib)
    assert text == f" {found.total_gib:.2f}"


def test_each_step_of_notebook_01_saves_what_its_idea_saves():
    """pythia-12b: 11,324,620,800 weights in linear layers of 11,846,072,320; rank 64."""
    cells = nbformat.read(NOTEBOOKS / "01_setup.ipynb", 4).cells
    source = next(cell.source for cell in cells if "stairs = {}" in cell.source)
    names = {"json": json, "recorded": recorded, "ledger": ledger, "budget": budget}
    names |= {
        "validate": validate,
        "plan_of": plan_of,
        "guess_lora_gib": None,
        "guess_peak_gib": None,
    }
    names["compare_guess"] = lambda *_, **__: None
    exec(source, names)
    table = json.loads((recorded.FOLDER / "steps_table.json").read_text(encoding="utf-8"))
    full = validate({"profile": "full"})
    assert table == recorded_tables.steps_to_qlora(full), "as it is predicted now"
    whole, lora, nf4, nested, paged = names["stairs"].values()
    linear, every, adapter = 11_324_620_800, 11_846_072_320, 188_743_680
    frozen = 2 * every + 8 * every - (4 + 4 + 8) * adapter  # less what LoRA itself needs
    assert whole.total_bytes - lora.total_bytes == pytest.approx(frozen, rel=1e-6)
    tables = 144 * 64
    assert lora.total_bytes - nf4.total_bytes == 2 * linear - linear / 2 - linear / 16 - tables
    scales = linear / 16 - linear / 64 - linear / 64 / 64 - 144 * 1028
    assert nf4.total_bytes - nested.total_bytes == scales
    assert paged[charts.PAGED] == 8 * adapter
    assert paged.total_bytes == names["peak"].total_bytes
    ends_of_pages = 452_984_832  # 36 layers × 2 states × 6 MiB
    assert paged.total_bytes == pytest.approx(nested.total_bytes + ends_of_pages, rel=1e-6)


# --- the tables of notebook 01 ---# --- the tables of notebook 01 ---


def test_what_fits_is_the_largest_that_fits(monkeypatch):
    sizes = ("70m", "160m")
    only_these_pythias(monkeypatch, {size: PYTHIA[size] for size in sizes})
    answering = {size: budget.peak(plan(size, train=False)).total_gib for size in sizes}
    tuning = {size: budget.peak(plan(size, train=True)).total_gib for size in sizes}
    assert answering["70m"] < tuning["70m"] < answering["160m"] < tuning["160m"]
    between = (answering["70m"] + tuning["70m"]) / 2
    # fine-tuning fits with levers alone; fits the smaller one, with levers the larger one; both
    cards = (between, tuning["160m"] - 0.001, 2.5)
    monkeypatch.setattr(recorded_tables, "CARDS_GIB", cards)
    rows = recorded_tables.what_fits(validate(SMALL))
    assert [row["card"] for row in rows] == [f"{card:g} GiB" for card in cards]
    for card, row in zip(cards, rows, strict=True):
        for kind, needs in (("answering", answering), ("fine-tuning", tuning)):
            fitting = [size for size, need in needs.items() if need <= card]
            if fitting:
                assert row[kind] == f"{fitting[-1]} ({needs[fitting[-1]]:.1f} GiB)"
            else:
                assert row[kind] == "none"
        check_options(row, card)
    assert [row["fine-tuning"].split()[0] for row in rows] == ["none", "70m", "160m"]
    with_options = [row["fine-tuning with options"].split()[0] for row in rows]
    assert with_options[1:] == ["160m", "160m"]
    assert rows[1]["options"] != "none needed"
    assert rows[2]["options"] == "none needed"


def test_what_fits_a_card_too_small_for_all(monkeypatch):
    only_these_pythias(monkeypatch, {"70m": PYTHIA["70m"]})
    monkeypatch.setattr(recorded_tables, "CARDS_GIB", (0.25,))
    [row] = recorded_tables.what_fits(validate(SMALL))
    kinds = ("answering", "fine-tuning", "fine-tuning with options")
    assert row == {"card": "0.25 GiB", **dict.fromkeys(kinds, "none"), "options": "none is enough"}


def check_options(row: dict[str, str], card: float) -> None:
    """With the changes that the row names this model fits the card, and it needs what the row
    says.
    """
    if row["fine-tuning with options"] == "none":
        return
    size = row["fine-tuning with options"].split()[0]
    changes = {}
    if row["options"] != "none needed":
        for word in row["options"].replace(";", ",").split(", "):
            name, value = word.split("=")
            changes[name] = type(getattr(validate(SMALL), name))(value)
    need = budget.peak(plan(size, train=True, **changes)).total_gib
    assert need <= card
    assert row["fine-tuning with options"] == f"{size} ({need:.1f} GiB)"


def only_these_pythias(monkeypatch, sizes: dict) -> None:
    """The suite of Pythias with these sizes alone, wherever it is walked through."""
    for module in (n01, budget):
        monkeypatch.setattr(module, "PYTHIA", sizes)


def by_hand(*gpus: cards.Gpu, free_gib: float = 4.0) -> machine.Machine:
    return machine.Machine(
        cpu="by hand",
        n_cores=3,
        ram_bytes=8 * GIB,
        ram_free_bytes=int(free_gib * GIB),
        disk_free_bytes=100 * GIB,
        gpus=gpus,
    )


def card(gib: float) -> cards.Gpu:
    return cards.Gpu("card", int(gib * GIB), int(gib * GIB), (9, 0))


def profile_peaks() -> dict[str, float]:
    """GiB at the peak of the profiles that need no fetch, from plans written out."""
    dtype = device.compute_dtype("auto")
    pocket = configs.config_of("pocket")
    medium = configs.pythia_config("2.8b")
    large = configs.pythia_config("12b")
    usual = {"length": 512, "lora_dropout": 0.05, "loss_chunk": 128}
    plans = {
        "tiny": Plan(
            pocket,
            batch=16,
            length=192,
            r=8,
            dtype=dtype,
            rest_dtype=dtype,
            checkpointing=False,
            loss_chunk=128,
            on_gpu=False,
        ),
        "t4": Plan(medium, batch=4, r=16, accumulation=4, **usual),
        "full": Plan(large, batch=1, r=64, accumulation=16, **usual),
    }
    return {name: budget.peak(made).total_gib for name, made in plans.items()}


def test_profiles_here_says_what_runs_and_why_not(monkeypatch):
    monkeypatch.setattr(
        budget, "options", lambda *_, **__: []
    )  # what would help is not in the table
    needs = profile_peaks()
    between = (needs["t4"] + needs["full"]) / 2
    large = f"no: {validate({'profile': 'full'}).model_id}"
    middle = f"no: {validate({'profile': 't4'}).model_id}"
    expected = {
        "middle card": (by_hand(card(between)), "yes", "yes", f"{large} does not fit this GPU"),
        "no card": (by_hand(), "yes", f"{middle} needs a GPU", f"{large} needs a GPU"),
        "full memory": (
            by_hand(free_gib=0.1),
            "no: pocket does not fit this machine's memory",
            f"{middle} needs a GPU",
            f"{large} needs a GPU",
        ),
    }
    for name, (here, *verdicts) in expected.items():
        rows = {row["profile"]: row for row in n01.profiles_here(here)}
        assert list(rows) == ["tiny", "smollm2", "t4", "full"]
        smollm2 = rows.pop("smollm2")
        if not (sources.SMOLLM2_DIR / "config.json").is_file():
            assert smollm2["peak, fine-tuning (GiB)"] == "known after its fetch"
            assert smollm2["runs here"] == "no: SmolLM2 is not on this machine yet"
        assert [row["runs here"] for row in rows.values()] == verdicts, name
        names = ["pocket", "EleutherAI/pythia-2.8b", "EleutherAI/pythia-12b"]
        assert [row["model"] for row in rows.values()] == names
        assert smollm2["model"] == "smollm2"
        peaks = {profile: row["peak, fine-tuning (GiB)"] for profile, row in rows.items()}
        assert peaks == {profile: f"{need:.2f}" for profile, need in needs.items()}


def test_downloads_are_counted(monkeypatch, tmp_path):
    cached = {("org/cached", "model"), ("org/rows", "dataset")}
    monkeypatch.setattr(sources, "in_hub_cache", lambda name, what: (name, what) in cached)
    with torch.device("meta"):
        tensors = configs.meta_model(configs.pythia_config("410m")).parameters()
    size = 2 * sum(tensor.numel() for tensor in tensors) / 1e9
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.json").write_text("[]")
    there = str(tmp_path / "model")
    rows = str(tmp_path / "rows.json")
    cases = [
        (
            "pocket",
            "pocket",
            "already here, nothing to download",
            "already here, nothing to download",
        ),
        ("smollm2", rows, "already here, nothing to download", "already here, nothing to download"),
        (
            there,
            "org/rows",
            "already here, nothing to download",
            "already here, nothing to download",
        ),
        (
            "org/cached",
            "org/other",
            "already here, nothing to download",
            "size known only to the hub to download",
        ),
        (
            "EleutherAI/pythia-410m",
            "pocket",
            f"about {size:.1f} GB to download",
            "already here, nothing to download",
        ),
    ]
    for model, dataset, of_model, of_dataset in cases:
        lines = n01.downloads(validate({"model_id": model, "dataset": dataset}))
        assert lines[:2] == [f"model {model}: {of_model}", f"dataset {dataset}: {of_dataset}"]
        # 11.8 billion parameters of two bytes: the paper's own count of pythia-12b is
        # 11,846,072,320
        last = f"for comparison, EleutherAI/pythia-12b: {2 * 11_846_072_320 / 1e9:.1f} GB"
        assert lines[2:] == [f"{last} (GB of 10^9 bytes, as disks are sold)"]


# --- the planner ---

CHANGES = {
    "r": 16,
    "max_length": 256,
    "per_device_train_batch_size": 8,
    "optim": "paged_adamw_8bit",
    "gradient_checkpointing": False,
    "loss_chunk": 128,
    "embedding_on_cpu": True,
    "head_4bit": True,
}


def check_planner(box, size: str, card_gib: float | None, changes: dict[str, object]) -> None:
    """Bars, advice and the line to copy are those of these settings."""
    [ax] = box.result.axes
    peaks = [
        budget.peak(plan(size, train, card_gib is not None, **changes)) for train in (True, False)
    ]
    unit = unit_of(peaks)
    for row, found in enumerate(peaks):
        check_bars(ax, row, found, unit)
    assert drawn.y_ticks(ax) == [
        (0, f"fine-tuning\npythia-{size}"),
        (1, f"answering\npythia-{size}"),
    ]
    assert box.children[-1].value == widgets.picture(box.result), "what is seen is the last figure"
    said, line = box.advice.value.split("\n")
    need = peaks[0].total_bytes
    if card_gib is None:
        start = f"Fine-tuning needs {need / 2**20:,.0f} MiB of memory at its peak"
    elif need <= card_gib * GIB:
        left = card_gib - need / GIB
        start = f"Fine-tuning fits: {need / GIB:.2f} of {card_gib:g} GiB, {left:.2f} are left."
    else:
        start = f"Fine-tuning does not fit: {need / GIB - card_gib:.2f} GiB are missing"
    assert said.startswith(start)
    words = shlex.split(line)
    assert words[:3] == ["papermill", "notebooks/06_finetune_pythia_12b.ipynb", "out.ipynb"]
    given = {}
    for flag, name, value in zip(words[3::3], words[4::3], words[5::3], strict=True):
        assert flag in ("-p", "-r")
        given[name] = value
    wanted = SMALL | {"model_id": f"EleutherAI/pythia-{size}"} | changes
    assert validate(given) == validate(wanted), "the line repeats the run"


def test_planner_shows_what_is_chosen():
    box = panels.planner(validate(SMALL), 8.0)
    own = "EleutherAI/pythia-70m"
    others = ["14m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
    offered = {
        "model_id": [own, *(f"EleutherAI/pythia-{size}" for size in others)],
        "gpu_gib": [6, 8, 12, 16, 24, 48, 80],
        "r": [4, 8, 16, 32, 64],
        "max_length": [64, 128, 256, 512, 1024, 2048],
        "per_device_train_batch_size": [1, 2, 4, 8, 16],
        "optim": ["paged_adamw_32bit", "paged_adamw_8bit"],
        "gradient_checkpointing": [True, False],
        "loss_chunk": [0, 32, 128],
        "embedding_on_cpu": [False, True],
        "head_4bit": [False, True],
    }
    assert {name: list(control.options) for name, control in box.controls.items()} == offered
    assert [control.description for control in box.controls.values()] == list(offered)
    assert box.children == (*box.controls.values(), box.advice, *box.children[-2:])
    starts = SMALL | {"gpu_gib": 8.0, "gradient_checkpointing": True}
    starts |= {"embedding_on_cpu": False, "head_4bit": False}
    assert {name: control.value for name, control in box.controls.items()} == {
        name: starts[name] for name in offered
    }
    check_planner(box, "70m", 8.0, {})
    so_far = {}
    for name, value in CHANGES.items():
        box.controls[name].value = value
        so_far[name] = value
        check_planner(box, "70m", 8.0, so_far)
    box.controls["gpu_gib"].value = 48.0
    check_planner(box, "70m", 48.0, so_far)
    box.controls["model_id"].value = "EleutherAI/pythia-160m"
    check_planner(box, "160m", 48.0, so_far)


def test_planner_says_what_is_missing():
    box = panels.planner(validate(SMALL), 0.5)
    assert box.controls["gpu_gib"].options[0] == 0.5
    check_planner(box, "70m", 0.5, {})
    assert "missing" in box.advice.value


def test_planner_without_a_card():
    box = panels.planner(validate(SMALL))
    assert set(box.controls) == set(CHANGES)
    check_planner(box, "70m", None, {})
    box.controls["r"].value = 64
    check_planner(box, "70m", None, {"r": 64})
    box.controls["max_length"].value = 128
    check_planner(box, "70m", None, {"r": 64, "max_length": 128})


# --- the view of a training run ---


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def step(number: int, max_steps: int) -> dict:
    return {
        "step": number,
        "max_steps": max_steps,
        "loss": 4 / number + 0.125,
        "learning_rate": 2e-3 / number,
        "tokens_per_s": 1234.5 * number,
        "memory_bytes": number * 3 * 2**29,
        "seconds_left": 60.0 - number,
    }


LINES = [  # the first four of twelve steps, by hand
    "step 1/12 · loss 4.125 · learning rate 2.0e-03 · 1,234 tokens/s · 1.50 GiB · 59 s left",
    "step 2/12 · loss 2.125 · learning rate 1.0e-03 · 2,469 tokens/s · 3.00 GiB · 58 s left",
    "step 3/12 · loss 1.458 · learning rate 6.7e-04 · 3,704 tokens/s · 4.50 GiB · 57 s left",
    "step 4/12 · loss 1.125 · learning rate 5.0e-04 · 4,938 tokens/s · 6.00 GiB · 56 s left",
]


def watched(monkeypatch) -> tuple[Clock, list]:
    """A clock that stands still, and the figures that a view draws."""
    clock, figures = Clock(), []
    real = widgets.picture

    def keep(figure):
        figures.append(figure)
        return real(figure)

    monkeypatch.setattr(panels, "time", clock)
    monkeypatch.setattr(widgets, "picture", keep)
    return clock, figures


def test_live_view_says_and_draws_every_step(monkeypatch, capsys):
    clock, figures = watched(monkeypatch)
    view = panels.LiveTraining(12)
    assert view.text.value == "waiting for the first step"
    assert (view.bar.min, view.bar.max, view.bar.value) == (0, 12, 0)
    assert view.box.children == (view.bar, view.text, view.curve)
    assert view.curve.value == "", "no picture yet"
    for number, line in enumerate(LINES, start=1):
        clock.now += 2.5
        view(step(number, 12))
        assert view.text.value == line
        assert capsys.readouterr().out == f"{line}\n"
        assert view.bar.value == number
        assert len(figures) == number
        [ax] = figures[-1].axes
        x, y = drawn.lines(ax)["training loss of each step"]
        assert x.tolist() == list(range(1, number + 1))
        assert y.tolist() == [4 / at + 0.125 for at in range(1, number + 1)]
        assert (
            drawn.title(ax) == f"Training loss after {number} steps: {4 / number + 0.125:.2f} nats"
        )
    assert view.curve.value == widgets.picture(figures[-1]), "the picture is that figure"


def test_live_view_is_quiet_in_between(monkeypatch, capsys):
    clock, figures = watched(monkeypatch)
    view = panels.LiveTraining(24)
    said, drawn_at = [], []
    for number in range(1, 25):
        clock.now += 0.75
        before = len(figures)
        view(step(number, 24))
        if capsys.readouterr().out:
            said.append(number)
        if len(figures) > before:
            drawn_at.append(number)
    assert said == [3, 6, 9, 12, 15, 18, 21, 24], "eight lines for a batch run"
    assert drawn_at == [1, 4, 7, 10, 13, 16, 19, 22, 24], "every two seconds, and at the end"
    clock.now += 61
    view(step(25, 99))
    assert capsys.readouterr().out.startswith("step 25/99"), "a line a minute where steps are slow"


# --- two models side by side ---


STEPS = [
    (" park", [(" home", 0.5), (" up", 0.25)], [(" park", 0.875), ("\n", 0.0625)], 2.345),
    ("(end)", [(".", 0.75), (" <b>", 0.125)], [("(e)", 0.96), (" q", 0.02)], 0.04),
]


def side_by_side(monkeypatch, **values):
    """The panel over two models that say what a test gives them, and what they were asked."""
    asked = []

    def stream(model, tokenizer, row, settings, tuned, stop):
        asked.append((model, tokenizer, row, settings, tuned, stop))
        number = 1 + tuned
        yield generate.Answer("half", 1, 0.1, 0.1)
        yield generate.Answer(
            f"answer {number}",
            7 * number,
            0.25 * number,
            0.5,
            left=12.25 * number,
            turned=3 * number,
        )

    def along(model, tokenizer, row, settings, text):
        asked.append(("along", row, settings, text))
        return STEPS

    monkeypatch.setattr(generate, "stream", stream)
    monkeypatch.setattr(generate, "next_tokens_along", along)
    settings = validate(values)
    return panels.SideBySide("a model", "a tokenizer", settings), asked, settings


def ask(chat) -> None:
    chat.start()
    chat.worker.join(60)
    assert not chat.worker.is_alive()


def test_side_by_side_shows_what_both_said_and_what_it_cost(monkeypatch):
    chat, asked, settings = side_by_side(
        monkeypatch, temperature=0.5, top_p=0.25, seed=3, repetition_penalty=1.5
    )
    assert chat.prompt.value == settings.prompts[0]
    starts = {name: control.value for name, control in chat.controls.items()}
    assert starts == {"temperature": 0.5, "top_p": 0.25, "repetition_penalty": 1.5, "seed": 3}
    ends = {name: (control.min, control.max) for name, control in chat.controls.items()}
    assert ends == {
        "temperature": (0, 2),
        "top_p": (0.05, 1),
        "repetition_penalty": (1, 2),
        "seed": (0, 2**31 - 1),
    }
    assert [box.placeholder for box in chat.answers.values()] == ["no answer yet", "no answer yet"]
    assert [box.description for box in chat.answers.values()] == ["base model", "tuned model"]
    chat.prompt.value = "Where?\nHere."
    chat.controls["temperature"].value = 0.75
    chat.controls["seed"].value = 11
    ask(chat)
    assert {name: box.value for name, box in chat.answers.items()} == {
        "base": "answer 1",
        "tuned": "answer 2",
    }
    assert {name: cost.value for name, cost in chat.costs.items()} == {
        "base": "7 tokens, 14 tokens/s\nfirst token after 250 ms\n"
        "12.2 tokens to choose from\n3 choices turned by the penalty",
        "tuned": "14 tokens, 28 tokens/s\nfirst token after 500 ms\n"
        "24.5 tokens to choose from\n6 choices turned by the penalty",
    }
    assert chat.positions.value.split("\n") == [
        "' park' · 2.3 bits apart · base: ' home' 50% ' up' 25% · tuned: ' park' 88% '\\n' 6%",
        "'(end)' · 0.0 bits apart · base: '.' 75% ' <b>' 12% · tuned: '(e)' 96% ' q' 2%",
    ]
    assert chat.note.value == "done"
    first = (
        "Where?\nHere.\n  {'temperature': 0.75, 'top_p': 0.25, 'repetition_penalty': 1.5, 'seed': 11}"
        "\n  base: answer 1\n  tuned: answer 2\n\n"
    )
    assert chat.history.value == first
    for (model, tokenizer, row, used, tuned, stop), expected in zip(
        asked[:2], (False, True), strict=True
    ):
        assert (model, tokenizer) == ("a model", "a tokenizer")
        assert row == {"instruction": "Where?", "input": "Here."}
        assert used == settings.replace(temperature=0.75, seed=11)
        assert tuned is expected
        assert stop is chat.stopping
    assert asked[2] == ("along", row, used, "answer 2")
    chat.prompt.value = "Who?"
    ask(chat)
    assert chat.history.value.startswith("Who?\n  {")
    assert chat.history.value.endswith(f"\n\n{first}"), "older questions stay below"


def test_side_by_side_shows_that_it_is_at_work(monkeypatch):
    chat, *_ = side_by_side(monkeypatch)
    real, seen = generate.stream, []

    def look(model, tokenizer, row, settings, tuned, stop):
        name = ("base", "tuned")[tuned]
        seen.append((chat.note.value, chat.ask.disabled, chat.stop_button.disabled))
        seen.append((chat.answers[name].value, chat.costs[name].value))
        yield from real(model, tokenizer, row, settings, tuned, stop)

    monkeypatch.setattr(generate, "stream", look)
    for _ in range(2):
        ask(chat)
        assert (chat.ask.disabled, chat.stop_button.disabled) == (False, True)
    at_work = ("answering", True, False)
    assert seen == [at_work, ("", "")] * 4, "what was said before is taken away first"


def test_side_by_side_says_that_it_was_stopped(monkeypatch):
    chat, asked, _ = side_by_side(monkeypatch)
    real = generate.stream

    def stopped(*given):
        yield from real(*given)
        chat.stop_button.click()

    monkeypatch.setattr(generate, "stream", stopped)
    ask(chat)
    assert chat.answers["base"].value == "answer 1"
    assert chat.answers["tuned"].value == "", "the second model is not asked any more"
    assert chat.note.value == "stopped"
    assert len(asked) == 1, "nor looked at along an answer that it has not given"
    assert (chat.ask.disabled, chat.stop_button.disabled) == (False, True)


def test_side_by_side_tells_of_errors(monkeypatch):
    chat, *_ = side_by_side(monkeypatch)

    def broken(*_):
        raise ValueError("x" * 300)

    monkeypatch.setattr(generate, "stream", broken)
    ask(chat)
    assert chat.note.value == f"ValueError: {'x' * 300}"
    assert chat.history.value == chat.positions.value == ""


def test_side_by_side_is_true_of_the_pocket_model():
    """Greedy answers by plain transformers, probabilities and divergence by their definitions in
    float64.
    """
    settings = validate({"adapter": "pocket", "max_new_tokens": 6})
    model = adapters.load_adapter(load.load_base(settings), adapters.find_adapter(settings)[0])
    tokenizer = load.load_tokenizer(settings)
    chat = panels.SideBySide(model, tokenizer, settings)
    chat.prompt.value = "Where is Anna?\nAnna went to the park."
    ask(chat)
    row = {"instruction": "Where is Anna?", "input": "Anna went to the park."}
    prompt = tokenizer(data.prompt_of(row, settings.prompt_template), return_tensors="pt")[
        "input_ids"
    ]
    prompt = prompt.to(model.device)
    with torch.no_grad():
        tuned = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        with model.disable_adapter():
            base = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    for name, out in (("base", base), ("tuned", tuned)):
        new = out[0, prompt.shape[1] :]
        assert chat.answers[name].value == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert chat.costs[name].value.startswith(f"{len(new)} tokens, ")
    text = tokenizer(chat.answers["tuned"].value, add_special_tokens=False)["input_ids"]
    whole = torch.cat([prompt, torch.tensor([text], device=model.device)], dim=1)
    with torch.no_grad():
        tuned_logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 :].double()
        with model.disable_adapter():
            base_logits = model(input_ids=whole).logits[0, prompt.shape[1] - 1 :].double()
    lines = chat.positions.value.split("\n")
    tokens = [*(tokenizer.decode([number]) for number in text), "(end)"]
    for line, token, of_base, of_tuned in zip(
        lines, tokens, base_logits, tuned_logits, strict=True
    ):
        p, q = of_tuned.softmax(0), of_base.softmax(0)
        bits = (p * (p / q).log()).sum().item() / math.log(2)
        said, apart, *sides = line.split(" · ")
        assert said == repr(token)
        assert float(apart.split()[0]) == pytest.approx(bits, abs=0.051)  # written with one digit
        for side, name, chances in zip(sides, ("base", "tuned"), (q, p), strict=True):
            values, best = chances.topk(3)
            for number, share in zip(best.tolist(), values.tolist(), strict=True):
                before, after = side.split(f"{tokenizer.decode([number])!r} ", maxsplit=1)
                assert before.startswith(f"{name}: ")
                assert float(after.split("%")[0]) == pytest.approx(
                    100 * share, abs=0.51
                )  # whole percents
