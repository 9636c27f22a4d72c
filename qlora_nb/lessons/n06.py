"""Notebook 06: the figures and checkers of fine-tuning."""

import html
from collections.abc import Callable

from qlora_nb.ui.checks import verdict
from qlora_nb.ui.style import COLOURS, draws, look


@draws((8, 2.8), "upper left", xlabel="length of a row (tokens)", ylabel="rows")
def lengths(
    ax, n_tokens: list[int], max_length: int, peak_gib: Callable[[int], float] | None = None
) -> str:
    """Histogram of row lengths in tokens, prompt and answer together, under the peak that a batch
    of such length needs (GiB).
    """
    ax.hist(
        n_tokens,
        bins=min(40, max(n_tokens) - min(n_tokens) + 1),
        color=COLOURS["other"],
        edgecolor="white",
    )
    n_within = -(-19 * len(n_tokens) // 20)  # 95 % of the rows, rounded up
    longest = sorted(n_tokens)[n_within - 1]
    ax.axvline(
        longest,
        ymax=0.77,
        color=COLOURS["NF4"],
        ls="--",
        label=f"95 % of rows are no longer than {longest}",
    )
    end = 1.05 * min(max_length, max(n_tokens))
    if peak_gib:
        peaks, at = ax.twinx(), [round(end * i / 6) for i in range(1, 7)]
        found = [peak_gib(tokens) for tokens in at]
        peaks.plot(
            at, found, "D-", color=COLOURS["FP4"], label="predicted peak (right)", clip_on=False
        )
        peaks.set(ylabel="peak (GiB)", ylim=(0, 1.3 * max(found)))  # as below: room for the legends
        peaks.grid(visible=False)
        peaks.legend(loc="upper right")
    ax.set(xlim=(0, end), ylim=(0, 1.3 * ax.get_ylim()[1]))
    return f"Rows have {sum(n_tokens) / len(n_tokens):.0f} tokens on average; max_length allows {max_length}"


@draws((8, 3.6), ylabel="exact match (%)", ylim=(0, 105))
def scores(ax, results: dict[str, dict[str, float]]) -> str:
    """Exact match by kind of question for several answerers (label → {kind: share}), "all" first.

    A kind that an answerer has no share for has no bar; an answerer without any is left out.
    """
    results = {label: result for label, result in results.items() if result}
    kinds = ["all"] if any("all" in result for result in results.values()) else []
    for result in results.values():
        kinds += [kind for kind in result if kind not in kinds]
    looks = [look("other", ""), look("INT4"), look("16-bit", ".."), look("LoRA", "")]
    width = 0.8 / len(results)
    for i, (label, result) in enumerate(results.items()):
        x = [kinds.index(kind) + (i - (len(results) - 1) / 2) * width for kind in result]
        ax.bar(
            x,
            [100 * share for share in result.values()],
            width,
            **looks[i % len(looks)],
            label=label,
        )
    ax.set_xticks(range(len(kinds)), kinds)
    ax.figure.legend(loc="outside lower center", ncols=len(results))
    if "all" not in result:
        return f"{label}: not every kind of question was seen in training"
    return f"{label}: {100 * result['all']:.0f} % of held-out answers exactly right"


def label_mask(tokens: list[str], trains: list[bool]) -> str:
    """HTML that shows a row's tokens, those that train both coloured and underlined; all text is
    escaped.
    """
    looks = {True: "background:#009E7333;border-bottom:2px solid #009E73", False: "opacity:.65"}
    cell = "<span style='{};white-space:pre-wrap'>{}</span>".format
    cells = [
        cell(looks[on], html.escape(token).replace("\n", "⏎<br>"))
        for token, on in zip(tokens, trains, strict=True)
    ]
    note = f"<p>underlined and green: the {sum(trains)} tokens that train, of {len(tokens)}</p>"
    return f"<div style='font-family:monospace;line-height:1.7;max-width:60em'>{''.join(cells)}</div>{note}"


def check_rows_in_a_step(stub, settings) -> bool:
    """Rows in one optimizer step: batch size times accumulation."""
    want = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return verdict(
        stub, want, "rows in a step", "rows in a forward pass, times forward passes in a step"
    )


def check_bytes_per_trained_number(stub) -> bool:
    """Weight, gradient and two Adam states in float32: 16 bytes."""
    hint = (
        "Adam keeps two states for each number"
        if stub == 12
        else "weight, gradient and two states, four bytes each"
    )
    return verdict(stub, 16, "bytes per trained number", hint)


def check_labels(stub, ids: list[int], n_prompt: int) -> bool:
    """Prompt masked with -100, answer and end token labelled."""
    want = [-100] * n_prompt + ids[n_prompt:]
    hint = "the prompt must not train"
    if isinstance(stub, list) and len(stub) == len(ids) and stub[-1] == -100:
        hint = "the end token must train, or the model never stops"
    return verdict(stub, want, "labels", hint)
