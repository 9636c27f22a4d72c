"""Training on a card, one function for each kind of entry of gpu.py's table;
each is called with this process's `gpu_card.Watch`.

Without a card rows and runs are short and everything is computed in float32: the same code, in
seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import datasets
import peers
import torch
from gpu_card import Watch, synchronize
from provenance import open_cells
from transformers import TrainerCallback

from qlora_nb.answer import adapters, evaluate, generate
from qlora_nb.errors import KitError
from qlora_nb.memory import budget
from qlora_nb.memory.plan import plan_of
from qlora_nb.model import data, device, load
from qlora_nb.settings import validate
from qlora_nb.train import checkpoints

WARM_UP, MEASURED = 5, 50
"""Steps of a speed."""

POCKET_RUN = {"max_steps": 12, "train_rows": 192, "eval_rows": 16, "max_new_tokens": 24}
FEW = {
    "max_steps": 2,
    "train_rows": 48,
    "eval_rows": 2,
    "per_device_train_batch_size": 2,
    "max_new_tokens": 4,
}
"""A run of the pocket model, with a card and without."""

PAGED_FROM = 100_000
"""Numbers in the smallest state that bitsandbytes pages (`Optimizer8bit.get_state_buffer`)."""


# ---- what the entries share ----------------------------------------------------------------------


def settings_for(folder: str, **values):
    """Profile `full` on a model with random weights; without a card float32 and short rows."""
    settings = validate(
        {
            "profile": "full",
            "model_id": folder,
            "prequantized": True,
            "save_steps": 0,
            "warmup_steps": 0,
            **values,
        }
    )
    if device.on_gpu():
        return settings
    return settings.replace(compute_dtype="float32", max_length=min(64, settings.max_length))


def tokenizer_for():
    """The pocket model's: rows are numbers here, only its padding is used."""
    return load.load_tokenizer(validate({}))


def full_rows(settings, n: int) -> datasets.Dataset:
    """Rows of `max_length` tokens, all of which train; no two are the same."""
    rows = []
    for row in range(n):
        ids = [3 + (i * (row + 1)) % 900 for i in range(settings.max_length)]
        rows.append({"input_ids": ids, "labels": ids})
    return datasets.Dataset.from_list(rows)


def train(settings, model, rows, tokenizer, *watching: TrainerCallback) -> tuple:
    """Notebook 06's cells from the adapter to its saved file: (model, what `finetune` returns)."""
    model = open_cells.attach_adapter(model, settings)
    run = checkpoints.start(settings, "gpu")
    result = open_cells.finetune(
        model, tokenizer, rows, settings, run, lambda step: None, watching=watching
    )
    return model, result


class DuringTraining(TrainerCallback):
    """Watches memory from the first step to the end of the last, and the time of a step."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.start()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.ends.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.stop()

    @property
    def seconds(self) -> list[float]:
        """Of each step after the first."""
        return [round(end - start, 4) for start, end in zip(self.ends, self.ends[1:])]

    @property
    def seconds_a_step(self) -> float:
        """Median over the steps after the first."""
        return statistics.median(self.seconds) if self.seconds else 0.0


class CountPages(TrainerCallback):
    """After each step: the optimizer's states that lie in pages, and those large enough to."""

    def __init__(self):
        self.counts: list[list[int]] = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        states = [one[name] for one in inner.state.values() for name in ("state1", "state2")]
        paged = sum(bool(getattr(tensor, "is_paged", False)) for tensor in states)
        large = sum(tensor.numel() >= PAGED_FROM for tensor in states)
        self.counts.append([paged, large])


class BreakOff(TrainerCallback):
    """Ends a run as ■ pressed twice would: in the middle, after `steps` steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            raise KeyboardInterrupt


def largest_difference(one: list[float], other: list[float]) -> float:
    """Between the losses of two runs of the same number of steps, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


# ---- the entries ---------------------------------------------------------------------------------


def pocket(watch: Watch, dtype: str) -> dict:
    """Notebook 06 on the pocket model with every option: losses beside those of float32, held-out
    loss, an answer, and whether the saved adapter answers the same.
    """
    found = {}
    in_float32: dict[tuple, list[float]] = {}
    for name, options in open_cells.OPTIONS.items():
        key = options.get("packing", False), options.get("head_4bit", False)
        try:
            if key not in in_float32:
                same = {"packing": key[0], "head_4bit": key[1], "compute_dtype": "float32"}
                in_float32[key] = one_pocket(watch, same)["losses"]
            one = one_pocket(watch, {**options, "compute_dtype": dtype})
            one["off float32 (nats)"] = largest_difference(one["losses"], in_float32[key])
        except Exception as error:  # the other options can still be tried
            one = {"error": f"{type(error).__name__}: {error}"[:300]}
        found[name] = one
    return found


def one_pocket(watch: Watch, values: dict) -> dict:
    """One run of some steps, without what would take long: looks, warm-up and most of the rows."""
    values = {**POCKET_RUN, **values}
    if not device.on_gpu():
        values = {**values, **FEW, "compute_dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        settings = validate({"sample_steps": 0, "warmup_steps": 0, "output_dir": folder, **values})
        tokenizer = load.load_tokenizer(settings)
        rows, held_out = [
            data.tokenize_rows(part, tokenizer, settings) for part in data.load(settings)
        ]
        during = DuringTraining(watch)
        base = load.load_base(settings)
        model, result = train(settings, base, rows, tokenizer, during)
        row = generate.row_of(settings.prompts[0], settings.prompt_template)
        said = generate.answer(model, tokenizer, row, settings, tuned=True).text
        fresh = adapters.load_adapter(load.load_base(settings), result["adapter"])
        said_again = generate.answer(fresh, tokenizer, row, settings, tuned=True).text
        return {
            "computes in": str(model.get_base_model().dtype),
            "losses": result["losses"],
            "held-out loss": evaluate.response_loss(model, tokenizer, held_out),
            "answer": said,
            "the saved adapter answers the same": said == said_again,
            "seconds_a_step": during.seconds_a_step,
        }


def resume(watch: Watch, folder: str) -> dict:
    """Four steps at once; the same broken off inside the fourth and resumed after the second:
    losses and states in pages of both.
    """
    settings = settings_for(folder, max_steps=4, gradient_accumulation_steps=2, save_steps=2)
    rows = full_rows(settings, 8)
    tokenizer = tokenizer_for()
    model = load.load_base(settings)
    whole, resumed = CountPages(), CountPages()
    with tempfile.TemporaryDirectory() as runs:
        here = settings.replace(output_dir=f"{runs}/whole")
        model, at_once = train(here, model, rows, tokenizer, whole, DuringTraining(watch))
        here = settings.replace(output_dir=f"{runs}/cut")
        with suppress(KeyboardInterrupt):
            train(here, model, rows, tokenizer, BreakOff(3))
        here = here.replace(resume="latest")
        model, in_two = train(here, model, rows, tokenizer, resumed)
    return {
        "losses": at_once["losses"],
        "losses resumed": in_two["losses"],
        "equal": at_once["losses"] == in_two["losses"],
        "steps resumed": len(resumed.counts),
        "states in pages, states of 100,000 numbers": {
            "at once": whole.counts,
            "resumed": resumed.counts,
        },
        **watch.peaks,
    }


@contextmanager
def capped(n_bytes: float) -> Iterator[None]:
    """Inside, torch's allocator holds no more than this; states in pages are not its own."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(n_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def out_of_memory(watch: Watch, folder: str) -> dict:
    """Memory runs out for real, in passes of four rows (done again in smaller ones) and of one (a
    refusal), twice in this process; afterwards everything fits as before.

    The caps lie between what was measured without one: the peak of four rows and of two; the peak
    of one row and what lies there before the first step.
    """
    settings = settings_for(
        folder,
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        loss_chunk=0,
    )
    tokenizer = tokenizer_for()
    rows = full_rows(settings, 12)
    model = load.load_base(settings)

    def run(batch: int) -> dict:
        nonlocal model
        pages = CountPages()
        passes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        with tempfile.TemporaryDirectory() as runs:
            here = settings.replace(output_dir=runs, **passes)
            try:
                model, result = train(here, model, rows, tokenizer, DuringTraining(watch), pages)
            except KitError as refusal:
                return {"refused": str(refusal)[:500]}
        return {
            "losses": result["losses"],
            "rows in a pass": result["shape"][0],
            "states in pages, states of 100,000 numbers": pages.counts,
            **watch.peaks,
        }

    plain = {batch: run(batch) for batch in (4, 2, 1)}
    before = torch.cuda.memory_allocated()
    peaks = {batch: one["allocated"] for batch, one in plain.items()}
    found = {"without a cap": plain}
    for turn in ("first", "again"):
        with capped((peaks[4] + peaks[2]) / 2):
            found[f"four rows, {turn}"] = run(4)
        with capped((peaks[1] + before) / 2):
            found[f"one row, {turn}"] = run(1)
    found["four rows, without a cap again"] = run(4)
    for name in ("four rows, first", "four rows, again", "four rows, without a cap again"):
        if "losses" in found[name]:
            off = largest_difference(found[name]["losses"], plain[4]["losses"])
            found[name]["off (nats)"] = off
    found["bytes that stay"] = torch.cuda.memory_allocated() - before
    return found


def peak(watch: Watch, folder: str, values: dict) -> dict:
    """Three optimizer steps on rows of full length: predicted and measured peak, losses."""
    settings = settings_for(folder, **{"max_steps": 3, "gradient_accumulation_steps": 2, **values})
    predicted = budget.peak(plan_of(settings))
    during = DuringTraining(watch)
    rows = full_rows(settings, 3 * settings.rows_in_a_step)
    base = load.load_base(settings)
    with tempfile.TemporaryDirectory() as runs:
        here = settings.replace(output_dir=runs)
        _, result = train(here, base, rows, tokenizer_for(), during)
    return {
        "values": values,
        "predicted": predicted.total_bytes,
        "predicted_lines": {line.name: line.bytes for line in predicted.lines},
        "held": result["held"].total_bytes if result["held"] else None,
        "losses": result["losses"],
        "seconds_a_step": during.seconds_a_step,
        **watch.peaks,
    }


def speed(watch: Watch, folder: str, who: str, tf32: bool = False) -> dict:
    """Tokens a second, padding not counted, over the steps after the warm-up.

    Args:
        who: kit, common or pasted (see peers.py).
        tf32: let float32 products round their factors to 10 bits, as Ampere and later cards can.
    """
    warm_up, measured = (WARM_UP, MEASURED) if device.on_gpu() else (1, 2)
    steps = {"max_steps": warm_up + measured, "gradient_accumulation_steps": 1}
    settings = settings_for(folder, per_device_train_batch_size=4, r=64, **steps)
    rows = peers.random_rows(400, 1000, settings.max_length)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    during = DuringTraining(watch)
    one = getattr(peers, who)
    tokens_per_s, _ = one(settings, rows, tokenizer_for(), warm_up, [during])
    return {
        "tokens_per_s": round(tokens_per_s, 1),
        "seconds_a_step": during.seconds_a_step,
        "seconds_of_the_steps": during.seconds,
        "steps": [warm_up, measured],
        **watch.peaks,
    }
