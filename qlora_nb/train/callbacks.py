"""What is watched while transformers' Trainer trains.

The Trainer calls its callbacks at fixed places of a step: before it, before and after the
optimizer's update, at its end, when its numbers are logged. `Watch` records the numbers and stops a
run whose loss is NaN (by default the Trainer would log such a loss as 0.0) or that ■ has stopped.
`MeasureOneStep` measures the memory of one step. `Sample` asks the model a question now and then.
`CountingCollator` counts the tokens of the batches it makes. The run whose folder they write into
(`run`) is given to them by `trainer.QLoRATrainer`. Source: transformers, `trainer_callback.py`.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import psutil
import torch
from peft import PeftModel
from transformers import TrainerCallback

from qlora_nb import processes
from qlora_nb.answer import evaluate, generate
from qlora_nb.memory import ledger, out_of_memory, profiler
from qlora_nb.model import batching, chunked_loss, device

SMALLEST_SCALE = 1.0
"""A gradient scaler that has come down to this has halved its scale sixteen times: the gradients
themselves are not finite.
"""


class CountingCollator:
    """`batching.collator` that counts: `n_tokens` of all batches without padding, and in `shapes`
    of each batch (rows, tokens, tokens that train).
    """

    def __init__(self, tokenizer):
        self.pad = batching.collator(tokenizer)
        self.n_tokens = 0
        self.shapes: list[tuple[int, int, int]] = []

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        padded = self.pad(batch)
        self.n_tokens += sum(len(row["input_ids"]) for row in batch)
        n_trained = int((padded["labels"] != chunked_loss.IGNORED).sum())
        self.shapes.append((*padded["input_ids"].shape, n_trained))
        return padded


class Watch(TrainerCallback):
    """Records every step's numbers in its `run`, stops on NaN, stops when asked to.

    `losses` has one of each step; `seconds` and `tokens_per_s` (no padding counted) are there at
    the end. `stop` is the event that asks for an end, `failure` says why
    training was stopped. `begun` is true from the first pass on. `updating` is true from the
    beginning of the optimizer's update until the step is counted: an error in between leaves some
    or all weights updated. `seconds_before` are those of the run before it was resumed,
    `peak_bytes` the most memory that the process held after any step.
    """

    failure = ""
    begun = False
    updating = False
    seconds_before = 0.0
    peak_bytes = 0

    def __init__(self, report: Callable[[dict], None], batches: CountingCollator):
        self.report = report
        self.batches = batches
        self.stop = threading.Event()
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.updating = False
        if self.begun:  # a step that is done again belongs to the same run
            return
        self.started = time.perf_counter()
        self.first_step = state.global_step
        self.run.save()
        self.begun = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.updating = True

    def on_step_end(self, args, state, control, **kwargs):
        self.updating = False
        if any(processes.gathered(self.stop.is_set())):  # one process is asked, all stop
            self.stop.set()
            control.should_training_stop = True
            control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.started
        self.tokens_per_s = self._n_tokens() / self.seconds
        self.run.manifest["metrics"].update(
            tokens_per_s=self.tokens_per_s,
            train_seconds=self.seconds_before + self.seconds,
            peak_bytes=self.peak_bytes,
        )

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        if "loss" not in logs:
            return
        grad_norm = logs.get("grad_norm")
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if bad == ["grad_norm"] and _was_skipped(optimizer):
            bad = []
            grad_norm = None
            print(
                f"step {state.global_step}: float16 gradients overflowed; "
                "the update is skipped, the scaler's next scale is half"
            )
        seconds = time.perf_counter() - self.started
        seconds_a_step = seconds / max(1, state.global_step - self.first_step)
        step = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": grad_norm,
            "tokens_per_s": self._n_tokens() / seconds,
            "seconds": self.seconds_before + seconds,
            "seconds_left": seconds_a_step * (state.max_steps - state.global_step),
            "memory_bytes": _memory_in_use(),
        }
        self.losses.append(step["loss"])
        self.peak_bytes = max(self.peak_bytes, step["memory_bytes"])
        self.run.log(step)
        self.report(step)
        self.on_step_end(args, state, control)  # asked just now: this step can still be the last
        if bad:
            self.failure = f"{' and '.join(bad)} became {logs[bad[0]]} at step {state.global_step}"
            control.should_training_stop = True
            control.should_save = False  # the checkpoint before is the last good one

    def _n_tokens(self) -> int:
        """Of all processes together."""
        return sum(processes.gathered(self.batches.n_tokens))


def _was_skipped(optimizer) -> bool:
    """Whether accelerate's gradient scaler left out the last update because of an overflow, and can
    still go lower.
    """
    scaler = getattr(optimizer, "scaler", None)
    return scaler is not None and optimizer.step_was_skipped and scaler.get_scale() > SMALLEST_SCALE


def _memory_in_use() -> int:
    """Bytes that this process holds: on the card, or on a machine without one of its RAM."""
    if device.on_gpu():
        return torch.cuda.memory_reserved()
    return psutil.Process().memory_info().rss


class MeasureOneStep(TrainerCallback):
    """Measures one step, the first one after an update: `held` is the ledger of weights, gradients
    and states, `moved` the peak of what lived besides, `shape` its largest pass.
    """

    held = None
    moved = None
    shape = None

    def __init__(self, batches: CountingCollator):
        self.batches = batches
        self.measuring = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self.measuring.close()  # still open where memory ran out
        self.batches.shapes.clear()
        self.first_step = state.global_step
        self.measured_step = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.held is None and state.global_step > self.first_step and optimizer.state:
            self.measured_step = state.global_step
            self.moved = self.measuring.enter_context(profiler.measure_peak())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.held is None and self.measured_step == state.global_step:
            self.measuring.close()
            self.held = ledger.measure(model, optimizer)
            n_passes = args.gradient_accumulation_steps
            start = (self.measured_step - self.first_step) * n_passes
            passes = self.batches.shapes[start : start + n_passes]
            self.shape = max(passes, key=lambda shape: shape[0] * shape[1])


class Sample(TrainerCallback):
    """Every `sample_steps` steps an answer to the first prompt and the held-out loss; greedy, so
    the random state stays as it is.

    A sample for which memory does not suffice is left out: the step before it is finished, and
    smaller passes would not help.
    """

    def __init__(self, tokenizer, settings, held_out):
        self.tokenizer = tokenizer
        self.settings = settings
        self.held_out = held_out
        self.row = generate.row_of(settings.prompts[0], settings.prompt_template)
        self.losses: dict[int, float] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = self.settings.sample_steps
        if every == 0 or state.global_step % every:
            return
        model.eval()
        try:
            self.look(model, state.global_step)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory.freed_memory_of(error):
                raise
            print(
                f"step {state.global_step}: memory does not suffice for a look at the model; "
                "the look is left out"
            )
        finally:
            model.train()

    def look(self, model: PeftModel, step: int) -> None:
        """Print and log what the model says after this step."""
        with chunked_loss.whole_head(model):
            [said] = generate.answer_all(model, self.tokenizer, [self.row], self.settings)
            print(f"step {step}, asked {self.row['instruction']!r}: {said!r}")
            if self.held_out:
                loss = evaluate.response_loss(model, self.tokenizer, self.held_out)
                self.losses[step] = loss
                self.run.log({"step": step, "held_out_loss": loss})
                print(f"step {step}, held-out loss {loss:.3f} nats over {len(self.held_out)} rows")
