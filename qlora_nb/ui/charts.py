"""Two figures that several notebooks and panels share: memory part by part, and the loss of a run.

`memory_bars` sums the lines of a ledger (`memory.ledger`, `memory.budget`) into eleven parts, drawn
as in all notebooks (`style.LOOKS`); `loss_curve` shows training loss with a running mean, and
held-out loss where it was measured.
"""

from collections.abc import Mapping

import pandas

from qlora_nb import cards
from qlora_nb.memory import ledger
from qlora_nb.ui import style

PAGED = "paged optimizer states"

PARTS = style.TABLES["parts"]
"""Part of a bar, named as in `style.LOOKS` → the ledger's lines in it, in the order of drawing."""


@style.draws
def memory_bars(
    ax,
    ledgers: dict[str, ledger.Ledger],
    limit_gib: float | None = None,
    what: str = "peak memory",
) -> str:
    """Memory as stacked bars, beside the size of a card if there is one.

    Args:
        ledgers: label of the bar → ledger. MiB are drawn if the largest is at most half a GiB.
        limit_gib: memory of the card (GiB).
        what: the bars show.

    Returns:
        What does not fit the card; without a card, the largest part of the largest bar.
    """
    rows = {}
    for label, found in ledgers.items():
        rows[label] = {part: found.sum(lines) for part, lines in PARTS.items()}
    looks = {part: style.look(part) for part in PARTS}
    largest = max(ledgers, key=lambda label: ledgers[label].total_bytes)
    total = ledgers[largest].total_bytes
    unit, unit_name = style.unit_of(total)
    ax.figure.set_size_inches(8.4, 1.9 + 0.45 * len(ledgers))
    style.stacked_bars(ax, rows, looks, " {:.2f}".format, unit)
    ax.set_xlabel(f"{what} ({unit_name})")
    if limit_gib is not None:
        card = limit_gib * cards.GIB
        ax.axvline(card / unit, linestyle="--", label=f"card of {limit_gib:g} GiB")
        ax.set_xlim(right=1.12 * max(card, total) / unit)
    ax.figure.legend(loc="outside lower center", ncols=4, fontsize=9)

    if limit_gib is None:
        part = max(PARTS, key=rows[largest].get)
        percent = 100 * rows[largest][part] / total
        return f"The largest part: {part}, {percent:.0f} % of {total / unit:.2f} {unit_name}"
    over = [label for label, found in ledgers.items() if found.total_bytes > card]
    if over:
        return f"Over {limit_gib:g} GiB: {', '.join(over)}"
    return f"All fit {limit_gib:g} GiB"


@style.draws
def loss_curve(
    ax,
    losses: list[float],
    before: float | None = None,
    after: float | None = None,
    held_out: Mapping[int, float] = {},
    max_steps: int = 0,
) -> str:
    """Training loss of each step (nats per answer token) and its mean over a tenth of the steps.

    Args:
        losses: one a step.
        before: held-out loss before training.
        after: held-out loss after it; drawn with `before`, or neither.
        held_out: optimizer step → held-out loss while training, perhaps of some of the rows only.
        max_steps: of the whole run, where the axis ends from the first step on.
    """
    steps = range(1, len(losses) + 1)
    window = max(1, len(losses) // 10)
    means = pandas.Series(losses, dtype=float).rolling(window, min_periods=1).mean()
    thin = {"color": style.GREY, "linewidth": 0.8, "marker": ".", "markersize": 3}
    ax.plot(steps, losses, label="training loss of each step", **thin)
    label = f"mean of the last {window} steps"
    ax.plot(steps, means, color=style.GREEN, linewidth=2.2, label=label)
    last = means.tail(1).mean()  # nan before the first step
    finding = f"Training loss after {len(losses)} steps: {last:.2f} nats"
    if before is not None and after is not None:
        points = {"color": style.BLUE, "markersize": 7, "clip_on": False, "linestyle": "none"}
        ends = (0, len(losses) + 1)
        ax.plot(ends, (before, after), marker="D", label="held-out rows", **points)
        finding = f"Held-out loss goes from {before:.2f} to {after:.2f} nats"
        if held_out:
            label = "held-out rows, while training"
            open_marks = {"marker": "D", "fillstyle": "none", "label": label, **points}
            ax.plot(list(held_out), list(held_out.values()), **open_marks)
            lowest = min(held_out, key=held_out.get)
            if lowest < max(held_out) and held_out[lowest] < after:
                finding += f"; it was lowest at step {lowest}"
    ax.set_ylim(bottom=0)
    ax.set_xlim(0, max(max_steps, len(losses)) + 1)
    return finding
