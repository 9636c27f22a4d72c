"""Panels of notebooks 01, 06 and 07: watch a training run, plan one, ask two models one question.

Each is a class or function around a call of the package. What it shows while something runs it
sets as values of `Label` and `Textarea`, which never interpret text: nothing that a model writes
can run in the page. Work that a button starts runs in one worker thread and stops by an Event.
"""

import math
import threading
import time
from collections.abc import Sequence

import ipywidgets as W

from qlora_nb import cards
from qlora_nb.answer import generate
from qlora_nb.memory import budget
from qlora_nb.memory.plan import plan_of
from qlora_nb.pythia import PYTHIA
from qlora_nb.ui import charts, style, widgets


class LiveTraining:
    """Progress bar, numbers and loss curve of a run while it trains; plain lines for a batch run.

    `display(view.box)`, then give `view` to `callbacks.Watch`, which calls it after each step.

    Args:
        max_steps: optimizer steps of the run. Eight of them are printed, and one a minute where
            steps are slow; the curve is drawn every two seconds.
    """

    def __init__(self, max_steps: int):
        self.bar = W.FloatProgress(max=max_steps, description="training", **widgets.CONTROL)
        self.text = W.Label("waiting for the first step")
        self.curve = W.HTML(layout=W.Layout(max_width="700px"))
        self.box = W.VBox([self.bar, self.text, self.curve])
        self.losses: dict[int, float] = {}
        self.every = max(1, max_steps // 8)
        self.drawn = 0.0
        self.said = time.perf_counter()

    def __call__(self, step: dict) -> None:
        """Show the numbers of one optimizer step."""
        number = step["step"]
        last = number == step["max_steps"]
        now = time.perf_counter()
        line = (
            f"step {number}/{step['max_steps']} · loss {step['loss']:.3f} · "
            f"learning rate {step['learning_rate']:.1e} · {step['tokens_per_s']:,.0f} tokens/s · "
            f"{step['memory_bytes'] / cards.GIB:.2f} GiB · {step['seconds_left']:.0f} s left"
        )
        self.losses[number] = step["loss"]
        self.bar.value = number
        self.text.value = line
        if last or number % self.every == 0 or now - self.said > 60:
            print(line)
            self.said = now
        if last or now - self.drawn > 2:
            # steps before a resume were not seen, steps that are done again are drawn anew
            losses = [self.losses.get(n, math.nan) for n in range(1, number + 1)]
            figure = charts.loss_curve(losses, max_steps=step["max_steps"])
            self.curve.value = widgets.picture(figure)
            self.drawn = time.perf_counter()


def plan_figure(settings, gpu_gib: float | None = None):
    """Predicted peak memory of fine-tuning and of answering: the figure that the planner varies.

    Args:
        settings: the resolved parameters.
        gpu_gib: memory of a card (GiB), or None for a machine without one.
    """
    name = settings.model_id.split("/")[-1].replace("$", r"\$")  # two would begin a formula
    peaks = {}
    for what, train in (("fine-tuning", True), ("answering", False)):
        plan = plan_of(settings, train, on_gpu=gpu_gib is not None)
        peaks[f"{what}\n{name}"] = budget.peak(plan)
    return charts.memory_bars(peaks, gpu_gib)


OFFERED = style.table("planner.toml")
"""What the planner offers of each parameter, besides the value it has."""


def planner(settings, gpu_gib: float | None = None) -> W.VBox:
    """Choose model, card and parameters; see both peaks, what helps if it does not fit, and the
    papermill command.

    Args:
        settings: the resolved parameters, where every control starts.
        gpu_gib: memory of the card (GiB) to start with; None leaves card and model as they are.

    Returns:
        `explore`'s box; `.controls` (name → widget) and `.advice` are for tests.
    """
    controls = {}
    if gpu_gib is not None:
        own = settings.model_id
        models = dict.fromkeys([own, *(f"EleutherAI/pythia-{size}" for size in PYTHIA)])
        cards_gib = sorted({*OFFERED["cards_gib"], gpu_gib})
        controls["model_id"] = widgets.choice("model_id", list(models), own)
        controls["gpu_gib"] = widgets.choice_slider("gpu_gib", cards_gib, gpu_gib)
    for name, values in OFFERED["parameters"].items():
        own = getattr(settings, name)
        options = values if own in values else sorted([*values, own])
        control = widgets.choice_slider if name in ("r", "max_length") else widgets.choice
        controls[name] = control(name, options, own)
    advice = widgets.text_box("advice", height="6em")

    def plan(gpu_gib=gpu_gib, **values):
        chosen = settings.replace(**values)
        command = chosen.papermill_line("06_finetune_pythia_12b")
        advice.value = f"{budget.advice(chosen, gpu_gib)}\n{command}"
        return plan_figure(chosen, gpu_gib)

    box = widgets.explore(plan, **controls)
    box.children = (*controls.values(), advice, *box.children[-2:])
    box.controls = controls
    box.advice = advice
    return box


WRAPPED = {"width": "97%", "flex_flow": "row wrap"}
"""Of a row that goes on in the next line where the page is narrow."""


class SideBySide:
    """One prompt, two answers: the base model and the tuned one, streamed into two text boxes.

    One worker thread at a time; Stop ends it after the current token. `chat.box` is shown.

    Args:
        model: a `PeftModel`, whose adapter is switched off for the base model's answer.
        tokenizer: its tokenizer.
        settings: the resolved parameters, where prompt and controls start.
        words: offered as buttons, each of which adds its word to the prompt.
    """

    def __init__(self, model, tokenizer, settings, words: Sequence[str] = ()):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.stopping = threading.Event()
        self.forget()
        self.prompt = widgets.text_box("prompt", disabled=False, value=settings.prompts[0])
        controls = [
            widgets.float_slider("temperature", settings.temperature, 0, 2, 0.1),
            widgets.float_slider("top_p", settings.top_p, 0.05, 1, 0.05),
            widgets.float_slider("repetition_penalty", settings.repetition_penalty, 1, 2, 0.05),
            W.BoundedIntText(settings.seed, max=2**31 - 1, description="seed", **widgets.CONTROL),
        ]
        self.controls = {control.description: control for control in controls}
        self.ask = W.Button(description="Ask both", button_style="primary", icon="play")
        self.ask.on_click(lambda _: self.start())
        self.stop_button = W.Button(description="Stop", icon="stop", disabled=True)
        self.stop_button.on_click(lambda _: self.stopping.set())
        is_chat = settings.prompt_template == "chat"
        self.goes_on = W.Checkbox(is_chat, description="go on with the conversation")
        self.goes_on.observe(lambda _: self.forget(), "value")
        self.note = W.Label(
            "first line: the instruction; the rest: the input; temperature 0 is greedy"
        )
        self.answers = {}
        self.costs = {}
        sides = []
        for name in ("base", "tuned"):
            box = widgets.text_box(f"{name} model", "8em", "99%", placeholder="no answer yet")
            self.answers[name] = box
            self.costs[name] = widgets.text_box(f"{name} cost", "7em", "99%")
            sides.append(W.VBox([box, self.costs[name]], layout=W.Layout(flex="1 1 330px")))
        self.chips = []
        for word in words:
            chip = W.Button(description=word, layout=W.Layout(width="auto"))
            chip.on_click(self._add_word)
            self.chips.append(chip)
        self.positions = widgets.text_box("token by token")
        self.history = widgets.text_box("history")
        self.box = W.VBox(
            [
                self.prompt,
                *self.controls.values(),
                W.HBox([self.ask, self.stop_button, self.goes_on], layout=W.Layout(**WRAPPED)),
                self.note,
                W.HBox(self.chips, layout=W.Layout(**WRAPPED, max_height="11em", overflow="auto")),
                W.HBox(sides, layout=W.Layout(**WRAPPED)),
                self.positions,
                self.history,
                widgets.naming(),
            ]
        )
        self.box.add_class("chat")

    def _add_word(self, chip: W.Button) -> None:
        self.prompt.value = f"{self.prompt.value.rstrip()} {chip.description}"

    def start(self) -> None:
        """Answer the prompt in a worker thread; ignored while one is at work."""
        if self.ask.disabled:
            return
        self.stopping.clear()
        self.ask.disabled = True
        self.stop_button.disabled = False
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def _work(self) -> None:
        try:
            self._answer_both()
        except Exception as error:  # a worker thread has nobody else to tell
            self.note.value = f"{type(error).__name__}: {error}"
        finally:
            self.ask.disabled = False
            self.stop_button.disabled = True

    def _answer_both(self) -> None:
        """Stream both answers, compare the models along the tuned one, add all to the history. What
        was stopped before the tuned model was asked has no answer of it.
        """
        chosen = {name: control.value for name, control in self.controls.items()}
        settings = self.settings.replace(**chosen)
        self.note.value = "answering"
        rows = {name: self._row(name) for name in self.answers}
        for box in (*self.answers.values(), *self.costs.values(), self.positions):
            box.value = ""
        said = [self.prompt.value, f"  {chosen}"]
        for name, row in rows.items():
            self._answer(name, row, settings)
            said.append(f"  {name}: {self.answers[name].value}")
            if name == "tuned":
                self.positions.value = self._along(row, settings)
            if self.stopping.is_set():
                break
        self.note.value = "stopped" if self.stopping.is_set() else "done"
        self.history.value = "\n".join([*said, "", self.history.value])

    def _along(self, row: dict, settings) -> str:
        """A line for each token of the tuned model's answer: what both models would write there."""
        answer = self.answers["tuned"].value
        steps = generate.next_tokens_along(self.model, self.tokenizer, row, settings, answer)

        def best(top: list[tuple[str, float]]) -> str:
            return " ".join(f"{token!r} {share:.0%}" for token, share in top)

        lines = []
        for token, base, tuned, bits in steps:
            apart = f"{token!r} · {bits:.1f} bits apart"
            lines.append(f"{apart} · base: {best(base)} · tuned: {best(tuned)}")
        return "\n".join(lines)

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns = {"base": [], "tuned": []}

    def _row(self, name: str) -> dict:
        """What a model is asked: the prompt, or all that was said with it and then the prompt."""
        if not self.goes_on.value:
            return generate.row_of(self.prompt.value, self.settings.prompt_template)
        question = {"role": "user", "content": self.prompt.value}
        return generate.chat_row([*self.turns[name], question])

    def _answer(self, name: str, row: dict, settings) -> None:
        """Stream the answer of the "base" or the "tuned" model into its box, then what it cost."""
        box = self.answers[name]
        cost = self.costs[name]
        tuned = name == "tuned"
        for said in generate.stream(
            self.model, self.tokenizer, row, settings, tuned, self.stopping
        ):
            box.value = said.text
        question = {"role": "user", "content": self.prompt.value}
        self.turns[name] += [question, {"role": "assistant", "content": said.text}]
        cost.value = (
            f"{said.n_tokens} tokens, {said.tokens_per_s:.0f} tokens/s\n"
            f"first token after {1000 * said.first_token_s:.0f} ms\n"
            f"{said.left:.1f} tokens to choose from\n"
            f"{said.turned} choices turned by the penalty"
        )
