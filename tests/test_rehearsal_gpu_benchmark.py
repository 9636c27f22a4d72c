"""The GPU benchmark's CUDA branches on a CPU: `rehearsal.card` stands for the card, so losses are
real and bytes are what the stand-ins say.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest
import rehearsal
import torch
from conftest import ROOT
from test_rehearsal_cards import Card, Nvml, cuda_of
from transformers import GPTNeoXForCausalLM

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_card
import gpu_training
import provenance
from gpu_training import open_cells

from qlora_nb import cards, recorded
from qlora_nb.settings import validate

GIB = cards.GIB
T4, AMPERE = (7, 5), (8, 6)


# ---- which card, and what is held of it ----------------------------------------------------------


def test_rehearsal_the_benchmark_watches_the_card_that_is_used(monkeypatch):
    """CUDA_VISIBLE_DEVICES=1: torch's only card is NVML's second. Others hold 6 GiB of it, CUDA's
    context takes 0.5, training up to 4 more.
    """
    idle, used = Card("idle", "GPU-1"), Card("used", "GPU-2", free=18)
    Nvml(monkeypatch, idle, used)
    cuda_of(monkeypatch, used)
    calls = []

    def synchronize():
        calls.append(1)
        if len(calls) == 1:
            used.free -= 0.5

    stand_ins = {
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3 * GIB,
        "max_memory_reserved": lambda: int(3.5 * GIB),
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, function)
    watch = gpu_card.Watch("2")
    assert watch.context == GIB // 2
    watch.start()
    used.free = 13.5
    already = used.asked
    while used.asked < already + 2:
        watch.ended.wait(0.005)
    used.free = 15.0
    assert watch.stop() == {
        "allocated": 3 * GIB,
        "reserved": int(3.5 * GIB),
        "process": int(4.5 * GIB),
        "context": GIB // 2,
    }
    assert idle.asked == 0


def test_rehearsal_the_three_peaks_begin_together(monkeypatch):
    """What loading held before is none of a training's: torch's peaks are reset where NVML's
    sampling begins.
    """
    rehearsal.card(monkeypatch, AMPERE)
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("cache given back"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    monkeypatch.setattr(gpu_card.Watch, "_sample", lambda self: order.append("sampling"))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    watch = gpu_card.Watch()
    for _ in range(2):
        watch.start()
        watch.stop()
    assert order == 2 * ["cache given back", "reset", "sampling"]


def test_rehearsal_without_nvml_torchs_peaks_are_known(monkeypatch):
    rehearsal.card(monkeypatch, AMPERE)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (_ for _ in ()).throw(pynvml.NVMLError(1)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    watch = gpu_card.Watch("2")
    watch.start()
    assert watch.stop() == {"allocated": 0, "reserved": 7, "process": None, "context": None}


@pytest.mark.parametrize(
    ("prefix", "name"), [("GPU-", "H100"), ("MIG-", "H100 MIG 2g.20gb")], ids=["card", "instance"]
)
def test_rehearsal_a_card_is_found_by_its_uuid(monkeypatch, prefix, name):
    """Whichever number NVML gives it; of an instance its own size."""
    used = Card(name, f"{prefix}77", 20, capability=(9, 0))
    Nvml(monkeypatch, Card("other", "GPU-1", 80), used)
    cuda_of(monkeypatch, used)
    assert gpu_card.seen() == {
        "card": name,
        "uuid": "77",
        "total_bytes": 20 * GIB,
        "NVML_bytes": 20 * GIB,
        "is_mig": prefix == "MIG-",
    }


def test_rehearsal_a_choice_that_hides_every_card_is_told(monkeypatch):
    Nvml(monkeypatch, Card("H100", "GPU-1", 80))
    cuda_of(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    found = gpu_card.seen()
    assert found["card"] is None
    assert "CUDA_VISIBLE_DEVICES='MIG-1'" in found["problem"]


def test_rehearsal_each_way_to_choose_a_card_has_a_process(monkeypatch):
    """The real children: here none of them finds a card."""
    run, asked = subprocess.run, []

    def run_noting(command, **options):
        asked.append(options["env"]["CUDA_VISIBLE_DEVICES"])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", run_noting)
    found = gpu_card.chosen_cards(SimpleNamespace(uuid="ab-12"))
    assert asked == ["0", "GPU-ab-12", "MIG-ab-12", ""]
    assert list(found) == ["0", "GPU-UUID", "MIG-UUID", ""]
    assert all("error" not in one for one in found.values())


def test_rehearsal_two_counts_of_one_card(monkeypatch):
    rehearsal.card(monkeypatch, AMPERE, total_bytes=24 * GIB, free_bytes=20 * GIB)
    used = Card("RTX 3090", "GPU-1", 24, free=19)
    Nvml(monkeypatch, used)
    about = SimpleNamespace(total_memory=23 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_card, "MIB", 1024)  # not really a GiB
    found = gpu_card.two_counts(gpu_card.Watch("1"))
    assert found["total"] == {"NVML": 24 * GIB, "CUDA": 24 * GIB, "torch": 23 * GIB}
    whens = ("the context", "a tensor of 1 GiB", "a product", "a 4-bit layer")
    for when in whens:
        assert found[when]["NVML, all"] == 5 * GIB
        assert found[when]["CUDA, all"] == 4 * GIB


def test_rehearsal_a_measurement_without_git_and_without_the_kits_metadata(monkeypatch, tmp_path):
    """The commit is not known; what the packages are is."""

    def nothing(*_, **__):
        raise FileNotFoundError("git")

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(subprocess, "run", nothing)
    monkeypatch.setattr(subprocess, "check_output", nothing)
    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    record = provenance.provenance()
    assert record["commit"] is record["clean"] is None
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    said = recorded.read("gpu")[1]
    assert "commit unknown" in said
    assert f"torch {record['versions']['torch']}" in said


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    return gpu_card.Watch()


def short(monkeypatch, **values) -> None:
    """Rows of 48 tokens in float32, whatever an entry asks for."""
    settings_for = gpu_training.settings_for

    def short_settings(folder, **asked):
        return settings_for(folder, **asked, **values).replace(max_length=48)

    monkeypatch.setattr(gpu_training, "settings_for", short_settings)


@pytest.mark.parametrize(("capability", "dtype"), [(T4, "float16"), (AMPERE, "bfloat16")])
def test_rehearsal_of_the_pocket_model_in_16_bit(monkeypatch, watch, capability, dtype):
    seen = rehearsal.card(monkeypatch, capability)
    monkeypatch.setattr(gpu_training, "POCKET_RUN", gpu_training.FEW)
    few = {name: open_cells.OPTIONS[name] for name in ("plain", "every option, packed")}
    monkeypatch.setattr(open_cells, "OPTIONS", few)
    found = gpu_training.pocket(watch, dtype)
    for one in found.values():
        assert one["computes in"] == f"torch.{dtype}"
        assert 0 < one["off float32 (nats)"] < 0.25
        assert one["the saved adapter answers the same"]
    assert bool(seen.scalers) == (dtype == "float16")


def test_rehearsal_of_profile_t4_in_float16(monkeypatch, watch):
    seen = rehearsal.card(monkeypatch, AMPERE)
    short(monkeypatch)
    found = gpu_training.peak(watch, "pocket", {**gpu.T4, "max_steps": 2})
    assert seen.scalers == 1
    assert len(found["losses"]) == 2
    assert "CUDA context, kernels, reserve" in found["predicted_lines"]


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_rehearsal_of_a_resumed_run_counts_its_pages(monkeypatch, watch, optim):
    rehearsal.card(monkeypatch, AMPERE)
    pages = rehearsal.PageManager(monkeypatch)
    short(monkeypatch, r=192, compute_dtype="float32", optim=optim)
    found = gpu_training.resume(watch, "pocket")
    assert found["equal"]
    assert found["steps resumed"] == 2
    counts = found["states in pages, states of 100,000 numbers"]
    should = counts["at once"][0][1]
    assert should > 0
    assert counts == {"at once": [[should, should]] * 4, "resumed": [[should, should]] * 2}
    assert len(pages.asked) == 3 * should, "three optimizers"


def test_rehearsal_of_memory_that_runs_out_under_a_cap(monkeypatch, watch):
    """The cap lies between the peaks of four and two rows, then below that of one; which passes
    fail under it is the stand-in's.
    """
    rehearsal.card(monkeypatch, AMPERE)
    rehearsal.PageManager(monkeypatch)
    short(monkeypatch, r=192, compute_dtype="float32")
    peaks = {4: 900, 2: 700, 1: 600}
    batch = []  # of the newest pass that was not ended
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 400)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[max(batch)])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", batch.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (500, 1000))
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    forward = GPTNeoXForCausalLM.forward

    def needs_memory(self, *args, input_ids=None, **kwargs):
        if torch.is_grad_enabled() and input_ids is not None:
            rows = len(input_ids)
            if fractions and peaks[rows] > 1000 * fractions[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            batch.append(rows)
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", needs_memory)
    found = gpu_training.out_of_memory(watch, "pocket")
    assert fractions == [0.8, 1.0, 0.5, 1.0] * 2
    plain = found["without a cap"]
    assert {n: one["rows in a pass"] for n, one in plain.items()} == {4: 4, 2: 2, 1: 1}
    for when in ("first", "again"):
        one = found[f"four rows, {when}"]
        assert one["rows in a pass"] == 2
        assert one["off (nats)"] < 1e-3
        counts = one["states in pages, states of 100,000 numbers"]
        assert all(paged == large > 0 for paged, large in counts)
        assert "memory ran out" in found[f"one row, {when}"]["refused"]
    after = found["four rows, without a cap again"]
    assert after["rows in a pass"] == 4
    assert after["losses"] == plain[4]["losses"]
    assert found["bytes that stay"] == 0


def test_rehearsal_a_card_is_given_the_whole_of_each_entry(monkeypatch):
    """Rows, dtype and steps are cut where there is no card, and only there."""
    folder = "pocket"
    without = gpu_training.settings_for(folder, max_length=512)
    assert (without.max_length, without.compute_dtype) == (64, "float32")
    rehearsal.card(monkeypatch, AMPERE)
    there = gpu_training.settings_for(folder, max_length=512)
    assert (there.max_length, there.compute_dtype) == (512, "auto")
    assert validate(gpu.T4).per_device_train_batch_size == 4
