"""docs/scale.md: every number of its table by the kit's own functions, every command by its help."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from conftest import ROOT
from typer.testing import CliRunner

from qlora_nb import recorded
from qlora_nb.cli import app
from qlora_nb.memory import estimates, shares
from qlora_nb.model import configs
from qlora_nb.settings import validate

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"\| pythia-([\d.]+b), profile `(\w+)`, (\d) \| (\d) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|"
)
ROWS = ROW.findall(PAGE)


def test_the_table_is_read_whole():
    assert len(ROWS) == PAGE.count("| pythia-") == 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:5]))
def test_what_each_card_holds_sends_and_computes(row):
    size, profile, rows, n, shard, holds, sends, operations = row
    given = {"profile": profile, "per_device_train_batch_size": int(rows)}
    given["gradient_accumulation_steps"] = 16 // int(rows)
    if shard == "fsdp":
        given["optim"] = "adamw_torch"
    config = configs.pythia_config(size)
    plan, peak, sent = shares.planned(validate(given), int(n), shard, config, on_gpu=True)
    assert f"{peak.total_gib:.2f}" == holds
    assert f"{sent / 2**30:.2f}" == sends
    assert f"{estimates.step_flops(plan) / 1e12:.0f}" == operations


def test_what_the_text_says_of_the_table():
    by_key = {row[:5]: row for row in ROWS}
    eight = float(by_key["12b", "full", "1", "8", "none"][6])
    assert "eight cards send 1.2 GiB in a step, a tenth of a second" in PAGE
    assert round(eight, 1) == 1.2
    assert round(eight * 2**30 / 12e9, 1) == 0.1
    one = float(by_key["12b", "full", "1", "2", "fsdp"][6])
    four = float(by_key["12b", "full", "4", "2", "fsdp"][6])
    assert one / four == pytest.approx(4)
    assert round(eight * 2**30 / (10e9 / 8)) == 1  # seconds over 10 Gbit/s


def test_every_command_and_option_exists():
    commands = re.findall(r"^qlora-nb (\w+)([^\n#]*)", PAGE, re.M)
    assert len(commands) >= 5
    for name, rest in commands:
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert told.exit_code == 0, name
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in told.output, f"{name} has no {option}"


def test_the_plan_of_two_cards_as_json():
    words = ["plan", "--profile", "full", "--processes", "2", "--shard", "fsdp", "--gpu-gib", "8"]
    words += ["--json", "-p", "optim", "adamw_torch", "-p", "model_id", "pocket"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["total_bytes"] == sum(found["peak"].values())
    assert (found["processes"], found["shard"]) == (2, "fsdp")


def test_what_notebook_10_says_of_the_recorded_sweep():
    record = json.loads((recorded.FOLDER / "sweep.json").read_text(encoding="utf-8"))
    board = {(row["r"], row["learning_rate"]): row for row in record["leaderboard"]}
    assert len(board) == 4
    assert all(row["seeds"] == 3 and not row["unfinished"] for row in board.values())

    def interval(row):
        return row["loss (nats)"] - row["±"], row["loss (nats)"] + row["±"]

    higher = [interval(board[r, 6e-3]) for r in (2, 8)]
    lower = [interval(board[r, 2e-3]) for r in (2, 8)]
    cells = nbformat.read(ROOT / "notebooks" / "10_scale_out.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells)
    assert "no interval of the one pair reaches into the other" in text
    assert max(high for _, high in higher) < min(low for low, _ in lower)
    assert "at either rate the two intervals overlap" in text
    for first, second in (higher, lower):
        assert max(first[0], second[0]) < min(first[1], second[1])
    for name, rest in re.findall(r"`qlora-nb (\w+)([^`]*)`", text):
        told = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in told.output, f"{name} has no {option}"
