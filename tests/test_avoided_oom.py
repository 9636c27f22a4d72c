"""Notebook 05's CUDA cells, executed on a CPU with a stand-in for torch's capped allocator: every
branch runs.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import avoided_oom

from qlora_nb import recorded

FREE, TOTAL, HELD = 64 * 2**20, 256 * 2**20, 2**20


class Card:
    """A simulated card: torch's part is capped, managed memory is not."""

    def __init__(self):
        self.fraction, self.history = 1.0, []

    def cap(self, fraction: float) -> None:
        self.fraction = fraction
        self.history.append(fraction)

    def allocate(self, n_tensors: int, numel: int) -> None:
        """Raise as torch does if so many float32 tensors do not fit under the cap."""
        if HELD + 4 * n_tensors * numel > self.fraction * TOTAL:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")


@pytest.fixture
def card(monkeypatch):
    card = Card()
    for name, value in {
        "is_available": lambda: True,
        "mem_get_info": lambda: (FREE, TOTAL),
        "memory_reserved": lambda: HELD,
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "set_per_process_memory_fraction": card.cap,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return card


def optimizers(card: Card, broken: bool = False) -> dict[str, type]:
    """AdamW with both states under the cap, and one whose states lie outside it."""

    class Plain(torch.optim.SGD):
        def step(self):
            (parameter,) = self.param_groups[0]["params"]
            card.allocate(4, parameter.numel())

    class Paged(torch.optim.SGD):
        def step(self):
            (parameter,) = self.param_groups[0]["params"]
            card.allocate(2, parameter.numel())
            if broken:
                raise RuntimeError("another fault")
            self.state[parameter]["state1"] = SimpleNamespace(is_paged=True)

    Plain.__name__, Paged.__name__ = "AdamW", "PagedAdamW32bit"
    return {"AdamW": Plain, "PagedAdamW32bit": Paged}


def test_plain_fails_and_paged_finishes(card, monkeypatch):
    made = optimizers(card)
    monkeypatch.setattr(torch.optim, "AdamW", made["AdamW"])
    space = avoided_oom.run_cells("cpu", bnb=SimpleNamespace(optim=SimpleNamespace(**made)))
    assert space["avoided"] == {
        "AdamW": {"finishes": False, "states in pages": False},
        "PagedAdamW32bit": {"finishes": True, "states in pages": True},
    }
    assert 4 * 4 * space["numel"] <= FREE // 4, "the card itself would be oversubscribed"
    assert space["numel"] >= 100_000, "too small to be paged"
    assert card.history[1::2] == [1.0, 1.0], "the cap stays after the cell"
    assert all(fraction < 1 for fraction in card.history[::2])


def test_another_fault_is_not_swallowed_and_lifts_the_cap(card, monkeypatch):
    made = optimizers(card, broken=True)
    monkeypatch.setattr(torch.optim, "AdamW", made["AdamW"])
    with pytest.raises(RuntimeError, match="another fault"):
        avoided_oom.run_cells("cpu", bnb=SimpleNamespace(optim=SimpleNamespace(**made)))
    assert card.history[-1] == 1.0


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_and_a_record_it_says_so(no_gpu, capsys):
    nothing = SimpleNamespace(read=lambda name: None)
    assert avoided_oom.run_cells("cpu", recorded=nothing)["avoided"] is None
    assert capsys.readouterr().out.strip() == "not measured on a GPU yet"


def test_without_a_gpu_the_recorded_run_is_shown(no_gpu, capsys):
    run = {"AdamW": {"finishes": False}}
    one = SimpleNamespace(read=lambda name: ({"avoided": run}, f"recorded {name}"))
    space = avoided_oom.run_cells("cpu", recorded=one)
    assert space["avoided"] == run
    assert "recorded avoided_oom" in capsys.readouterr().out


def test_the_script_writes_nothing_without_a_gpu(no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(avoided_oom, "TARGET", tmp_path / "x.json")
    assert avoided_oom.main() == 1
    assert not (tmp_path / "x.json").exists()
    assert "nothing is written" in capsys.readouterr().out


def test_the_script_writes_a_record_that_the_notebook_can_tell(card, monkeypatch, tmp_path, capsys):
    made = optimizers(card)
    monkeypatch.setattr(torch.optim, "AdamW", made["AdamW"])
    monkeypatch.setattr(avoided_oom, "bnb", SimpleNamespace(optim=SimpleNamespace(**made)))
    cells = avoided_oom.run_cells
    monkeypatch.setattr(avoided_oom, "run_cells", lambda device: cells("cpu"))
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    monkeypatch.setattr(avoided_oom, "TARGET", tmp_path / "avoided_oom.json")
    assert avoided_oom.main() == 0
    record = json.loads(avoided_oom.TARGET.read_text())
    assert record["avoided"]["PagedAdamW32bit"]["finishes"]
    assert {
        "date",
        "commit",
        "hardware",
        "versions",
        "seeds",
        "numel",
        "total_bytes",
    } <= record.keys()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    avoided_oom.run_cells("cpu")
    assert f"recorded {record['date'][:10]}" in capsys.readouterr().out
