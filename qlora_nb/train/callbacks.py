"""What is watched while transformers' Trainer works: every step's numbers, NaN, stopping, one
measured step, sample answers.
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

from qlora_nb.answer import evaluate, generate
from qlora_nb.errors import is_out_of_memory
from qlora_nb.memory import ledger, out_of_memory, profiler
from qlora_nb.model import chunked_loss, device

SMALLEST_SCALE = 1.0
"""A gradient scaler that has come down to this has halved its scale sixteen times: the gradients
themselves are not finite.
"""


class Watch(TrainerCallback):
    """Passes on every step's numbers, stops on NaN, stops when asked to.

    `begin` is called before the first pass, `stop` is the event that asks for an end. `updating` is
    true from the beginning of the optimizer's step until the step is counted: what breaks off then
    leaves weights updated, some or all.
    """

    def __init__(
        self, begin: Callable[[], None], report: Callable[[dict], None], n_tokens: list[int]
    ):
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
        left = (
            seconds / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
        )
        timing = {
            "tokens_per_s": sum(self.n_tokens) / seconds,
            "seconds": seconds,
            "seconds_left": left,
        }
        timing["memory_bytes"] = (
            torch.cuda.memory_reserved() if device.on_gpu() else psutil.Process().memory_info().rss
        )
        logged = {
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
        }
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
            control.should_training_stop, control.should_save = (
                True,
                False,
            )  # the checkpoint before is the last good one


def _was_skipped(optimizer) -> bool:
    """Whether accelerate's gradient scaler left out the last update because of an overflow, and can
    still go lower.
    """
    scaler = getattr(optimizer, "scaler", None)
    return scaler is not None and optimizer.step_was_skipped and scaler.get_scale() > SMALLEST_SCALE


class MeasureOneStep(TrainerCallback):
    """Measures one step, the first one after an update: `held` is the ledger of weights, gradients
    and states, `moved` the most that lived besides, `shape` its largest pass. `shapes` is filled
    while batches are made: (rows, tokens, tokens that train)."""

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
            self.moved = self.weighing.enter_context(profiler.measure_peak())

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.held is None and self.at == state.global_step:
            self.weighing.close()
            self.held = ledger.measure(model, optimizer)
            passes = args.gradient_accumulation_steps
            start = (self.at - self.first) * passes
            self.shape = max(
                self.shapes[start : start + passes], key=lambda shape: shape[0] * shape[1]
            )


class Sample(TrainerCallback):
    """Every so many steps an answer to the first prompt and the held-out loss; greedy, so the
    random state stays as it is.

    A look for which memory does not suffice is left out: the step before it is finished, and
    smaller passes would not help.
    """

    def __init__(self, tokenizer, settings, held_out, run):
        self.tokenizer, self.settings, self.held_out, self.run = tokenizer, settings, held_out, run
        self.row, self.losses = generate.row_of(settings.prompts[0]), {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.settings.sample_steps or state.global_step % self.settings.sample_steps:
            return
        model.eval()
        try:
            self.look(model, state.global_step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory.free_memory_of(error)
            print(
                f"step {state.global_step}: memory does not suffice for a look at the model; the look is left out"
            )
        finally:
            model.train()

    def look(self, model: PeftModel, step: int) -> None:
        """Print and log what the model says after this step."""
        with chunked_loss.whole_head(model):
            [said] = generate.answer_all(model, self.tokenizer, [self.row], self.settings)
            print(f"step {step}, asked {self.row['instruction']!r}: {said!r}")
            if self.held_out:
                loss = self.losses[step] = evaluate.response_loss(
                    model, self.tokenizer, self.held_out
                )
                self.run.log({"step": step, "held_out_loss": loss})
                print(f"step {step}, held-out loss {loss:.3f} nats over {len(self.held_out)} rows")
