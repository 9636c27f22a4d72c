"""QLoRA fine-tuning: a frozen 4-bit base, a trained adapter, a paged optimizer, and transformers'
own Trainer.

The Trainer runs the loop: batches, forward and backward passes, accumulation, clipping, learning
rate, checkpoints. What is ours around it is small: which layers are adapted (`attach`), a loss that
never holds all logits (`model/chunked_loss.py`), a stop on NaN and on ■ (`callbacks`), checkpoints
that are sealed and verified (`checkpoints`), and smaller passes where memory runs out (`retry`).
`finetune` is read from top to bottom: check, arguments, trainer, train, save. The method is that of
the QLoRA paper (arXiv 2305.14314), sections 3 and 4.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainingArguments

from qlora_nb.errors import KitError
from qlora_nb.memory import out_of_memory, preflight
from qlora_nb.model import batching, chunked_loss, device, fetch, probes
from qlora_nb.record import files, interrupts, seal
from qlora_nb.train import attach, callbacks, checkpoints, optimizers, retry

BYTES_A_PARAMETER = 12
"""Of a checkpoint: a weight and Adam's two states, each in float32."""


class QLoRATrainer(Trainer):
    """Saves the adapter alone and closes every checkpoint with `seal`, which is given its
    folder.
    """

    def __init__(self, seal: Callable[[Path], None], **options):
        super().__init__(**options)
        self.seal = seal
        self.remove_callback(PrinterCallback)  # it would print every step's numbers a second time

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        optimizers.keep_paged(made)
        return made

    def save_model(self, output_dir=None, _internal_call=False):
        attach.save_adapter(self.model, output_dir)

    def _save_checkpoint(self, model, trial):
        """Older checkpoints are removed by the seal, not by `save_total_limit`, which would remove
        one before the new one is known to be whole.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with files.writing(folder):
            super()._save_checkpoint(model, trial)
            self.seal(folder)
        return folder

    def get_batch_samples(self, *args):
        """Called before each step: what draws the dropout masks is remembered, for `save_now`."""
        self._remember_random()
        return super().get_batch_samples(*args)

    def _load_rng_state(self, checkpoint):
        """Called in the first step after a resume, when its batches are there already."""
        super()._load_rng_state(checkpoint)
        self._remember_random()

    def _remember_random(self) -> None:
        self.random = {torch.random: torch.random.get_rng_state()}
        if device.on_gpu():
            self.random[torch.cuda] = torch.cuda.get_rng_state()

    def save_now(self) -> Path | None:
        """A checkpoint of the last finished step, made in the middle of the next one; None before
        the first.
        """
        self.model.zero_grad(set_to_none=True)
        for generator, state in self.random.items():
            generator.set_rng_state(state)
        if self.state.global_step == 0:
            return None
        return self._save_checkpoint(self.model, trial=None)


def arguments(settings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a run into `folder`.

    The base computes in its own dtype and PEFT the adapter in float32: bfloat16 and float32 need no
    more. float16 has too few exponents for small gradients, so there the Trainer's scaler and
    autocast come in, without autocast's second copy of the adapter.

    Raises:
        KitError: `tensorboard` is asked for and not installed.
    """
    on_gpu = device.on_gpu()
    dtype = device.compute_dtype(settings.compute_dtype)
    torch.set_autocast_cache_enabled(False)
    report_to = "none"
    if settings.tensorboard:
        if not find_spec("tensorboard"):
            raise KitError(
                "the package tensorboard is not installed",
                remedy="pip install tensorboard, or tensorboard=False",
            )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
        report_to = "tensorboard"
    made = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=settings.seed,
        # the steps
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        train_sampling_strategy="sequential",  # batching.in_training_order has shuffled the rows
        remove_unused_columns=False,
        # the optimizer
        optim=settings.optim,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        # the hardware
        fp16=on_gpu and dtype is torch.float16,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        # what is logged and saved
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=max(1, settings.save_steps),
    )
    # Of several cards one is used: the Trainer would count rows and loss once for each.
    made._n_gpu = min(made.n_gpu, 1)
    return made


def finetune(
    model: PeftModel,
    tokenizer,
    rows: Dataset,
    settings,
    run,
    report: Callable[[dict], None],
    held_out: Dataset | None = None,
) -> dict[str, object]:
    """Train the adapter on tokenized rows, in the calling thread; a resumed run goes on after its
    newest good checkpoint.

    Args:
        model: what `attach_adapter` returned.
        tokenizer: its tokenizer.
        rows: what `data.tokenize_rows` returned.
        settings: the resolved parameters.
        run: the `runs.Run` whose folder takes `metrics.jsonl` and `adapter/`.
        report: called after each step with step, loss, learning_rate, tokens_per_s, seconds_left, …
        held_out: tokenized rows whose loss is measured every `sample_steps` steps.

    Returns:
        A dictionary: `losses` (one a step, those before a resume included), `held_out` ({step:
        loss}), `seconds`, `tokens_per_s` (no padding counted), `stopped` (by ■), `adapter`
        (folder), `run` (whose record is closed: done, or interrupted by ■); of the first step after
        an update `held` (`ledger.Ledger`), `moved` (`profiler.PeakMemory`) and `shape` (rows,
        tokens, tokens that train) of its largest pass, None where there was no such step.

    Raises:
        KitError: loss or gradient became NaN or infinite, the GPU's memory ran out, the run was
            started with other settings or rows, no adapter is attached, that of a new run is
            trained already, another process writes into the folder, or the model does not do what
            these settings rely on (`probes.before_training`). What is refused before the first pass
            leaves no folder and changes no record.
    """
    batches = callbacks.CountingCollator(tokenizer)
    watch = callbacks.Watch(run, report, batches)
    measured = callbacks.MeasureOneStep(batches)
    sample = callbacks.Sample(tokenizer, settings, held_out, run)
    try:
        # 1. the rows in the order in which they are trained
        attach.require_adapter(model)
        if settings.packing:
            rows = batching.pack(rows, settings.max_length)
        rows = batching.in_training_order(rows, settings)
        rows_hash = checkpoints.fingerprint(rows)
        trained = [p for p in model.parameters() if p.requires_grad]
        first_values = [p.detach().to("cpu", copy=True) for p in trained]

        # 2. the trainer, which is made anew when memory runs out
        def seal_checkpoint(folder: Path) -> None:
            seal.write_seal(folder, settings=settings.model_dump(), rows=rows_hash)

        def new_trainer(settings, optimizer) -> QLoRATrainer:
            return QLoRATrainer(
                seal_checkpoint,
                model=model,
                args=arguments(settings, run.folder),
                train_dataset=rows,
                data_collator=batches,
                compute_loss_func=loss_function,
                callbacks=[watch, measured, sample],
                optimizers=(optimizer, None),
            )

        def go_back() -> Path | None:
            checkpoint = seal.newest_checkpoint(run.folder)
            step = _rewind(run, checkpoint, watch.losses, sample.losses)
            print(f"the update had begun: training is resumed after step {step}")
            for parameter, value in zip(trained, first_values, strict=True):
                parameter.data.copy_(value)
            return checkpoint

        with interrupts.stop_on_interrupt() as stop, ExitStack() as stack:
            # 3. what is in force while training works, undone in any case
            watch.stop = stop
            loss_function = _loss_function(model, settings, stack)
            stack.push(measured.measuring)
            stack.enter_context(_one_process())
            stack.enter_context(_without_cache(model))
            stack.enter_context(files.sole_writer(run.folder))
            stack.callback(_note_interrupt, run, watch)
            _require_room(model, settings, run.folder)
            # 4. train, from the first step or from a checkpoint
            checkpoint = _first_checkpoint(model, run, settings, rows_hash)
            if run.resumed:
                step = _rewind(run, checkpoint, watch.losses, sample.losses)
                print(f"going on after step {step}")
            retry.train(new_trainer, settings, watch, checkpoint, go_back)
            if watch.failure:
                raise KitError(
                    watch.failure,
                    remedy="lower learning_rate; on a GPU without bfloat16 choose a model trained "
                    "in float16 (not pythia-1b)",
                )
            # 5. save
            adapter = attach.save_sealed(model, run.folder / "adapter")
    except BaseException as error:  # the folder must say what became of the run
        if watch.begun:
            run.finish("failed", error=f"{type(error).__name__}: {error}"[:500])
        else:
            run.withdraw()
        raise
    seconds = time.perf_counter() - watch.started
    tokens_per_s = batches.n_tokens / seconds
    stopped = watch.stop.is_set()
    status = "interrupted" if stopped else "done"
    run.finish(status, tokens_per_s=tokens_per_s, train_seconds=seconds)
    return {
        "losses": watch.losses,
        "held_out": sample.losses,
        "seconds": seconds,
        "tokens_per_s": tokens_per_s,
        "stopped": stopped,
        "adapter": adapter,
        "run": run,
        "held": measured.held,
        "moved": measured.moved,
        "shape": measured.shape,
    }


def _loss_function(model: PeftModel, settings, stack: ExitStack) -> Callable | None:
    """The loss in slices while `stack` is open; of all logits where the model does not bear slices;
    None: the model's own.

    Raises:
        KitError: the model does not do what these settings rely on, or memory runs out already.
    """
    with out_of_memory.explained(settings, model):
        chunk = probes.before_training(model, settings)
    if chunk:
        return stack.enter_context(chunked_loss.chunked_head(model, chunk))
    if settings.loss_chunk:
        return chunked_loss.logits_cross_entropy
    return None


@contextmanager
def _one_process() -> Iterator[None]:
    """Inside, the Trainer sets up no process group, also where a launcher started this one process
    alone.

    Raises:
        KitError: this is one of several processes.
    """
    preflight.refuse_many_processes()
    # What accelerate goes by; without an address it fails, with one it may wait.
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank


@contextmanager
def _without_cache(model: PeftModel) -> Iterator[None]:
    """Inside, a model that trains keeps no keys and values; afterwards, also after an error, it is
    one that answers.
    """
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = True
        model.eval()


def _note_interrupt(run, watch: callbacks.Watch) -> None:
    """Close the record of a run that is stopped before the lock is given back: a SIGTERM ends this
    process right after.
    """
    if watch.stop.is_set():
        run.finish("interrupted")


def _require_room(model: PeftModel, settings, folder: Path) -> None:
    """Refuse to begin where the disk has no room for the adapter, the checkpoints that are kept and
    the one being written.
    """
    copies = 1
    if settings.save_steps:
        copies += seal.KEEP + 1
    needed = copies * BYTES_A_PARAMETER * attach.trainable_parameters(model)
    fetch.require_room(folder, needed, "this run")


def _first_checkpoint(model: PeftModel, run, settings, rows_hash: str) -> Path | None:
    """The checkpoint to begin from; None where training begins at the first step.

    Raises:
        KitError: the run is over, was started with other settings or rows, or a new run would begin
            with an adapter that is trained already.
    """
    if run.manifest["status"] != "running":
        raise KitError("this run is over", value=run.folder.name, remedy="start another one")
    checkpoint = seal.newest_checkpoint(run.folder) if run.resumed else None
    if checkpoint:
        checkpoints.require_same(checkpoint, settings, rows_hash)
        return checkpoint
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.any():
            raise KitError(
                "this adapter was trained before",
                remedy="attach it once more: then a new run begins at zero",
            )
    return None


def _rewind(run, checkpoint: Path | None, losses: list[float], held_out: dict[int, float]) -> int:
    """Forget what was logged after a checkpoint; `losses` and `held_out` become what was logged up
    to it. Returns its step, 0 without one.
    """
    step = seal.step_of(checkpoint) if checkpoint else 0
    losses.clear()
    held_out.clear()
    for record in run.truncate_log(step):
        if "loss" in record:
            losses.append(record["loss"])
        if "held_out_loss" in record:
            held_out[record["step"]] = record["held_out_loss"]
    return step
