"""transformers' own Trainer, and what a long run needs besides.

The Trainer runs the loop: batches, forward and backward passes, accumulation, clipping, learning
rate, checkpoints. Notebook 06 makes it in a cell, from `TrainingArguments` and a list of callbacks,
as any script does. What is added here is small: a loss that never holds all logits
(`model/chunked_loss.py`), checkpoints that are sealed and verified (`checkpoints`), smaller passes
where memory runs out (`retry`), and a record of how the run ended. The method is that of the QLoRA
paper (arXiv 2305.14314), sections 3 and 4.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import TrainOutput

from qlora_nb import processes
from qlora_nb.errors import KitError
from qlora_nb.memory import dry_run, out_of_memory, shares
from qlora_nb.model import chunked_loss, device, fetch, probes
from qlora_nb.record import files, interrupts, seal
from qlora_nb.train import attach, callbacks, checkpoints, optimizers, retry

BYTES_A_PARAMETER = 12
"""Of a checkpoint: a weight and Adam's two states, each in float32."""


class QLoRATrainer(Trainer):
    """A Trainer for a run that may be stopped, killed, resumed, or run out of memory.

    Args:
        run: the `runs.Run` whose folder takes the checkpoints.
        settings: the resolved parameters.
        options: those of `Trainer`, by name. Among the callbacks are one `callbacks.Watch`, one
            `MeasureOneStep` and one `Sample`. The loss is chosen by `train`: in slices of
            `loss_chunk` tokens where the model bears that.

    Raises:
        KitError: the model has no adapter that can be trained. What is refused before the first
            pass leaves no folder and changes no record.
    """

    def __init__(self, run, settings, **options):
        self.run = run
        self.settings = settings
        self.options = options
        try:
            self.watch = _callback(callbacks.Watch, options)
            self.measured = _callback(callbacks.MeasureOneStep, options)
            self.sample = _callback(callbacks.Sample, options)
            self.watch.run = run
            self.sample.run = run
            attach.require_adapter(options["model"])
            self.rows_hash = checkpoints.fingerprint(options["train_dataset"])
            self.make(settings, optimizer=None)
        except BaseException:
            run.withdraw()
            raise

    def make(self, settings, optimizer: torch.optim.Optimizer | None) -> None:
        """Make the Trainer, or make it anew with fewer rows in a pass and the optimizer it has."""
        args = copy.copy(self.options["args"])
        args.output_dir = str(self.run.folder / "checkpoints")
        rows, passes = shares.of_a_step(settings, processes.count())
        args.per_device_train_batch_size = rows
        args.gradient_accumulation_steps = passes
        if settings.tensorboard:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.run.folder / "tensorboard")
        args._n_gpu = min(args.n_gpu, 1)  # of several cards one is used
        super().__init__(**{**self.options, "args": args, "optimizers": (optimizer, None)})
        self.remove_callback(PrinterCallback)  # it would print every step's numbers a second time

    def _end(self) -> None:
        """Afterwards, also after an error, the model is one that answers, with keys and values
        kept; the optimizer's memory is given back, although a notebook keeps its trainer.
        """
        self.model.config.use_cache = True
        self.model.eval()
        self.accelerator.free_memory()
        self.first_values.clear()
        self.optimizer = None
        self.lr_scheduler = None
        self.callback_handler.optimizer = None
        self.callback_handler.lr_scheduler = None

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        optimizers.keep_paged(made)
        return made

    def save_model(self, output_dir=None, _internal_call=False):
        """The adapter alone. Embeddings are frozen; asking whether they changed would ask the
        hub.
        """
        if self.args.should_save:  # the first process
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_checkpoint(self, model, trial):
        """Older checkpoints are removed by the seal, not by `save_total_limit`, which would remove
        one before the new one is known to be whole.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with files.writing(folder):
            super()._save_checkpoint(model, trial)
            processes.wait()  # each has written its random state
            if self.args.should_save:
                about = self.settings.model_dump()
                seal.write_seal(folder, settings=about, rows=self.rows_hash)
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

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, ■, Ctrl-C and SIGTERM finish the running step and save; this process alone writes
        into the run's folder; and its record says how the run ended: done, interrupted, failed.

        A run that is refused before its first pass leaves no folder and changes no record.

        Raises:
            KitError: another process writes into the folder.
        """
        try:
            writer = files.sole_writer(self.run.folder) if self.run.writes else nullcontext()
            with interrupts.stop_on_interrupt() as stop, writer:
                self.watch.stop = stop
                try:
                    yield
                finally:  # before the lock is given back: a SIGTERM ends this process right after
                    if stop.is_set():
                        self.run.finish("interrupted")
        except BaseException as error:
            if self.watch.begun:
                self.run.finish("failed", error=f"{type(error).__name__}: {error}"[:500])
            else:
                self.run.withdraw()
            raise
        if not stop.is_set():
            self.run.finish("done")

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to begin from, None where training begins at the first step.

        Raises:
            KitError: the run was started with other settings or rows.
        """
        if not self.run.resumed:
            return None
        checkpoint = seal.newest_checkpoint(self.run.folder)
        if checkpoint:
            checkpoints.require_same(checkpoint, self.settings, self.rows_hash)
        return checkpoint

    def train(self, resume_from_checkpoint: Path | None = None) -> TrainOutput:
        """Train to the end, from the first step or from a checkpoint; what was logged after that is
        forgotten, and the optimizer's memory is given back.

        Raises:
            KitError: the run is over, the disk has no room for its checkpoints, training would
                begin with an adapter that is trained already, loss or gradient became NaN or
                infinite, memory ran out with one row in a pass, or the model does not do what these
                settings rely on (`probes.before_training`).
        """
        if self.run.manifest["status"] != "running":
            raise KitError(
                "this run is over", value=self.run.folder.name, remedy="start another one"
            )
        _require_room(self.model, self.settings, self.run.folder)
        if not resume_from_checkpoint:
            _require_untrained(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.first_values = {p: p.detach().to("cpu", copy=True) for p in trained}
        with ExitStack() as stack:
            self.model.config.use_cache = False
            stack.callback(self._end)
            with out_of_memory.explained(self.settings, self.model):
                probes.before_training(self.model, self.settings)
            self._choose_loss(stack)
            stack.push(self.measured.measuring)
            if self.run.resumed:
                print(f"resuming after step {self._rewind(resume_from_checkpoint)}")
            ended = retry.train(self, resume_from_checkpoint)
        if self.watch.failure:
            raise KitError(
                self.watch.failure,
                remedy="lower learning_rate; on a GPU without bfloat16 choose a model trained "
                "in float16 (not pythia-1b)",
            )
        return ended

    def _choose_loss(self, stack: ExitStack) -> None:
        """The loss in slices while `stack` is open; of all logits where the model does not bear
        slices, which is said.
        """
        chunk = self.settings.loss_chunk
        if not chunk:
            loss = None  # the model's own
        elif dry_run.head_is_last(self.model.config):
            loss = stack.enter_context(chunked_loss.chunked_head(self.model, chunk))
        else:
            loss = chunked_loss.logits_cross_entropy
            print(
                "this model computes its loss from more than its head's logits: "
                "all are kept at once, as with loss_chunk=0"
            )
        self.options["compute_loss_func"] = loss
        self.compute_loss_func = loss

    def go_back(self) -> Path | None:
        """Put the weights back to their first values; returns the checkpoint to begin from, None if
        there is none.
        """
        checkpoint = seal.newest_checkpoint(self.run.folder)
        print(f"the update had begun: training is resumed after step {self._rewind(checkpoint)}")
        for parameter, value in self.first_values.items():
            parameter.data.copy_(value)
        return checkpoint

    def _rewind(self, checkpoint: Path | None) -> int:
        """Forget what was logged after a checkpoint; returns its step, 0 without one."""
        step = seal.step_of(checkpoint) if checkpoint else 0
        self.watch.losses.clear()
        self.sample.losses.clear()
        for record in self.run.truncate_log(step):
            if "loss" in record:
                self.watch.losses.append(record["loss"])
                held = record.get("memory_bytes", 0)
                self.watch.peak_bytes = max(self.watch.peak_bytes, held)
                if not self.watch.begun:
                    self.watch.seconds_before = record.get("seconds", 0.0)
            if "held_out_loss" in record:
                self.sample.losses[record["step"]] = record["held_out_loss"]
        return step


def _callback(kind: type, options: dict):
    """The callback of this class among the options."""
    for callback in options["callbacks"]:
        if isinstance(callback, kind):
            return callback
    raise KitError(
        f"the callbacks have no {kind.__name__}",
        remedy="put it back: without it this run cannot be stopped, measured or resumed",
    )


def _require_room(model: PeftModel, settings, folder: Path) -> None:
    """Refuse to begin where the disk has no room for the adapter, the checkpoints that are kept and
    the one being written.
    """
    copies = 1
    if settings.save_steps:
        copies += seal.KEEP + 1
    n_trained, _ = model.get_nb_trainable_parameters()
    needed = copies * BYTES_A_PARAMETER * n_trained
    fetch.require_room(folder, needed, "this run")


def _require_untrained(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.any():
            raise KitError(
                "this adapter was trained before",
                remedy="run the cell with get_peft_model once more: then a new run begins at zero",
            )
