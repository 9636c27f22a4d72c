"""What was measured at pythia-12b's true size on a CPU (`benchmarks/true_size.py`, which takes hours
and 32 GB of disk), and the random weights that it was measured with.
"""

import json
import sys
from pathlib import Path

import pandas
import pytest
import recorded_tables
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qlora_nb import cards, recorded
from qlora_nb.memory import budget, ledger
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs
from qlora_nb.pythia import PYTHIA

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import random_weights

RECORD, _ = recorded.read("true_size")
CASES = tuple(RECORD["cases"])


@pytest.fixture
def cases():
    return RECORD["cases"]


def test_the_record_is_of_whole_cases(cases):
    assert CASES[0] == "12b, r 16"
    for case, found in cases.items():
        assert found["parameters"] == PYTHIA[case.split(",")[0]].n_parameters
        assert found["measured"]["clean"] is True


@pytest.mark.parametrize("case", CASES)
def test_the_peak_was_predicted_within_a_percent(cases, case):
    """The prediction is made anew: it is today's ledger that the measurement is laid beside."""
    trained = cases[case]["train"]
    size, r = case.split(", r ")
    plan = Plan(
        configs.pythia_config(size),
        length=trained["measured_at"]["tokens"],
        r=int(r),
        lora_dropout=0.05,
        dtype=torch.float32,
        rest_dtype=torch.float32,
        loss_chunk=128,
        on_gpu=False,
    )
    predicted = budget.peak(plan).total_bytes
    measured = trained["lines"]["peak"]["measured"]
    assert predicted == trained["lines"]["peak"]["predicted"]
    assert abs(predicted / measured - 1) < 0.01
    for name, line in trained["lines"].items():
        if name in ledger.ORDER:  # what stays: to the byte
            assert line["predicted"] == line["measured"], name


def test_what_is_loaded_is_what_was_predicted_to_the_byte(cases):
    loads = [found[stage] for found in cases.values() for stage in ("load", "from the copy")
             if stage in found]  # fmt: skip
    assert len(loads) >= 2
    for found in loads:
        assert found["static_bytes_apart"] == 0
        assert found["static_predicted"] == found["static_measured"]
    first, copy = cases["12b, r 16"]["load"], cases["12b, r 16"]["from the copy"]
    assert copy["seconds"] < first["seconds"] / 5
    assert copy["anonymous_bytes"] < first["anonymous_bytes"] / 5


def test_the_killed_run_ended_with_the_same_bits(cases):
    found = cases["12b, r 16"]
    assert found["killed"]["exit_code"] == -9
    assert found["resumed"]["adapter_sha256"] == found["train"]["adapter_sha256"]
    assert found["resumed"]["losses"] == found["train"]["losses"]


def test_a_machine_with_less_memory_than_the_model_takes_the_same_step(cases):
    """Mapped weights are read from the disk again where they do not stay in memory."""
    found = cases["12b, r 16"]
    little = found["one step in 6 GiB"]
    assert little["most_bytes"] <= little["limit_bytes"] < found["load"]["static_measured"]
    assert little["exit_code"] == 0
    assert little["losses"] == found["train"]["losses"][:1]


def test_a_step_is_estimated_within_a_factor_of_two_or_so(cases):
    """Twelve times the size of the step is what an estimate must tell apart; a busy machine
    doubles any step.
    """
    for case, found in cases.items():
        seconds = found["train"]["seconds_at_each_step"]
        ratio = seconds[-1] / len(seconds) / found["train"]["estimated_seconds_a_step"]
        assert 0.5 < ratio < 2.5, case


def test_the_claim_says_what_was_measured(cases):
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs" / "claims.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if "at pythia-12b's true size" in line]
    found = cases["12b, r 16"]
    peak = found["train"]["lines"]["peak"]
    for said in (
        f"{found['load']['static_measured']:,} bytes predicted and held",
        f"{peak['predicted'] / 1e9:.3f} GB predicted and {peak['measured'] / 1e9:.3f} measured",
        f"{found['load']['anonymous_bytes'] / 2**30:.1f} GiB beside mapped files",
        f"from the 4-bit copy {found['from the copy']['anonymous_bytes'] / 2**30:.2f}",
    ):
        assert said in row


def test_the_table_shows_the_record(cases):
    rows = json.loads((recorded.FOLDER / "true_size_table.json").read_text(encoding="utf-8"))
    table = pandas.DataFrame(rows).T
    _, where = recorded.read("true_size")
    assert rows == recorded_tables.at_true_size()
    assert list(table.index) == [f"pythia-{case}" for case in cases]
    for case, row in zip(cases, table.to_dict("records"), strict=True):
        trained = cases[case]["train"]
        peak = trained["lines"]["peak"]
        assert row["step, measured (s)"] == pytest.approx(
            trained["seconds_at_each_step"][-1] / len(trained["losses"])
        )
        assert row["step, estimated (s)"] == trained["estimated_seconds_a_step"]
        assert row["peak, measured (GiB)"] == peak["measured"] / cards.GIB
        assert row["peak, predicted (GiB)"] == peak["predicted"] / cards.GIB
        wanted = 100 * (peak["predicted"] / peak["measured"] - 1)
        assert row["off (%)"] == pytest.approx(wanted, abs=1e-3)
    assert "cores" in where


def test_random_weights_are_a_whole_model(tmp_path):
    folder = Path(random_weights.random_pythia("14m", tmp_path))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.num_parameters() == PYTHIA["14m"].n_parameters
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert set(parameter.unique().tolist()) <= {0.0, 1.0}, name


def test_random_weights_are_written_a_block_at_a_time_and_the_same_again(tmp_path):
    made = [
        Path(random_weights.random_pythia("14m", tmp_path / part, at_once))
        for part, at_once in (("a", 1), ("b", 3))
    ]
    index = json.loads((made[0] / random_weights.INDEX).read_text())
    per_file: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        parts = name.split(".")
        block = parts[parts.index("layers") + 1] if "layers" in parts else parts[-2]
        per_file.setdefault(file, set()).add(block)
    assert all(len(blocks) == 1 for blocks in per_file.values())
    assert len(per_file) == PYTHIA["14m"].n_layers + 3  # embedding, last norm, head
    for file in per_file:
        with (
            safe_open(made[0] / file, "pt") as first,
            safe_open(made[1] / file, "pt") as second,
        ):
            for name in first.keys():  # noqa: SIM118
                assert torch.equal(first.get_tensor(name), second.get_tensor(name))
    before = (made[0] / random_weights.INDEX).stat().st_mtime_ns
    random_weights.random_pythia("14m", tmp_path / "a")
    assert (made[0] / random_weights.INDEX).stat().st_mtime_ns == before


def test_random_weights_are_refused_where_the_disk_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(
        random_weights.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e9})
    )
    with pytest.raises(SystemExit, match=r"23\.7 GB are needed"):
        random_weights.random_pythia("12b", tmp_path)
