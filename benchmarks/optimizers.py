"""A fair race of optimizers, and how rank, learning rate and targets go together.

    python benchmarks/optimizers.py            into qlora_nb/recorded/optimizers.json

The pocket model in NF4 with double quantization, LoRA r 8, 16 rows a step, no weight decay; the
optimizers and the training step are those of notebook 08's own cells. What is made is kept: a call
that was broken off goes on with the runs that are missing.

- grid: every optimizer at the same learning rates (Sophia-G at four ρ besides), one seed;
- race: the two best settings of each, and AdamW at qlora.py's 2e-4, with five seeds;
- ladder: AdamW's best setting with a quarter, half and twice the steps, so that it can be said how
  many of AdamW's steps another optimizer's 80 are worth; the others' best with half the steps;
- rank: AdamW over ranks, targets and full tuning at several rates, the best rate of each with three
  seeds.

Every run has a linear schedule of its own length with an eighth of warm-up. Measured is the
held-out loss (nats) on the same 120 rows.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import bitsandbytes
import numpy as np
import provenance
import torch
from provenance import open_cells
from sixteen_bit import interval
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from qlora_nb.answer import evaluate
from qlora_nb.model import batching, data, load
from qlora_nb.settings import validate
from qlora_nb.theory import sophia

TARGET = provenance.ROOT / "qlora_nb" / "recorded" / "optimizers.json"
NOTEBOOK = provenance.ROOT / "notebooks" / "08_optimizers.ipynb"
OPTIMIZERS = ("AdamW", "AdamW, 8-bit states", "Lion", "Muon", "Sophia-G")
RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2)
RHOS = (0.04, 5.0, 25.0, 100.0)
STEPS = 80
LADDER = (20, 40, 160)
SEEDS = (0, 1, 2, 3, 4)
RANK_SEEDS = (0, 1, 2)
SETUPS = {
    "r 1": ({"r": 1}, (6e-4, 2e-3, 6e-3, 2e-2)),
    "r 64": ({"r": 64}, (6e-4, 2e-3, 6e-3, 2e-2)),
    "attention only": ({"target_modules": "query_key_value,dense"}, (2e-3, 6e-3, 2e-2)),
    "feed-forward only": ({"target_modules": "dense_h_to_4h,dense_4h_to_h"}, (2e-3, 6e-3, 2e-2)),
    "full tuning": ({}, (2e-4, 6e-4, 2e-3, 6e-3)),
}
"""Of the comparison of ranks and targets: what differs, and the learning rates; "r 8" is the
race's.
"""
HELD_OUT = 120
LOOK_EVERY = 10


def cells() -> dict:
    """What notebook 08's cells define."""
    names = {
        "torch": torch,
        "bitsandbytes": bitsandbytes,
        "sophia": sophia,
        "sophia_update": sophia.update,
        "cross_entropy": cross_entropy,
        "get_linear_schedule_with_warmup": get_linear_schedule_with_warmup,
    }
    for tag in ("make-optimizer", "training-steps", "state-bytes"):
        [source] = open_cells.tagged(NOTEBOOK, tag)
        exec(compile(source, f"08, {tag}", "exec"), names)
    return names


CELLS = cells()


def key_of(run: dict) -> str:
    """What a run is called; two runs of one name are the same run."""
    named = ("setup", "optimizer", "lr", "rho", "steps", "seed")
    return " · ".join(f"{name} {run[name]}" for name in named if run.get(name) is not None)


class Track:
    """The data, once, and what every run begins with."""

    def __init__(self):
        self.settings = validate({})
        self.tokenizer = load.load_tokenizer(self.settings)
        _, held_out = data.load(self.settings)
        some = held_out.select(range(HELD_OUT))
        self.held_out = data.tokenize_rows(some, self.tokenizer, self.settings)
        self.collate = batching.collator(self.tokenizer)

    def batches(self, seed: int, steps: int) -> list:
        """The padded rows of every step; none is seen twice."""
        settings = validate({"seed": seed, "max_steps": steps})
        rows, _ = data.load(settings)
        encoded = data.tokenize_rows(rows, self.tokenizer, settings)
        in_order = batching.in_training_order(encoded, settings).to_list()
        return [self.collate(group) for group in batching.groups(in_order, settings.rows_in_a_step)]

    def model(self, run: dict) -> torch.nn.Module:
        """The model of a run, from the beginning."""
        if run["setup"] == "full tuning":
            model = load.load_base(self.settings, four_bit=False).float()
            return model.requires_grad_(True)
        given = SETUPS[run["setup"]][0] if run["setup"] else {}
        settings = validate({**given, "seed": run["seed"]})
        return open_cells.attach_adapter(load.load_base(settings), settings)

    def loss(self, model) -> float:
        """Of the held-out rows (nats a token)."""
        found = evaluate.response_loss(model.eval(), self.tokenizer, self.held_out)
        model.train()
        return found


def race(track: Track, run: dict) -> dict:
    """One run from its first step to its last; ends early where the loss is not finite."""
    model = track.model(run)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = CELLS["make_optimizer"](run["optimizer"], trained, run["lr"], run["rho"])
    batches = track.batches(run["seed"], run["steps"])
    held_out = {}
    for n_steps, loss in enumerate(CELLS["train"](model, optimizer, batches), 1):
        if not math.isfinite(loss):
            break
        if n_steps % LOOK_EVERY == 0 or n_steps == run["steps"]:
            held_out[n_steps] = round(track.loss(model), 5)
    found = {**run, "trained": sum(p.numel() for p in trained)}
    found["state bytes"] = CELLS["state_bytes"](optimizer)
    if run["rho"]:
        found["clipped at the end"] = round(optimizer.clipped(), 4)
    last = held_out.get(run["steps"])
    found["loss"] = last if last is not None and math.isfinite(last) else None
    found["held_out"] = held_out
    return found


def one(optimizer: str, lr: float, rho=None, steps=STEPS, seed=0, setup=None) -> dict:
    """A run before it is made."""
    return {
        "setup": setup,
        "optimizer": optimizer,
        "lr": lr,
        "rho": rho,
        "steps": steps,
        "seed": seed,
    }


class Book:
    """The record: runs that are made, written after each."""

    def __init__(self):
        self.record = {}
        if TARGET.is_file():
            self.record = json.loads(TARGET.read_text(encoding="utf-8"))
        self.head = {key: self.record[key] for key in self.record if key not in ("runs", "summary")}
        if not self.head:
            self.head = provenance.provenance(SEEDS)
        self.runs = self.record.get("runs", {})
        self.track = Track()

    def make(self, runs: list[dict]) -> list[dict]:
        """Make what is missing of these; returns all of them."""
        found = []
        for run in runs:
            key = key_of(run)
            if key not in self.runs:
                begun = time.perf_counter()
                torch.manual_seed(run["seed"])
                self.runs[key] = race(self.track, run)
                took = time.perf_counter() - begun
                print(f"{key}: {self.runs[key]['loss']} ({took:.0f} s)", flush=True)
                self.write({})
            found.append(self.runs[key])
        return found

    def write(self, summary: dict) -> None:
        """The file as it is now."""
        settings = {"r": 8, "steps": STEPS, "rows a step": 16, "held-out rows": HELD_OUT}
        settings |= {"model": "pocket", "rates": RATES, "rhos": RHOS}
        whole = {**self.head, "settings": settings, "summary": summary, "runs": self.runs}
        provenance.write(TARGET, whole)


def by_loss(runs: list[dict]) -> list[dict]:
    """The best first; a run that diverged last."""
    return sorted(runs, key=lambda run: math.inf if run["loss"] is None else run["loss"])


def again(run: dict, **changed) -> dict:
    """The same run with something changed, not made yet."""
    asked = {name: run[name] for name in ("optimizer", "lr", "rho", "steps", "seed", "setup")}
    return one(**{**asked, **changed})


def seconds(track: Track, best: dict[str, dict], rounds: int = 5) -> dict[str, float]:
    """Median seconds of ten steps of each optimizer, one after the other in every round; Sophia's
    estimate is among its ten.
    """
    ready = {}
    for name, run in best.items():
        model = track.model(run)
        trained = [p for p in model.parameters() if p.requires_grad]
        ready[name] = model, CELLS["make_optimizer"](name, trained, run["lr"], run["rho"])
    batches = track.batches(0, STEPS)
    took = {name: [] for name in ready}
    for number in range(rounds):
        for name, (model, optimizer) in ready.items():
            ten = copy.deepcopy(batches[10 * number : 10 * number + 10])
            begun = time.perf_counter()
            for _ in CELLS["train"](model, optimizer, ten):
                pass
            took[name].append((time.perf_counter() - begun) / len(ten))
    return {name: round(statistics.median(all_of), 4) for name, all_of in took.items()}


def worth(loss: float, ladder: dict[int, float]) -> float:
    """How many of AdamW's steps end at this loss, on straight lines between the runs of the ladder
    in log steps and log loss; at most its longest, at least its shortest.
    """
    steps = sorted(ladder)
    falling = [-math.log(ladder[n]) for n in steps]
    falling = list(np.maximum.accumulate(falling))
    return math.exp(np.interp(-math.log(loss), falling, [math.log(n) for n in steps]))


def summary_of(best: dict[str, list], ladders: dict, took: dict) -> dict:
    """Optimizer → its best setting, and what its five seeds say beside AdamW's."""
    adamw = [run["loss"] for run in best["AdamW"]]
    found = {}
    for name, runs in best.items():
        losses = [run["loss"] for run in runs]
        speeds = [worth(loss, ladders[seed]) / STEPS for seed, loss in zip(SEEDS, losses)]
        found[name] = {
            "lr": runs[0]["lr"],
            "rho": runs[0]["rho"],
            "loss": interval(losses),
            "minus AdamW": interval([x - y for x, y in zip(losses, adamw)]),
            "AdamW's steps a step": interval(speeds),
            "state bytes": runs[0]["state bytes"],
            "seconds a step": took[name],
        }
        if runs[0]["rho"]:
            shares = [run["clipped at the end"] for run in runs]
            found[name]["clipped (share)"] = round(statistics.mean(shares), 4)
    return found


def main() -> None:
    book = Book()
    grid = {}
    for name in OPTIMIZERS:
        rhos = RHOS if name == "Sophia-G" else (None,)
        grid[name] = book.make([one(name, lr, rho) for rho in rhos for lr in RATES])
    best = {}
    for name in OPTIMIZERS:
        settings = by_loss(grid[name])[:2]
        five = [book.make([again(run, seed=seed) for seed in SEEDS]) for run in settings]
        best[name] = min(five, key=lambda runs: statistics.mean(run["loss"] for run in runs))
    book.make([one("AdamW", 2e-4, seed=seed) for seed in SEEDS])
    ladders = {}
    half = {}
    for seed, run in zip(SEEDS, best["AdamW"]):
        rungs = book.make([again(run, steps=steps) for steps in LADDER])
        ladders[seed] = {rung["steps"]: rung["loss"] for rung in (*rungs, run)}
    for name in OPTIMIZERS:
        runs = book.make([again(run, steps=STEPS // 2) for run in best[name]])
        shorter = [run["loss"] for run in runs]
        half[name] = interval([x - y["loss"] for x, y in zip(shorter, best["AdamW"])])
    setups = {"r 8": best["AdamW"][: len(RANK_SEEDS)]}
    for setup, (_, rates) in SETUPS.items():
        first = by_loss(book.make([one("AdamW", lr, setup=setup) for lr in rates]))[0]
        setups[setup] = book.make([again(first, seed=seed) for seed in RANK_SEEDS])
    first_of = {name: runs[0] for name, runs in best.items()}
    summary = {"race": summary_of(best, ladders, seconds(book.track, first_of))}
    summary["half the steps minus AdamW's all"] = half
    at_default = book.make([one("AdamW", 2e-4, seed=seed) for seed in SEEDS])
    summary["AdamW at 2e-4"] = interval([run["loss"] for run in at_default])
    summary["setups"] = {}
    for setup, runs in setups.items():
        loss = interval([run["loss"] for run in runs])
        numbers = {"lr": runs[0]["lr"], "trained": runs[0]["trained"], "loss": loss}
        summary["setups"][setup] = numbers
    book.write(summary)


if __name__ == "__main__":
    main()
