"""Panels around an engine call: watching a training run, planning one, and asking two models the
same question.

Only traits are set while something runs: text goes into `Label` and `Textarea`, which never
interpret it, so nothing a model says can run in the page. Work started by a button runs in one
worker thread and stops by an Event.
"""

import threading
import time

import ipywidgets as W
from IPython.core.pylabtools import print_figure

from qlora_nb.answer import generate
from qlora_nb.errors import KitError
from qlora_nb.memory import budget
from qlora_nb.memory.plan import plan_of
from qlora_nb.pythia import PYTHIA
from qlora_nb.ui import charts
from qlora_nb.ui.widgets import CONTROL, LABEL, choice, choice_slider, explore, float_slider, naming


class LiveTraining:
    """Progress bar, numbers and loss curve that move while a cell trains; plain lines for a batch
    run.

    `display(view.box)`, then pass `view` as `report` to `training.finetune`.
    """

    def __init__(self, max_steps: int, n_lines: int = 8, redraw_s: float = 2.0):
        self.bar = W.FloatProgress(0, min=0, max=max_steps, description="training", **CONTROL)
        self.text = W.Label("waiting for the first step")
        self.curve = W.Image(format="png", layout=W.Layout(max_width="700px", display="none"))
        self.box = W.VBox([self.bar, self.text, self.curve])
        self.losses: list[float] = []
        self.every, self.redraw_s, self.drawn, self.said = (
            max(1, max_steps // n_lines),
            redraw_s,
            0.0,
            time.perf_counter(),
        )

    def __call__(self, step: dict) -> None:
        self.losses.append(step["loss"])
        line = (
            f"step {step['step']}/{step['max_steps']} · loss {step['loss']:.3f} · learning rate {step['learning_rate']:.1e} · "
            f"{step['tokens_per_s']:,.0f} tokens/s · {step['memory_bytes'] / 2**30:.2f} GiB · {step['seconds_left']:.0f} s left"
        )
        self.bar.value, self.text.value = step["step"], line
        last = step["step"] == step["max_steps"]
        if (
            step["step"] % self.every == 0 or last or time.perf_counter() - self.said > 60
        ):  # a batch run shows these lines alone
            print(line)
            self.said = time.perf_counter()
        if last or time.perf_counter() - self.drawn > self.redraw_s:
            self.curve.value = print_figure(
                charts.loss_curve(self.losses), bbox_inches=None, dpi=80
            )
            self.curve.layout.display = "block"
            self.drawn = time.perf_counter()


def plan_figure(settings, gpu_gib: float | None = None):
    """The peaks of fine-tuning and of answering with these settings: the figure that the planner
    varies.
    """
    name = settings.model_id.split("/")[-1].replace("$", r"\$")  # two would begin a formula
    peak = lambda train: budget.peak(plan_of(settings, train, on_gpu=bool(gpu_gib)))
    return charts.memory_bars(
        {f"fine-tuning\n{name}": peak(True), f"answering\n{name}": peak(False)}, gpu_gib
    )


def planner(settings, gpu_gib: float | None = None) -> W.VBox:
    """Model × card × settings → the two peaks, the first lever to pull if it does not fit, and the
    papermill line.

    Start values are the settings' own; without `gpu_gib` there is no card, and the model stays as
    it is.
    """
    own = settings.model_id
    choices = {
        "model_id": [
            own,
            *(
                f"EleutherAI/pythia-{n}"
                for n in PYTHIA
                if gpu_gib and not own.endswith(f"pythia-{n}")
            ),
        ],
        "gpu_gib": sorted({6.0, 8.0, 12.0, 16.0, 24.0, 48.0, 80.0, gpu_gib}) if gpu_gib else [None],
        "r": sorted({4, 8, 16, 32, 64, settings.r}),
        "max_length": sorted({128, 256, 512, 1024, 2048, settings.max_length}),
        "per_device_train_batch_size": sorted(
            {1, 2, 4, 8, 16, settings.per_device_train_batch_size}
        ),
        "optim": sorted({"paged_adamw_32bit", "paged_adamw_8bit", settings.optim}),
        "gradient_checkpointing": [True, False],
        "loss_chunk": sorted({0, 128, settings.loss_chunk}),
    }
    start = settings.model_dump() | {"gpu_gib": gpu_gib}
    kinds = dict.fromkeys(choices, choice) | dict.fromkeys(
        ("gpu_gib", "r", "max_length"), choice_slider
    )
    controls = {
        name: kinds[name](name, options, start[name])
        for name, options in choices.items()
        if len(options) > 1
    }
    advice = W.Textarea(
        description="advice", disabled=True, layout=W.Layout(width="95%", height="6em"), style=LABEL
    )

    def plan(gpu_gib=gpu_gib, **values):
        chosen = settings.replace(**values)
        advice.value = (
            budget.advice(chosen, gpu_gib) + "\n" + chosen.papermill_line("06_finetune_pythia_12b")
        )
        return plan_figure(chosen, gpu_gib)

    box = explore(plan, **controls)
    box.children = (*controls.values(), advice, box.children[-1])
    box.controls, box.advice = (
        controls,
        advice,
    )  # for the tests, which drive every control to both ends
    return box


class SideBySide:
    """One prompt, two answers: the base model and the tuned one, streamed into two text boxes.

    One worker thread at a time; it sets traits only. Stop ends it after the current token.
    """

    def __init__(self, model, tokenizer, settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        wide = W.Layout(width="95%", height="7em")
        self.prompt = W.Textarea(
            settings.prompts[0], description="prompt", layout=wide, style=LABEL
        )
        self.ask = W.Button(description="Ask both", button_style="primary", icon="play")
        self.stop_button = W.Button(description="Stop", icon="stop", disabled=True)
        ranges = {
            "temperature": (0, 2, 0.1),
            "top_p": (0.05, 1, 0.05),
            "repetition_penalty": (1, 2, 0.05),
        }
        sliders = {
            name: float_slider(name, getattr(settings, name), *ends)
            for name, ends in ranges.items()
        }
        self.controls = sliders | {
            "seed": W.BoundedIntText(
                settings.seed, min=0, max=2**31 - 1, description="seed", **CONTROL
            )
        }
        self.note = W.Label(
            "first line: the instruction; the rest: the input; temperature 0 is greedy"
        )
        self.history, self.positions = (
            W.Textarea(disabled=True, description=name, layout=wide, style=LABEL)
            for name in ("history", "token by token")
        )
        tall, half = W.Layout(width="99%", height="8em"), W.Layout(width="48%")
        empty = {"disabled": True, "placeholder": "no answer yet", "layout": tall, "style": LABEL}
        self.answers = {
            name: W.Textarea(description=f"{name} model", **empty) for name in ("base", "tuned")
        }
        self.costs = {name: W.Label("") for name in self.answers}
        sides = [W.VBox([box, self.costs[name]], layout=half) for name, box in self.answers.items()]
        buttons, both = (
            W.HBox([self.ask, self.stop_button]),
            W.HBox(sides, layout=W.Layout(width="97%")),
        )
        texts = [self.note, both, self.positions, self.history]
        self.box = W.VBox([self.prompt, *self.controls.values(), buttons, *texts, naming()])
        self.box.add_class("chat")
        self.stopping, self.worker = threading.Event(), None
        self.ask.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stopping.set())

    def start(self) -> None:
        """Answer the prompt in a worker thread; ignored while one is at work."""
        if self.worker and self.worker.is_alive():
            return
        self.stopping.clear()
        self.ask.disabled, self.stop_button.disabled = True, False
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def _work(self) -> None:
        chosen = {name: control.value for name, control in self.controls.items()}
        settings = self.settings.replace(**chosen)
        self.note.value = "answering"
        try:
            row = generate.row_of(self.prompt.value)
            for name, box in self.answers.items():
                box.value = self.costs[name].value = ""
                for said in generate.stream(
                    self.model, self.tokenizer, row, settings, name == "tuned", self.stopping
                ):
                    box.value = said.text
                cost = f"{said.n_tokens} tokens · first after {1000 * said.first_token_s:.0f} ms"
                chances = f"{said.left:.1f} tokens to choose from on average, {said.turned} choices turned by the penalty"
                self.costs[name].value = f"{cost} · {said.tokens_per_s:.0f} tokens/s · {chances}"
                if self.stopping.is_set():
                    break
            steps = generate.next_tokens_along(
                self.model, self.tokenizer, row, settings, self.answers["tuned"].value
            )
            best = lambda top: " ".join(f"{token!r} {p:.0%}" for token, p in top)
            lines = [
                f"{t!r} · {bits:.1f} bits apart · base: {best(b)} · tuned: {best(a)}"
                for t, b, a, bits in steps
            ]
            self.positions.value = "\n".join(lines)
            first = "; ".join(
                f"{n}: {top[0][0]!r} {top[0][1]:.0%}"
                for n, top in zip(self.answers, steps[0][1:3], strict=True)
            )
            state = "stopped" if self.stopping.is_set() else "done"
            self.note.value = f"{state} · first token {first} · {steps[0][3]:.1f} bits apart"
            said = "".join(f"\n  {name}: {box.value}" for name, box in self.answers.items())
            self.history.value = f"{self.prompt.value}\n  {chosen}{said}\n\n{self.history.value}"[
                :20_000
            ]
        except Exception as error:  # a worker thread has nobody else to tell
            self.note.value = (
                str(error)
                if isinstance(error, KitError)
                else f"{type(error).__name__}: {str(error)[:200]}"
            )
        finally:
            self.ask.disabled, self.stop_button.disabled = False, True
