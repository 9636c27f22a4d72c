"""Notebook 06's own cells as functions: what tests, benchmarks and tools train with is what the
reader sees.

The cells are found by their tags and executed in a namespace that holds what the cells before them
would have made.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from types import CodeType, SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as qlora_nb does, before torch is loaded

import peft
import torch
import transformers

from qlora_nb.model import batching, device, load
from qlora_nb.record import files, seal
from qlora_nb.train import attach, callbacks
from qlora_nb.train.trainer import QLoRATrainer

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "06_finetune_pythia_12b.ipynb"


EVERY_OPTION = {
    "gradient_checkpointing": True,
    "head_4bit": True,
    "embedding_on_cpu": True,
    "optim": "paged_adamw_8bit",
}
OPTIONS = {
    "plain": {},
    "packed": {"packing": True},
    "all logits": {"loss_chunk": 0},
    "checkpointing": {"gradient_checkpointing": True},
    "4-bit head": {"head_4bit": True},
    "embedding on the CPU": {"embedding_on_cpu": True},
    "8-bit states": {"optim": "paged_adamw_8bit"},
    "every option": EVERY_OPTION,
    "every option, packed": {**EVERY_OPTION, "packing": True},
    "every option, all logits": {**EVERY_OPTION, "loss_chunk": 0},
}
"""What of the settings changes how a step computes: each alone, and together."""


class View:
    """The panel of the cell, without a widget: each step's numbers are passed on."""

    box = None

    def __init__(self, report):
        self.report = report

    def __call__(self, step: dict) -> None:
        self.report(step)


def no_guess(*args, **options) -> None:
    """Nobody has guessed."""


@functools.cache
def cell(tag: str) -> CodeType:
    """The one cell of notebook 06 with this tag, compiled."""
    [source] = tagged(NOTEBOOK, tag)
    return compile(source, f"06, {tag}", "exec")


def tagged(notebook: Path, tag: str) -> list[str]:
    """The sources of the cells with this tag, read without Jupyter, which a machine that only
    computes may lack.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if tag in c["metadata"].get("tags", [])]


def attach_adapter(model, settings):
    """The cell that makes the adapter; returns the model with it."""
    names = {
        "model": model,
        "settings": settings,
        "attach": attach,
        "load": load,
        "torch": torch,
        "LoraConfig": peft.LoraConfig,
        "PeftModel": peft.PeftModel,
        "get_peft_model": peft.get_peft_model,
        "guess_trained": None,
        "compare_guess": no_guess,
    }
    exec(cell("attach-adapter"), names)
    return names["model"]


def arguments(settings) -> transformers.TrainingArguments:
    """The cell of `TrainingArguments`."""
    names = {
        "settings": settings,
        "device": device,
        "torch": torch,
        "dtype": device.compute_dtype(settings.compute_dtype),
        "TrainingArguments": transformers.TrainingArguments,
    }
    exec(cell("training-arguments"), names)
    return names["args"]


def finetune(
    model,
    tokenizer,
    train,
    settings,
    run,
    report,
    held_out=None,
    watching=(),
    in_order=batching.in_training_order,
) -> dict[str, object]:
    """The cells from the rows to the saved adapter.

    Args:
        model: with its adapter.
        train: tokenized rows, not in order yet.
        run: the `runs.Run` to train in.
        report: called after each step with its numbers.
        held_out: tokenized rows whose loss is measured every `sample_steps` steps.
        watching: callbacks of the Trainer besides those of the cell.
        in_order: (rows, settings) → the rows of every step, one after another.
    """

    def make_trainer(callbacks, **options):
        return QLoRATrainer(callbacks=[*callbacks, *watching], **options)

    rows = batching.pack(train, settings.max_length) if settings.packing else train
    rows = in_order(rows, settings)
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "in_order": rows,
        "settings": settings,
        "args": arguments(settings),
        "watched": held_out,
        "guess_seconds": None,
        "callbacks": callbacks,
        "files": files,
        "seal": seal,
        "QLoRATrainer": make_trainer,
        "panels": SimpleNamespace(LiveTraining=lambda max_steps: View(report)),
        "checkpoints": SimpleNamespace(start=lambda settings, notebook: run),
        "display": lambda box: None,
        "compare_guess": no_guess,
    }
    exec(cell("train"), names)
    watch, measured, sample = names["watch"], names["measured"], names["sample"]
    return {
        "losses": watch.losses,
        "held_out": sample.losses,
        "seconds": watch.seconds,
        "tokens_per_s": watch.tokens_per_s,
        "stopped": watch.stop.is_set(),
        "adapter": names["adapter_folder"],
        "run": run,
        "held": measured.held,
        "moved": measured.moved,
        "shape": measured.shape,
    }
