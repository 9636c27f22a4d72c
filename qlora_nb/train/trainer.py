"""QLoRA fine-tuning: a frozen 4-bit base, a trained adapter, a paged optimizer, and transformers'
own Trainer.

What is ours around the Trainer is small: which layers are adapted, a loss that never holds all
logits, a sentinel that stops on a NaN loss (the Trainer would log it as 0.0), a Stop that finishes
the step, checkpoints that are sealed and verified, and a check that the saved adapter is the
trained one.
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
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from qlora_nb.errors import KitError, is_out_of_memory
from qlora_nb.memory import out_of_memory, preflight
from qlora_nb.model import batching, chunked_loss, device, fetch, probes
from qlora_nb.record import files, interrupts, seal
from qlora_nb.train import attach, callbacks, checkpoints, optimizers

_STEPS = {"max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}

TRAINERS_OWN = {
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    *_STEPS,
}
"""Parameters that the kit's schema and transformers' TrainingArguments have under the same
names.
"""


class QLoRATrainer(Trainer):
    """Takes the rows as they come, saves the adapter alone and closes every checkpoint with `seal`,
    which is given its folder.
    """

    def __init__(self, seal: Callable[[Path], None], **options):
        super().__init__(**options)
        self.seal = seal
        self.remove_callback(PrinterCallback)  # it would print every step's numbers a second time

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        optimizers.keep_paged(made)
        return made

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(
            train_dataset or self.train_dataset
        )  # batching.in_training_order has seen to it

    def save_model(self, output_dir=None, _internal_call=False):
        attach.save_adapter(self.model, output_dir)

    def _save_checkpoint(self, model, trial):
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
        super()._load_rng_state(
            checkpoint
        )  # in the first step after a resume, when its batches are there already
        self._remember_random()

    def _remember_random(self) -> None:
        self.random = {torch.random: torch.random.get_rng_state()}
        if device.on_gpu():
            self.random[torch.cuda] = torch.cuda.get_rng_state()

    def save_now(self) -> Path | None:
        """A checkpoint of the last finished step, in the midst of the next one; None before the
        first.
        """
        self.model.zero_grad(set_to_none=True)
        for generators, states in self.random.items():
            generators.set_rng_state(states)
        return self._save_checkpoint(self.model, trial=None) if self.state.global_step else None


def with_fewer_rows(settings):
    """The same rows in a step, in more passes: half as many rows in each, or the next smaller
    number that divides them.

    >>> from qlora_nb.settings import validate
    >>> with_fewer_rows(validate({"per_device_train_batch_size": 15})).gradient_accumulation_steps
    3
    """
    rows = settings.per_device_train_batch_size
    fewer = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)
    passes = settings.gradient_accumulation_steps * (rows // fewer)
    return settings.replace(per_device_train_batch_size=fewer, gradient_accumulation_steps=passes)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, the Trainer sets up no process group, also where a launcher started this one process
    alone.

    Raises:
        KitError: this is one of several processes.
    """
    preflight.refuse_many_processes()
    rank = os.environ.pop(
        "LOCAL_RANK", None
    )  # what accelerate goes by; without an address it fails, with one it may wait
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


def arguments(settings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a run into `folder`.

    The base computes in its own dtype and PEFT the adapter in float32: bfloat16 and float32 need no
    more. float16 has too few exponents for small gradients, so there the Trainer's scaler and
    autocast come in, without autocast's second copy of the adapter.
    """
    on_gpu, dtype = device.on_gpu(), device.compute_dtype(settings.compute_dtype)
    torch.set_autocast_cache_enabled(False)
    if settings.tensorboard:
        if not find_spec("tensorboard"):
            raise KitError(
                "the package tensorboard is not installed",
                remedy="pip install tensorboard, or tensorboard=False",
            )
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    logs = {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "tensorboard" if settings.tensorboard else "none",
    }
    saves = {
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 1,
    }
    precision = {
        "fp16": on_gpu and dtype is torch.float16,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
    }
    own = {
        **settings.model_dump(include=TRAINERS_OWN),
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    made = TrainingArguments(
        output_dir=str(folder / "checkpoints"), **own, **precision, **logs, **saves
    )
    made._n_gpu = min(
        made.n_gpu, 1
    )  # of several cards one is used: the Trainer would count rows and loss once for each
    return made


def _train(
    new_trainer: Callable[..., QLoRATrainer],
    settings,
    watch: callbacks.Watch,
    checkpoint: Path | None,
    go_back: Callable,
) -> None:
    """Train to the end, in passes of fewer rows each time memory runs out.

    A step that broke off before its update is done again from the weights as they are. One that
    broke off inside the update has
    changed some of them already: then training is resumed after the newest checkpoint, or begins
        anew.

    Args:
        new_trainer: makes a trainer from settings and the optimizer to go on with (None: a new
            one).
        checkpoint: where to begin.
        go_back: puts the weights back to their first values and returns the newest checkpoint, None
            if there is none.

    Raises:
        KitError: memory ran out with one row in a pass.
    """
    trainer, smaller = new_trainer(settings, None), settings
    model = trainer.model
    while True:
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory.free_memory_of(error)
            if smaller.per_device_train_batch_size == 1:
                refusal = out_of_memory.explain(error, smaller, model, trainer.optimizer)
                if not watch.updating:
                    trainer.save_now()
                del trainer  # a notebook keeps the refusal, and with it this frame
                raise refusal from error
        finally:
            _end_autocast(model)
        smaller = with_fewer_rows(smaller)
        rows, passes = smaller.per_device_train_batch_size, smaller.gradient_accumulation_steps
        print(
            f"out of memory in step {trainer.state.global_step + 1}: it is done again in {passes} passes of {rows}"
        )
        optimizer = _bare(trainer.optimizer)
        if watch.updating:
            checkpoint = go_back()
            optimizers.begin_anew(optimizer)
        else:
            checkpoint = trainer.save_now()
        trainer = new_trainer(smaller, optimizer)


def _end_autocast(model: torch.nn.Module) -> None:
    """Take off what accelerate put around the model's forward for float16: what is asked next is
    asked as a loaded model is.
    """
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def _bare(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, without what a step that broke off left on it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    vars(inner).pop("step", None)
    return inner


def _probed(model: PeftModel, settings) -> int:
    """`probes.before_training`; memory that runs out there is explained like memory that runs out
    in a step.
    """
    try:
        return probes.before_training(model, settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory.free_memory_of(error)
        raise out_of_memory.explain(error, settings, model, None) from error


def _loss_for(model: PeftModel, settings, stack: ExitStack) -> Callable | None:
    """The loss in slices while `stack` is open; of all logits where the model does not bear slices;
    None: the model's own.
    """
    chunk = _probed(model, settings)
    if chunk:
        return stack.enter_context(chunked_loss.chunked_head(model, chunk))
    return chunked_loss.logits_cross_entropy if settings.loss_chunk else None


def _go_back(
    model: PeftModel, first: list, run, losses: list[float], held_out: dict[int, float]
) -> Path | None:
    """Give the adapter its first weights and forget what was logged after the newest checkpoint,
    which is returned.
    """
    checkpoint = seal.newest_checkpoint(run.folder)
    step = seal.step_of(checkpoint) if checkpoint else 0
    print(f"the update had begun: training is resumed after step {step}")
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, value in zip(trained, first, strict=True):
        parameter.data.copy_(value)
    run.cut(step)
    del losses[step:]
    for late in [at for at in held_out if at > step]:
        del held_out[late]
    return checkpoint


def _counting_collator(
    tokenizer, n_tokens: list[int], shapes: list[tuple[int, int, int]]
) -> Callable:
    """`batching.collator` that notes of every batch its tokens without padding, and (rows, tokens,
    tokens that train).
    """
    pad = batching.collator(tokenizer)

    def collate(batch):
        padded = pad(batch)
        n_tokens.append(sum(len(row["input_ids"]) for row in batch))
        shapes.append(
            (*padded["input_ids"].shape, int((padded["labels"] != chunked_loss.IGNORED).sum()))
        )
        return padded

    return collate


def _begin(
    model: PeftModel, run, settings, rows_hash: str, losses: list[float], held_out: dict[int, float]
) -> Path | None:
    """The checkpoint to go on from, what was logged up to it put into `losses` and `held_out`; the
    rest is forgotten.

    Raises:
        KitError: a new run would begin in the middle of an earlier one.
    """
    if run.manifest["status"] != "running":
        raise KitError("this run is over", value=run.folder.name, remedy="start another one")
    checkpoint = seal.newest_checkpoint(run.folder) if run.resumed else None
    if checkpoint:
        checkpoints.require_same(checkpoint, settings, rows_hash)
    elif any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name):
        raise KitError(
            "this adapter was trained before",
            remedy="attach it once more: then a new run begins at zero",
        )
    if not run.resumed:
        return None
    step = seal.step_of(checkpoint) if checkpoint else 0
    logged = run.cut(step)
    losses += [record["loss"] for record in logged if "loss" in record]
    held_out |= {
        record["step"]: record["held_out_loss"] for record in logged if "held_out_loss" in record
    }
    print(f"going on after step {step}")
    return checkpoint


def finetune(
    model: PeftModel,
    tokenizer,
    rows: Dataset,
    settings,
    run,
    report: Callable[[dict], None],
    held_out: Dataset | None = None,
):
    """Train the adapter on encoded rows, in the calling thread; a resumed run goes on after its
    newest good checkpoint.

    Args:
        model: what `attach_adapter` returned.
        tokenizer: its tokenizer.
        rows: what `data.tokenize_rows` returned.
        settings: the resolved parameters.
        run: the `runs.Run` whose folder takes `metrics.jsonl` and `adapter/`.
        report: called after each step with step, loss, learning_rate, tokens_per_s, seconds_left, …
        held_out: encoded rows whose loss is looked at every `sample_steps` steps.

    Returns:
        A dictionary: `losses` (one a step, those before a resume included), `held_out` ({step:
        loss}), `seconds`, `tokens_per_s` (no padding counted), `stopped` (by ■), `adapter`
        (folder), `run` (whose record is closed: done, or interrupted by ■); of the first step after
        an update `held` (`ledger.Ledger`), `moved` (`activations.Moved`) and `shape` (rows, tokens,
        tokens that train) of its largest pass, None where there was no such step.

    Raises:
        KitError: loss or gradient became NaN or infinite, the GPU's memory ran out, the run was
            started with other settings or rows, no adapter is attached, that of a new run is
            trained already, another process writes into the folder, or the model does not do what
            these settings rely on (`probes.before_training`). What is refused before the first pass
            leaves no folder and changes no record.
    """
    losses, n_tokens, shapes = [], [], []  # of every step; of every pass the tokens, and its shape
    collate = _counting_collator(tokenizer, n_tokens, shapes)

    def note(step: dict) -> None:
        losses.append(step["loss"])
        run.log(step)
        report(step)

    scale, sample = (
        callbacks.MeasureOneStep(shapes),
        callbacks.Sample(tokenizer, settings, held_out, run),
    )
    watch = callbacks.Watch(run.begin, note, n_tokens)

    def go_back() -> Path | None:
        return _go_back(model, first, run, losses, sample.losses)

    try:
        attach.require_adapter(model)
        first = [p.detach().to("cpu", copy=True) for p in model.parameters() if p.requires_grad]
        rows = batching.pack(rows, settings.max_length) if settings.packing else rows
        rows = batching.in_training_order(rows, settings)
        with interrupts.stop_on_interrupt() as stop, ExitStack() as stack:
            watch.stop = stop
            loss = _loss_for(model, settings, stack)
            stack.push(scale.weighing)
            stack.enter_context(_alone())
            stack.enter_context(_without_cache(model))
            stack.enter_context(files.sole_writer(run.folder))
            stack.callback(lambda: stop.is_set() and run.finish("interrupted"))
            copies = 1 + (1 + seal.KEEP) * bool(settings.save_steps)
            fetch.require_room(
                run.folder, copies * 12 * attach.trainable_parameters(model), "this run"
            )  # weights and two states
            rows_hash = checkpoints.fingerprint(rows)
            checkpoint = _begin(model, run, settings, rows_hash, losses, sample.losses)
            close = lambda folder: seal.write_seal(
                folder, settings=settings.model_dump(), rows=rows_hash
            )
            own = {
                "model": model,
                "train_dataset": rows,
                "data_collator": collate,
                "compute_loss_func": loss,
            }

            def new_trainer(how, optimizer):
                how = {"args": arguments(how, run.folder), "optimizers": (optimizer, None)}
                return QLoRATrainer(close, callbacks=[watch, scale, sample], **how, **own)

            _train(new_trainer, settings, watch, checkpoint, go_back)
            if watch.failure:
                remedy = "lower learning_rate; on a GPU without bfloat16 choose a model trained in float16 (not pythia-1b)"
                raise KitError(watch.failure, remedy=remedy)
            adapter = attach.save_sealed(model, run.folder / "adapter")
    except BaseException as error:  # the folder must say what became of the run
        if watch.begun:
            run.finish("failed", error=f"{type(error).__name__}: {error}"[:500])
        else:
            run.withdraw()
        raise
    seconds = time.perf_counter() - watch.started
    weighed = {"held": scale.held, "moved": scale.moved, "shape": scale.shape}
    told = {
        "losses": losses,
        "held_out": sample.losses,
        "seconds": seconds,
        "tokens_per_s": sum(n_tokens) / seconds,
    }
    run.finish(
        "interrupted" if stop.is_set() else "done",
        tokens_per_s=told["tokens_per_s"],
        train_seconds=seconds,
    )
    return {**told, "stopped": stop.is_set(), "adapter": adapter, "run": run, **weighed}
