"""QLoRA fine-tuning: a frozen 4-bit base, a trained adapter, a paged optimizer, and transformers' own Trainer.

What is ours around the Trainer is small: which layers are adapted, a loss that never holds all logits, a sentinel that stops
on a NaN loss (the Trainer would log it as 0.0), a Stop that finishes the step, checkpoints that are sealed and verified,
and a check that the saved adapter is the trained one.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from qlora_nb.engine import (
    activations,
    budget,
    checkpoints,
    data,
    evaluation,
    fetch,
    generation,
    ledger,
    models,
    objective,
    probes,
    runs,
)
from qlora_nb.engine import optimizers as optimizer_states
from qlora_nb.engine.environment import refuse_many_processes
from qlora_nb.errors import KitError, is_out_of_memory

_STEPS = {"max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}
TRAINERS_OWN = {"optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", *_STEPS}
"""Parameters that the kit's schema and transformers' TrainingArguments have under the same names."""


def attach_adapter(model: PreTrainedModel, settings) -> PeftModel:
    """Freeze the base and put a LoRA adapter on the layers that `target_modules` names.

    `all-linear` adapts every linear layer of the blocks, the head excluded (QLoRA paper, figure 2; PEFT's own default for
    GPT-NeoX would be query_key_value alone). The rest keeps its dtype: nothing is upcast, which saves 1 GiB on
    pythia-12b. The adapter itself is float32.

    Raises:
        KitError: a target that is no linear layer of this model, or a rank above every layer's size.
    """
    model = model.unload() if isinstance(model, PeftModel) else model  # the cell was run before: begin anew
    targets = models.adapted_names(model, settings.target_modules)
    smallest = min(min(m.in_features, m.out_features) for m in models.linear_layers(model).values())
    if settings.r > smallest:
        raise KitError("r is larger than the layers it approximates", value=settings.r, allowed=f"1 to {smallest}")
    own = settings.model_dump(include={"r", "lora_alpha", "lora_dropout"})
    config = LoraConfig(**own, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    torch.manual_seed(settings.seed)  # lora_A is random
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def require_adapter(model: PeftModel) -> None:
    """Refuse a model whose cell with `attach_adapter` has not been run yet, or that was loaded to answer, not to train."""
    if not isinstance(model, PeftModel) or not trainable_parameters(model):
        what = "this model has no adapter that can be trained"
        remedy = "run the cell with training.attach_adapter first, then this one"
        raise KitError(what, value=type(model).__name__, remedy=remedy)


def trainable_parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


SMALLEST_SCALE = 1.0
"""A gradient scaler that has come down to this has halved its scale sixteen times: the gradients themselves are not finite."""


class _Watch(TrainerCallback):
    """Passes on every step's numbers, stops on NaN, stops when asked to.

    `begin` is called before the first pass, `stop` is the event that asks for an end. `updating` is true from the beginning of
    the optimizer's step until the step is counted: what breaks off then leaves weights updated, some or all.
    """

    def __init__(self, begin: Callable[[], None], report: Callable[[dict], None], n_tokens: list[int]):
        self.begin, self.report, self.n_tokens = begin, report, n_tokens
        self.stop = threading.Event()
        self.failure: str | None = None
        self.begun = self.updating = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.updating = False
        if not self.begun:  # a step that is done again belongs to the same run
            self.started, self.first = time.perf_counter(), state.global_step
            self.begin()
            self.begun = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.updating = True

    def on_step_end(self, args, state, control, **kwargs):
        self.updating = False
        if self.stop.is_set():
            control.should_training_stop = control.should_save = True

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self.started
        left = seconds / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
        timing = {"tokens_per_s": sum(self.n_tokens) / seconds, "seconds": seconds, "seconds_left": left}
        timing["memory_bytes"] = torch.cuda.memory_reserved() if models.on_gpu() else psutil.Process().memory_info().rss
        logged = {"loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
        bad = [k for k in ("loss", "grad_norm") if not math.isfinite(logs.get(k, 0.0))]
        if bad == ["grad_norm"] and _was_skipped(optimizer):
            bad, logged["grad_norm"] = [], None
            print(
                f"step {state.global_step}: float16 gradients overflowed; the update is skipped, the scaler's next scale is half"
            )
        self.report({"step": state.global_step, "max_steps": state.max_steps, **logged, **timing})
        self.on_step_end(args, state, control)  # asked just now: this step can still be the last
        if bad:
            self.failure = f"{' and '.join(bad)} became {logs[bad[0]]} at step {state.global_step}"
            control.should_training_stop, control.should_save = True, False  # the checkpoint before is the last good one


def _was_skipped(optimizer) -> bool:
    """Whether accelerate's gradient scaler left out the last update because of an overflow, and can still go lower."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler is not None and optimizer.step_was_skipped and scaler.get_scale() > SMALLEST_SCALE


class _Scale(TrainerCallback):
    """Measures one step, the first one after an update: `held` is the ledger of weights, gradients and states, `moved` the most
    that lived besides, `shape` its largest pass. `shapes` is filled while batches are made: (rows, tokens, tokens that train)."""

    def __init__(self, shapes: list[tuple[int, int, int]]):
        self.weighing, self.shapes = ExitStack(), shapes
        self.held, self.moved, self.shape = None, None, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.weighing.close()  # still open where memory ran out
        self.shapes.clear()
        self.first, self.at = state.global_step, None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.held is None and state.global_step > self.first and optimizer.state:
            self.at = state.global_step
            self.moved = self.weighing.enter_context(activations.weigh())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.held is None and self.at == state.global_step:
            self.weighing.close()
            self.held = ledger.measure(model, optimizer)
            passes = args.gradient_accumulation_steps
            start = (self.at - self.first) * passes
            self.shape = max(self.shapes[start : start + passes], key=lambda shape: shape[0] * shape[1])


class _Sample(TrainerCallback):
    """Every so many steps an answer to the first prompt and the held-out loss; greedy, so the random state stays as it is.

    A look for which memory does not suffice is left out: the step before it is finished, and smaller passes would not help.
    """

    def __init__(self, tokenizer, settings, held_out, run):
        self.tokenizer, self.settings, self.held_out, self.run = tokenizer, settings, held_out, run
        self.row, self.losses = generation.row_of(settings.prompts[0]), {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.settings.sample_steps or state.global_step % self.settings.sample_steps:
            return
        model.eval()
        try:
            self.look(model, state.global_step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            budget.let_go(error)
            print(f"step {state.global_step}: memory does not suffice for a look at the model; the look is left out")
        finally:
            model.train()

    def look(self, model: PeftModel, step: int) -> None:
        """Print and log what the model says after this step."""
        with objective.whole_head(model):
            [said] = generation.answer_all(model, self.tokenizer, [self.row], self.settings)
            print(f"step {step}, asked {self.row['instruction']!r}: {said!r}")
            if self.held_out:
                loss = self.losses[step] = evaluation.response_loss(model, self.tokenizer, self.held_out)
                self.run.log({"step": step, "held_out_loss": loss})
                print(f"step {step}, held-out loss {loss:.3f} nats over {len(self.held_out)} rows")


class _Trainer(Trainer):
    """Takes the rows as they come, saves the adapter alone and closes every checkpoint with `seal`, which is given its folder."""

    def __init__(self, seal: Callable[[Path], None], **options):
        super().__init__(**options)
        self.seal = seal
        self.remove_callback(PrinterCallback)  # it would print every step's numbers a second time

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        optimizer_states.keep_paged(made)
        return made

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)  # data.in_training_order has seen to it

    def save_model(self, output_dir=None, _internal_call=False):
        save_adapter(self.model, output_dir)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with runs.writing(folder):
            super()._save_checkpoint(model, trial)
            self.seal(folder)
        return folder

    def get_batch_samples(self, *args):
        """Called before each step: what draws the dropout masks is remembered, for `save_now`."""
        self._remember_random()
        return super().get_batch_samples(*args)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)  # in the first step after a resume, when its batches are there already
        self._remember_random()

    def _remember_random(self) -> None:
        self.random = {torch.random: torch.random.get_rng_state()}
        if models.on_gpu():
            self.random[torch.cuda] = torch.cuda.get_rng_state()

    def save_now(self) -> Path | None:
        """A checkpoint of the last finished step, in the midst of the next one; None before the first."""
        self.model.zero_grad(set_to_none=True)
        for generators, states in self.random.items():
            generators.set_rng_state(states)
        return self._save_checkpoint(self.model, trial=None) if self.state.global_step else None


def with_fewer_rows(settings):
    """The same rows in a step, in more passes: half as many rows in each, or the next smaller number that divides them.

    >>> from qlora_nb.engine.profiles import validate
    >>> with_fewer_rows(validate({"per_device_train_batch_size": 15})).gradient_accumulation_steps
    3
    """
    rows = settings.per_device_train_batch_size
    fewer = next(n for n in range(rows // 2, 0, -1) if rows % n == 0)
    passes = settings.gradient_accumulation_steps * (rows // fewer)
    return settings.model_copy(update={"per_device_train_batch_size": fewer, "gradient_accumulation_steps": passes})


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """The adapter alone, as safetensors; embeddings are frozen, and asking whether they changed would ask the hub."""
    model.save_pretrained(folder, save_embedding_layers=False)


def _save_sealed(model: PeftModel, folder: Path) -> Path:
    with runs.writing(folder):
        save_adapter(model, folder)
        checkpoints.seal(folder)
    return folder


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, the Trainer sets up no process group, also where a launcher started this one process alone.

    Raises:
        KitError: this is one of several processes.
    """
    refuse_many_processes()
    rank = os.environ.pop("LOCAL_RANK", None)  # what accelerate goes by; without an address it fails, with one it may wait
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank


@contextmanager
def _without_cache(model: PeftModel) -> Iterator[None]:
    """Inside, a model that trains keeps no keys and values; afterwards, also after an error, it is one that answers."""
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = True
        model.eval()


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Inside, ■ (or Ctrl-C) and SIGTERM set the event instead of ending things: the running step is finished, everything saved.

    A SIGTERM is delivered again on the way out, when the folder is in order.
    """
    asked, received = threading.Event(), []

    def note(number: int) -> None:
        received.append(number)
        asked.set()

    try:
        with runs.on_interrupt(note):
            yield asked
    finally:
        if signal.SIGTERM in received:
            signal.raise_signal(signal.SIGTERM)


def arguments(settings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a run into `folder`.

    The base computes in its own dtype and PEFT the adapter in float32: bfloat16 and float32 need no more. float16 has too few
    exponents for small gradients, so there the Trainer's scaler and autocast come in, without autocast's second copy of the
    adapter.
    """
    on_gpu, dtype = models.on_gpu(), models.compute_dtype(settings.compute_dtype)
    torch.set_autocast_cache_enabled(False)
    if settings.tensorboard:
        if not find_spec("tensorboard"):
            raise KitError("the package tensorboard is not installed", remedy="pip install tensorboard, or tensorboard=False")
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    logs = {"logging_steps": 1, "logging_nan_inf_filter": False, "report_to": "tensorboard" if settings.tensorboard else "none"}
    saves = {"save_strategy": "steps" if settings.save_steps else "no", "save_steps": settings.save_steps or 1}
    device = {"fp16": on_gpu and dtype is torch.float16, "use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu}
    own = {**settings.model_dump(include=TRAINERS_OWN), "disable_tqdm": True, "remove_unused_columns": False}
    made = TrainingArguments(output_dir=str(folder / "checkpoints"), **own, **device, **logs, **saves)
    made._n_gpu = min(made.n_gpu, 1)  # of several cards one is used: the Trainer would count rows and loss once for each
    return made


def _train(new_trainer: Callable[..., _Trainer], settings, watch: _Watch, checkpoint: Path | None, go_back: Callable) -> None:
    """Train to the end, in passes of fewer rows each time memory runs out.

    A step that broke off before its update is done again from the weights as they are. One that broke off inside the update has
    changed some of them already: then training is resumed after the newest checkpoint, or begins anew.

    Args:
        new_trainer: makes a trainer from settings and the optimizer to go on with (None: a new one).
        checkpoint: where to begin.
        go_back: puts the weights back to their first values and returns the newest checkpoint, None if there is none.

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
            budget.let_go(error)
            if smaller.per_device_train_batch_size == 1:
                refusal = budget.out_of_memory(error, smaller, model, trainer.optimizer)
                if not watch.updating:
                    trainer.save_now()
                del trainer  # a notebook keeps the refusal, and with it this frame
                raise refusal from error
        finally:
            _end_autocast(model)
        smaller = with_fewer_rows(smaller)
        rows, passes = smaller.per_device_train_batch_size, smaller.gradient_accumulation_steps
        print(f"out of memory in step {trainer.state.global_step + 1}: it is done again in {passes} passes of {rows}")
        optimizer = _bare(trainer.optimizer)
        if watch.updating:
            checkpoint = go_back()
            optimizer_states.begin_anew(optimizer)
        else:
            checkpoint = trainer.save_now()
        trainer = new_trainer(smaller, optimizer)


def _end_autocast(model: torch.nn.Module) -> None:
    """Take off what accelerate put around the model's forward for float16: what is asked next is asked as a loaded model is."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def _bare(optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper, without what a step that broke off left on it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    vars(inner).pop("step", None)
    return inner


def _probed(model: PeftModel, settings) -> int:
    """`probes.before_training`; memory that runs out there is explained like memory that runs out in a step."""
    try:
        return probes.before_training(model, settings)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        budget.let_go(error)
        raise budget.out_of_memory(error, settings, model, None) from error


def _loss_for(model: PeftModel, settings, stack: ExitStack) -> Callable | None:
    """The loss in slices while `stack` is open; of all logits where the model does not bear slices; None: the model's own."""
    chunk = _probed(model, settings)
    if chunk:
        return stack.enter_context(objective.sliced_head(model, chunk))
    return objective.logits_loss if settings.loss_chunk else None


def _go_back(model: PeftModel, first: list, run, losses: list[float], held_out: dict[int, float]) -> Path | None:
    """Give the adapter its first weights and forget what was logged after the newest checkpoint, which is returned."""
    checkpoint = checkpoints.newest(run.folder)
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    print(f"the update had begun: training is resumed after step {step}")
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, value in zip(trained, first, strict=True):
        parameter.data.copy_(value)
    run.cut(step)
    del losses[step:]
    for late in [at for at in held_out if at > step]:
        del held_out[late]
    return checkpoint


def _counting_collator(tokenizer, n_tokens: list[int], shapes: list[tuple[int, int, int]]) -> Callable:
    """`data.collator` that notes of every batch its tokens without padding, and (rows, tokens, tokens that train)."""
    pad = data.collator(tokenizer)

    def collate(batch):
        padded = pad(batch)
        n_tokens.append(sum(len(row["input_ids"]) for row in batch))
        shapes.append((*padded["input_ids"].shape, int((padded["labels"] != data.IGNORED).sum())))
        return padded

    return collate


def _begin(model: PeftModel, run, settings, rows_hash: str, losses: list[float], held_out: dict[int, float]) -> Path | None:
    """The checkpoint to go on from, what was logged up to it put into `losses` and `held_out`; the rest is forgotten.

    Raises:
        KitError: a new run would begin in the middle of an earlier one.
    """
    if run.manifest["status"] != "running":
        raise KitError("this run is over", value=run.folder.name, remedy="start another one")
    checkpoint = checkpoints.newest(run.folder) if run.resumed else None
    if checkpoint:
        checkpoints.require_same(checkpoint, settings, rows_hash)
    elif any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name):
        raise KitError("this adapter was trained before", remedy="attach it once more: then a new run begins at zero")
    if not run.resumed:
        return None
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    logged = run.cut(step)
    losses += [record["loss"] for record in logged if "loss" in record]
    held_out |= {record["step"]: record["held_out_loss"] for record in logged if "held_out_loss" in record}
    print(f"going on after step {step}")
    return checkpoint


def finetune(
    model: PeftModel, tokenizer, rows: Dataset, settings, run, report: Callable[[dict], None], held_out: Dataset | None = None
):
    """Train the adapter on encoded rows, in the calling thread; a resumed run goes on after its newest good checkpoint.

    Args:
        model: what `attach_adapter` returned.
        tokenizer: its tokenizer.
        rows: what `data.encode` returned.
        settings: the resolved parameters.
        run: the `runs.Run` whose folder takes `metrics.jsonl` and `adapter/`.
        report: called after each step with step, loss, learning_rate, tokens_per_s, seconds_left, …
        held_out: encoded rows whose loss is looked at every `sample_steps` steps.

    Returns:
        A dictionary: `losses` (one a step, those before a resume included), `held_out` ({step: loss}), `seconds`,
        `tokens_per_s` (no padding counted), `stopped` (by ■), `adapter` (folder), `run` (whose record is closed: done, or
        interrupted by ■); of the first step after an update `held` (`ledger.Ledger`), `moved` (`activations.Moved`) and
        `shape` (rows, tokens, tokens that train) of its largest pass, None where there was no such step.

    Raises:
        KitError: loss or gradient became NaN or infinite, the GPU's memory ran out, the run was started with other settings or
            rows, no adapter is attached, that of a new run is trained already, another process writes into the folder, or the
            model does not do what these settings rely on (`probes.before_training`). What is refused before the first pass
            leaves no folder and changes no record.
    """
    losses, n_tokens, shapes = [], [], []  # of every step; of every pass the tokens, and its shape
    collate = _counting_collator(tokenizer, n_tokens, shapes)

    def note(step: dict) -> None:
        losses.append(step["loss"])
        run.log(step)
        report(step)

    scale, sample = _Scale(shapes), _Sample(tokenizer, settings, held_out, run)
    watch = _Watch(run.begin, note, n_tokens)

    def go_back() -> Path | None:
        return _go_back(model, first, run, losses, sample.losses)

    try:
        require_adapter(model)
        first = [p.detach().to("cpu", copy=True) for p in model.parameters() if p.requires_grad]
        rows = data.pack(rows, settings.max_length) if settings.packing else rows
        rows = data.in_training_order(rows, settings)
        with stop_on_interrupt() as stop, ExitStack() as stack:
            watch.stop = stop
            loss = _loss_for(model, settings, stack)
            stack.push(scale.weighing)
            stack.enter_context(_alone())
            stack.enter_context(_without_cache(model))
            stack.enter_context(runs.sole_writer(run.folder))
            stack.callback(lambda: stop.is_set() and run.finish("interrupted"))
            copies = 1 + (1 + checkpoints.KEEP) * bool(settings.save_steps)
            fetch.require_room(run.folder, copies * 12 * trainable_parameters(model), "this run")  # weights and two states
            rows_hash = checkpoints.fingerprint(rows)
            checkpoint = _begin(model, run, settings, rows_hash, losses, sample.losses)
            seal = lambda folder: checkpoints.seal(folder, settings=settings.model_dump(), rows=rows_hash)
            own = {"model": model, "train_dataset": rows, "data_collator": collate, "compute_loss_func": loss}

            def new_trainer(how, optimizer):
                how = {"args": arguments(how, run.folder), "optimizers": (optimizer, None)}
                return _Trainer(seal, callbacks=[watch, scale, sample], **how, **own)

            _train(new_trainer, settings, watch, checkpoint, go_back)
            if watch.failure:
                remedy = "lower learning_rate; on a GPU without bfloat16 choose a model trained in float16 (not pythia-1b)"
                raise KitError(watch.failure, remedy=remedy)
            adapter = _save_sealed(model, run.folder / "adapter")
    except BaseException as error:  # the folder must say what became of the run
        if watch.begun:
            run.finish("failed", error=f"{type(error).__name__}: {error}"[:500])
        else:
            run.withdraw()
        raise
    seconds = time.perf_counter() - watch.started
    weighed = {"held": scale.held, "moved": scale.moved, "shape": scale.shape}
    told = {"losses": losses, "held_out": sample.losses, "seconds": seconds, "tokens_per_s": sum(n_tokens) / seconds}
    run.finish("interrupted" if stop.is_set() else "done", tokens_per_s=told["tokens_per_s"], train_seconds=seconds)
    return {**told, "stopped": stop.is_set(), "adapter": adapter, "run": run, **weighed}


@torch.no_grad()
def saved_adapter_difference(model: PeftModel, folder: Path, input_ids: torch.Tensor) -> float:
    """Largest logit difference between the trained adapter and the one read back from `folder`.

    The saved adapter is loaded beside the trained one onto the same 4-bit base, so that no second model is held.
    Adapters of 443 bytes have been saved before; zero is the answer that counts.

    Raises:
        KitError: there is no trained adapter on this model.
    """
    require_adapter(model)
    active = model.active_adapter
    trained = model(input_ids=input_ids).logits
    model.load_adapter(str(folder), adapter_name="read_back")
    model.set_adapter("read_back")
    read_back = model(input_ids=input_ids).logits
    model.set_adapter(active)
    model.delete_adapter("read_back")
    return (trained - read_back).abs().max().item()
