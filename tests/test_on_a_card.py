"""What was measured on a card (`recorded/gpu.json`) against what the kit says of cards: an
independent reference, since the card knows nothing of the ledger.
"""

import json
import sys
from pathlib import Path

import pandas
import pytest
import recorded_tables
import torch
from conftest import ROOT

from qlora_nb import cards, recorded
from qlora_nb.memory import budget, dry_run, ledger
from qlora_nb.memory.plan import Plan, plan_of
from qlora_nb.model import configs
from qlora_nb.settings import validate
from qlora_nb.theory import paging

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu

RECORD = json.loads(Path(gpu.TARGET).read_text(encoding="utf-8"))
WHOLE = RECORD["out of memory"]["batch 4 and 1"]["without a cap"]


def planned(size: str = "12b", **values) -> Plan:
    how = {"profile": "full", "compute_dtype": "bfloat16", "gradient_accumulation_steps": 2}
    return plan_of(validate({**how, **values}), config=configs.pythia_config(size), on_gpu=True)


def torch_bytes(plan: Plan) -> int:
    """What torch's allocator should hold at the peak: all lines but CUDA's, less what is paged."""
    found = budget.peak(plan)
    bits = 8 if "8bit" in plan.optim else 32
    paged, _ = paging.paged_bytes(ledger.trained_numels(plan), bits)
    return found.total_bytes - found[budget.CUDA] - paged + budget.WORKSPACES


def test_the_constants_are_those_of_the_record():
    counts = RECORD["machine"]["NVML beside CUDA"]["a product"]
    assert counts["NVML, this process"] == counts["CUDA, all"]
    assert counts["NVML, this process"] - counts["reserved by torch"] == cards.CONTEXT_BYTES


@pytest.mark.parametrize("name", RECORD["peaks"])
def test_peaks_of_12b_are_predicted(name):
    found = RECORD["peaks"][name]
    plan = planned(**found["values"])
    assert torch_bytes(plan) == pytest.approx(found["allocated"], rel=0.01)
    short = "512" in name
    assert budget.peak(plan).total_bytes == pytest.approx(
        found["process"], rel=0.01 if short else 0.04
    )
    changing = budget.peak(plan).sum(budget.CHANGING)
    reserve = (found["reserved"] - found["allocated"]) / changing
    if short:
        assert reserve == pytest.approx(budget.SLACK, abs=0.025)


def test_whole_pages_of_large_states_to_the_byte():
    """What the process holds besides torch's memory, the context and the states themselves is what
    it holds after loading alone, and the ends of pages.
    """
    found = RECORD["peaks"]["r 64, 512 tokens, as profile full"]
    plan = planned()
    numels = ledger.trained_numels(plan)
    paged, _ = paging.paged_bytes(numels)
    loaded = RECORD["loading"]["from the copy"]

    def other(one):
        return one["process"] - one["reserved"] - one["context"]

    ends = other(found) - paged - other(loaded)
    assert ends == pytest.approx(paging.page_waste(numels), abs=paging.PAGE_BYTES)


@pytest.mark.parametrize("rows", ["4", "2", "1"])
def test_activations_without_checkpointing_are_predicted(rows):
    """A GPU's dropout keeps a byte an element: with the four of a CPU's this is 10 % to 20 % off."""
    plan = planned(
        "410m",
        per_device_train_batch_size=int(rows),
        gradient_accumulation_steps=4 // int(rows),
        gradient_checkpointing=False,
        loss_chunk=0,
    )
    assert torch_bytes(plan) == pytest.approx(WHOLE[rows]["allocated"], rel=0.02)


def test_float16_keeps_a_stream_in_float32():
    """As under autocast on a T4: a block's input then has four bytes a number."""
    found = RECORD["t4"]["2.8b"]
    settings = validate(found["values"]).replace(gradient_accumulation_steps=2)
    plan = plan_of(settings, config=configs.pythia_config("2.8b"), on_gpu=True)
    assert plan.autocast
    n_numbers = plan.batch * plan.length * plan.config.hidden_size
    assert dry_run.dry_run(plan).kept == 4 * n_numbers
    assert torch_bytes(plan) == pytest.approx(found["allocated"], rel=0.025)
    assert budget.peak(plan).total_bytes == pytest.approx(found["process"], rel=0.01)


@pytest.mark.parametrize(
    ("values", "on_gpu", "train"),
    [
        ({"compute_dtype": "bfloat16"}, True, True),
        ({"compute_dtype": "float16"}, True, False),
        ({"compute_dtype": "float32"}, False, True),
    ],
)
def test_elsewhere_nothing_is_cast(values, on_gpu, train):
    settings = validate({"profile": "full", **values})
    plan = plan_of(settings, train, configs.pythia_config("410m"), on_gpu=on_gpu)
    assert not plan.autocast
    found = dry_run.dry_run(plan)
    size = torch.tensor([], dtype=plan.rest_dtype).element_size()
    assert found.kept in (0, plan.batch * plan.length * plan.config.hidden_size * size)


def test_families_without_torchs_norm_keep_their_own_stream():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    plan = Plan(config, length=8, r=4, autocast=True)
    assert dry_run.dry_run(plan).kept == 8 * 64 * 2


def test_everything_that_was_tried_worked():
    for name, options in RECORD["pocket"].items():
        for option, found in options.items():
            assert found["the saved adapter answers the same"], (name, option)
            assert found["computes in"] == f"torch.{name}"
            assert found["off float32 (nats)"] < (0.06 if name == "bfloat16" else 0.003)
    resumed = RECORD["resume"]["410m"]
    assert resumed["losses"] == resumed["losses resumed"]
    pages = resumed["states in pages, states of 100,000 numbers"]
    assert all(paged == large > 0 for run in pages.values() for paged, large in run)
    memory = RECORD["out of memory"]["batch 4 and 1"]
    assert memory["bytes that stay"] == 0
    for turn in ("first", "again"):
        assert memory[f"four rows, {turn}"]["rows in a pass"] == 2
        assert "memory ran out" in memory[f"one row, {turn}"]["refused"]


def test_notebook_table_reads_the_record():
    rows = json.loads((recorded.FOLDER / "gpu_table.json").read_text(encoding="utf-8"))
    table = pandas.DataFrame(rows).T
    _, where = recorded.read("gpu")
    assert rows == recorded_tables.on_a_card()
    assert "H100" in where
    assert len(table) == len(RECORD["peaks"])
    for name, found in RECORD["peaks"].items():
        row = table.loc[f"pythia-12b, {name}"]
        assert row["measured (GiB)"] == found["process"] / cards.GIB
        assert row["predicted before (GiB)"] == found["predicted"] / cards.GIB
        now = budget.peak(planned(**found["values"])).total_bytes
        assert row["off (%)"] == pytest.approx(100 * (now / found["process"] - 1))
