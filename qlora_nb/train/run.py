"""Notebook 06's training without a notebook, in one process or in several that share each step.

The calls are those of the notebook's cells, in their order: rows, base in 4 bit, adapter, Trainer.
Several processes (DDP, PyTorch's distributed data parallel, arXiv 2006.15704) hold the whole model
each, take their share of a step's rows, and add up their gradients before the update. A step holds
the same rows however many they are; two that have one pass each end with the bits of one process
that has two. The first process writes the run's folder and speaks. Each must come to every
collective call, so what one of them is told (stop, an error) ends all.
"""

import io
import os
import sys
import time
from contextlib import redirect_stdout

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from qlora_nb import machine, processes
from qlora_nb.answer import evaluate, merge
from qlora_nb.errors import KitError
from qlora_nb.memory import preflight
from qlora_nb.model import batching, data, data_report, device, load
from qlora_nb.record import files, runs, seal
from qlora_nb.train import attach, callbacks, checkpoints, script, sharded
from qlora_nb.train.trainer import QLoRATrainer

OF_THE_TRAINER = {
    "output_dir",
    "seed",
    "max_steps",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
}
"""Parameters that `TrainingArguments` takes under the same names."""

LET_THE_FIRST_SPEAK_S = 10
"""What is refused, mostly all refuse. The first process says so, and its end ends the others; only
where it does not another one speaks.
"""


def _made(settings, shard: str) -> tuple[QLoRATrainer, datasets.Dataset, datasets.Dataset]:
    """The Trainer of a run, the texts of its rows, and the held-out rows as tokens. What is refused
    here, all processes refuse.
    """
    preflight.refuse_what_cannot_run(settings, together=processes.count() > 1)
    kind = QLoRATrainer
    if shard == "fsdp":
        sharded.require_able(settings)
        kind = sharded.ShardedTrainer
    tokenizer = load.load_tokenizer(settings)
    checked = data_report.check(settings, tokenizer)
    print(checked)
    settings = checked.settings
    held_out = data.tokenize_rows(checked.split.held_out, tokenizer, settings)
    preflight.require_fit(settings, machine.this_machine(), n=processes.count(), shard=shard)
    processes.wait()  # all have looked at their card before one loads
    if processes.rank():
        processes.wait()  # the first makes the 4-bit copy that the others read
    model = load.load_base(settings)
    if not processes.rank():
        processes.wait()
    targets = attach.layers_to_adapt(model, settings)
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    if settings.gradient_checkpointing:
        load.enable_checkpointing(model)
    rows = checked.encoded
    if settings.packing:
        rows = batching.pack(rows, settings.max_length)
    rows = batching.in_training_order(rows, settings)
    batches = callbacks.CountingCollator(tokenizer)
    trainer = kind(
        model=model,
        args=_arguments(settings),
        train_dataset=rows,
        data_collator=batches,
        callbacks=[
            callbacks.Watch(_say, batches),
            callbacks.MeasureOneStep(batches),
            callbacks.Sample(tokenizer, settings, None),
        ],
        settings=settings,
        run=_run_of_all(settings),
    )
    if settings.lora_dropout:
        torch.manual_seed(settings.seed + processes.rank())  # else all drop the same numbers
    return trainer, checked.split.train, held_out


def _train(trainer: QLoRATrainer, texts: datasets.Dataset, held_out: datasets.Dataset) -> runs.Run:
    run = trainer.run
    settings = trainer.settings
    adapter = run.folder / "adapter"
    with trainer.guarded():
        before = _held_out_losses(trainer, held_out)  # of the base, as every B is zero
        trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
        trainer.save_model(adapter)  # all put it together, the first writes
        if trainer.measured.held:  # not in a run of one step
            held = {line.name: line.bytes for line in trainer.measured.held.lines}
            run.manifest["metrics"]["bytes held by each process"] = processes.gathered(held)
        if run.writes:
            with files.writing(adapter):
                seal.write_seal(adapter)
    if run.manifest["status"] == "done":
        after = _held_out_losses(trainer, held_out)
        if run.writes:
            _say_what_changed(run, before, after)
    if run.writes:
        merge.write_card(adapter, merge.card_facts(adapter, settings))
        if not any(getattr(settings, name) for name in script.OF_THE_KIT):
            tokenizer = trainer.sample.tokenizer
            targets = trainer.model.peft_config["default"].target_modules
            rows = trainer.train_dataset
            script.write(run.folder, settings, tokenizer, rows, texts, targets)
    return run


def _held_out_losses(trainer: QLoRATrainer, held_out: datasets.Dataset) -> torch.Tensor:
    """As `evaluate.row_losses`; each of several processes computes all of them, and they agree."""
    trainer.model.eval()
    return evaluate.row_losses(trainer.model, trainer.sample.tokenizer, held_out)


def _say_what_changed(run: runs.Run, before: torch.Tensor, after: torch.Tensor) -> None:
    """Print and record the held-out loss before and after training."""
    loss_before = evaluate.mean_loss(before).item()
    loss_after = evaluate.mean_loss(after).item()
    run.add(loss_before=loss_before, loss_after=loss_after)
    low, high = evaluate.loss_interval(after, before)
    print(
        f"held-out loss (nats an answer token, {len(after)} rows): {loss_before:.3f} before, "
        f"{loss_after:.3f} after; change {loss_after - loss_before:+.3f} "
        f"(95 % of resampled rows: {low:+.3f} to {high:+.3f})"
    )


def _arguments(settings) -> TrainingArguments:
    """Those of notebook 06, whose cell says what each is for, and two for several processes."""
    on_gpu = device.on_gpu()
    dtype = device.compute_dtype(settings.compute_dtype)
    torch.set_autocast_cache_enabled(False)
    return TrainingArguments(
        **settings.model_dump(include=OF_THE_TRAINER),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="tensorboard" if settings.tensorboard else "none",
        disable_tqdm=True,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=max(1, settings.save_steps),
        ddp_backend=backend() if processes.count() > 1 else None,
        ddp_find_unused_parameters=False,  # every A and B has a gradient in every pass
    )


def backend() -> str:
    """How processes talk: NCCL between cards, gloo between CPUs."""
    return "nccl" if device.on_gpu() else "gloo"


def _run_of_all(settings) -> runs.Run:
    """One run, and one folder, for all processes: the first opens it, the others are told. It is a
    run of notebook 06: notebook 07 finds it, and either resumes what the other began.
    """
    run = None
    if not processes.rank():
        run = checkpoints.start(settings, runs.FINE_TUNING)
    folder, resumed = processes.gathered(run and (run.folder, run.resumed))[0]
    if run is None:
        run = runs.Run(settings, runs.FINE_TUNING, folder)
        run.resumed = resumed
    return run


def _say(step: dict) -> None:
    every = max(1, step["max_steps"] // 20)
    if step["step"] % every == 0 or step["step"] == step["max_steps"]:
        done = f"step {step['step']} of {step['max_steps']}"
        print(f"{done}: loss {step['loss']:.3f}, {step['seconds_left']:.0f} s left")


def _take_own_card(number: int) -> None:
    n_cards = torch.cuda.device_count()
    if number >= n_cards:
        raise KitError(
            "every process needs a card of its own",
            value=f"{number + 1} processes or more",
            allowed=f"--processes {n_cards} at most",
        )
    torch.cuda.set_device(number)


def in_this_process(settings, shard: str = "none") -> int:
    """Train as what this process is, alone or one of those that torchrun started: from the first
    step or with `resume` from a checkpoint, in the folder of a run of notebook 06.

    Args:
        shard: "fsdp" leaves each process a share of every tensor (`sharded`), "none" the whole.

    Returns:
        The process's exit code.

    Raises:
        KitError: whatever notebook 06 refuses; a step that the processes cannot share.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.on_gpu():
            _take_own_card(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend())  # all come here, or none goes on
    elif shard != "none":
        raise KitError("one process has nobody to share with", remedy="--processes 2 or more")
    said = io.StringIO() if processes.rank() else sys.stdout  # the first speaks for all
    with redirect_stdout(said):
        try:
            made = _made(settings, shard)
        except KitError:
            if processes.rank():
                time.sleep(LET_THE_FIRST_SPEAK_S)
            raise
        run = _train(*made)
        print(f"{run.manifest['status']}: {run.folder}")
    processes.wait()  # who ends with another code than 0 ends all: the first has written and said
    code = 0 if run.manifest["status"] == "done" else 1
    processes.leave(code)
    return code
