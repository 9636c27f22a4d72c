"""The GPU benchmark's measurements on the pocket model and this CPU: the same code, so that it runs
when a card is at hand.
"""

import json
import subprocess
import sys

import pytest
import torch

from qlora_nb import sources
from qlora_nb.memory import ledger
from qlora_nb.memory.plan import Plan
from qlora_nb.model import configs
from qlora_nb.settings import validate


@pytest.fixture(scope="module")
def gpu(root):
    sys.path.insert(0, str(root / "benchmarks"))
    import gpu

    yield gpu
    sys.path.remove(str(root / "benchmarks"))


def test_every_setting_of_it_is_valid(gpu):
    for values in [*gpu.PEAKS.values(), *gpu.ANSWERS.values(), gpu.SPEED]:
        validate({"profile": "full", **values})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["r 64, 512 tokens, as profile full", "r 16, 512 tokens, every option"]
)
def test_a_peak(gpu, name):
    found = gpu.peak("pocket", gpu.PEAKS[name] | {"max_length": 64, "max_steps": 2})
    assert found["predicted"] == sum(found["predicted_lines"].values()) > 2_000_000
    assert found["allocated"] == found["process"] == 0 or torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["kit", "common", "pasted"])
def test_a_speed(gpu, monkeypatch, who):
    monkeypatch.setitem(gpu.SPEED, "max_steps", 2)
    monkeypatch.setitem(gpu.SPEED, "max_length", 64)
    assert gpu.speed("pocket", who)["tokens_per_s"] > 0


@pytest.mark.slow
def test_an_answer_and_a_load(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    found = gpu.answer("pocket", {"max_length": 96, "max_new_tokens": 8})
    assert found["first_token_s"] > 0
    assert found["predicted"] > 2_000_000
    assert {"tokens_per_s", "allocated", "reserved", "process"} < set(found)
    config = configs.config_of("pocket")
    held = ledger.predict(Plan(config, rest_dtype=torch.float32))
    cache = 992 * 2 * config.num_hidden_layers * config.hidden_size * 4
    assert (
        found["bytes_read_per_token"]
        == held.total_bytes - held["buffers"] - 4 * config.vocab_size * config.hidden_size + cache
    )
    assert found["share_of_limit"] > 0
    first = gpu.load_seconds("pocket", True)["held"]
    assert first == gpu.load_seconds("pocket", True)["held"] > 1_000_000


def test_a_failure_is_told_and_not_measured(gpu, root, monkeypatch):
    assert "error" in gpu.apart("peak", "/nowhere/at/all", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_written(root):
    command = [sys.executable, str(root / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr
    kept = root / "qlora_nb" / "recorded" / "gpu.json"
    assert not kept.is_file() or json.loads(kept.read_text())["hardware"]["gpus"]
