"""Notebook 06, fine-tuning: its figures and exercises.

- `label_mask`: a row of the data as HTML, the tokens that train marked;
- `lengths`: histogram of the rows' lengths, under the predicted peak of a batch of such length;
- `scores`: exact match by kind of question, of the baselines, the base and the tuned model;
- `check_rows_in_a_step`, `check_bytes_per_trained_number`, `check_labels`: the exercises.
"""

import html
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
from IPython.display import HTML
from pandas.io.formats.style import Styler

from qlora_nb.ui import checks, style

STYLES = {
    True: f"background:{style.GREEN}33;border-bottom:2px solid {style.GREEN};white-space:pre-wrap",
    False: "opacity:.65;white-space:pre-wrap",
}
"""CSS of a token: does it train?"""


def label_mask(tokens: list[str], trains: list[bool]) -> str:
    """A row's tokens as HTML, those that train both coloured and underlined; text is escaped."""
    cells = []
    for token, train in zip(tokens, trains, strict=True):
        text = html.escape(token).replace("\n", "⏎<br>")
        cells.append(f"<span style='{STYLES[train]}'>{text}</span>")
    return (
        "<div style='font-family:monospace;line-height:1.7;max-width:60em'>"
        f"{''.join(cells)}</div>"
        f"<p>underlined and green: the {sum(trains)} tokens that train, of {len(tokens)}</p>"
    )


@style.draws((8, 2.8), "upper left", xlabel="length of a row (tokens)", ylabel="rows")
def lengths(ax, n_tokens: list[int], max_length: int, peak_gib: Callable[[int], float]) -> str:
    """Histogram of row lengths, and the length that 95 % of the rows do not exceed.

    Args:
        n_tokens: tokens of each row, prompt and answer together.
        max_length: tokens that are kept of a row.
        peak_gib: tokens of a row → predicted peak (GiB), drawn on an axis on the right.
    """
    n_bins = min(40, max(n_tokens) - min(n_tokens) + 1)
    ax.hist(n_tokens, bins=n_bins, color=style.GREY, edgecolor="white")
    longest = np.quantile(n_tokens, 0.95, method="inverted_cdf")
    label = f"95 % of rows are no longer than {longest}"
    ax.axvline(longest, ymax=0.77, color=style.BLUE, linestyle="--", label=label)
    end = 1.05 * min(max_length, max(n_tokens))
    at = [round(end * i / 6) for i in range(1, 7)]
    found = [peak_gib(tokens) for tokens in at]
    peaks = ax.twinx()
    line = {"color": style.VERMILION, "clip_on": False}
    peaks.plot(at, found, "D-", label="predicted peak (right)", **line)
    peaks.set(ylabel="peak (GiB)", ylim=(0, 1.3 * max(found)))
    peaks.grid(visible=False)
    peaks.legend(loc="upper right")
    highest = ax.get_ylim()[1]
    ax.set(xlim=(0, end), ylim=(0, 1.3 * highest))  # room for the legends
    return f"Rows have {np.mean(n_tokens):.0f} tokens on average; max_length allows {max_length}"


@style.draws((8, 3.6), ylabel="exact match (%)", ylim=(0, 105))
def scores(ax, results: dict[str, dict[str, float]]) -> str:
    """Exact match by kind of question for up to four answerers, "all" kinds together first.

    Args:
        results: answerer → {kind: share in [0, 1]}. A kind without a share has no bar, an answerer
            without any is left out.

    Returns:
        The finding about the last answerer.
    """
    percent = {}
    for label, shares in results.items():
        if shares:
            percent[label] = {kind: 100 * share for kind, share in shares.items()}
            last = label
    kinds = dict.fromkeys(itertools.chain(*percent.values()))
    kinds = sorted(kinds, key=lambda kind: kind != "all")  # the others stay in their order
    looks = [
        style.look("other", hatch=""),
        style.look("INT4"),
        style.look("16-bit", hatch=".."),
        style.look("LoRA", hatch=""),
    ]
    style.grouped_bars(ax, kinds, percent, looks)
    ax.figure.legend(loc="outside lower center", ncols=len(percent))
    if "all" not in percent[last]:
        return f"{last}: not every kind of question was seen in training"
    return f"{last}: {percent[last]['all']:.0f} % of held-out answers exactly right"


def check_rows_in_a_step(stub, settings) -> bool:
    """Rows in one optimizer step: batch size times accumulation."""
    hint = "rows in a forward pass, times forward passes in a step"
    return checks.verdict(stub, settings.rows_in_a_step, "rows in a step", hint)


def check_bytes_per_trained_number(stub) -> bool:
    """Weight, gradient and two Adam states in float32: 16 bytes."""
    hint = "weight, gradient and two states, four bytes each"
    if stub == 12:
        hint = "Adam keeps two states for each number"
    return checks.verdict(stub, 16, "bytes per trained number", hint)


def check_labels(stub, ids: list[int], n_prompt: int) -> bool:
    """The prompt's tokens masked with -100, answer and end token labelled."""
    want = [-100] * n_prompt + ids[n_prompt:]
    hint = "the prompt must not train"
    if isinstance(stub, list) and stub[-1:] == [-100]:
        hint = "the end token must train, or the model never stops"
    return checks.verdict(stub, want, "labels", hint)


def answers(prompts: list[str], **said: list[str]) -> Styler:
    """A table of prompts and what was said to them, one column for each keyword; text is
    escaped.
    """
    table = pandas.DataFrame({"prompt": prompts, **said})
    look = {"text-align": "left", "white-space": "pre-wrap", "vertical-align": "top"}
    return table.style.format(escape="html").hide(axis="index").set_properties(**look)


def folded(path: Path) -> HTML:
    """A program's text behind a line that unfolds it."""
    text = html.escape(path.read_text(encoding="utf-8"))
    return HTML(f"<details><summary>{html.escape(path.name)}</summary><pre>{text}</pre></details>")
