"""Figures that several notebooks and panels share: memory line by line, and the loss of a run."""

from qlora_nb import cards
from qlora_nb.memory import budget, ledger
from qlora_nb.ui.style import COLOURS, draws, look, stacked_bars

PARTS = {
    "4-bit weights": (look("NF4"), (ledger.CODES,)),
    "scales": (look("NF4+DQ"), (ledger.SCALES, ledger.NESTED, ledger.TABLES)),
    "unquantized rest": (
        look("16-bit"),
        (ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL, ledger.BUFFERS),
    ),
    "LoRA weights": (look("LoRA", ""), (ledger.LORA,)),
    "gradients": (look("LoRA"), (ledger.GRADIENTS,)),
    "optimizer states": (look("optimizer"), (ledger.STATES,)),
    "kept for the backward pass": (look("INT4"), (budget.KEPT,)),
    "working memory": (look("FP4"), (budget.WORK,)),
    "key-value cache": (look("NF4+DQ", "//"), (budget.CACHE,)),
    "CUDA itself (assumed)": (look("other"), (budget.CUDA,)),
}


@draws()
def memory_bars(ax, ledgers: dict[str, ledger.Ledger], limit_gib: float | None = None) -> str:
    """Stacked bars of what lies in memory, one bar a ledger, under a card's line if there is one.

    Args:
        ledgers: label → ledger; the largest one is in the title.
        limit_gib: a card's size.
    """
    largest = max(ledgers, key=lambda name: ledgers[name].total_bytes)
    top = ledgers[largest].total_bytes
    scale, unit = (cards.GIB, "GiB") if top > 0.5 * cards.GIB else (2**20, "MiB")
    ax.figure.set_size_inches(8.4, 1.9 + 0.45 * len(ledgers))
    rows = {
        row: {part: found.sum(names) for part, (_, names) in PARTS.items()}
        for row, found in ledgers.items()
    }
    there = {
        part: drawn
        for part, (drawn, _) in PARTS.items()
        if any(parts[part] for parts in rows.values())
    }
    stacked_bars(ax, rows, there, scale, text=lambda end: f" {end:.2f}")
    if limit_gib is not None:
        ax.axvline(
            limit_gib * cards.GIB / scale,
            color="black",
            linestyle="--",
            label=f"card of {limit_gib:g} GiB",
        )
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(f"memory at the fullest moment ({unit})")
    ax.figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    if limit_gib is None:
        part, size = max(rows[largest].items(), key=lambda item: item[1])
        return f"The largest part: {part}, {100 * size / top:.0f} % of {top / scale:.2f} {unit}"
    over = [name for name, found in ledgers.items() if found.total_bytes > limit_gib * cards.GIB]
    return f"Over {limit_gib:g} GiB: {', '.join(over)}" if over else f"All fit {limit_gib:g} GiB"


@draws((8, 3.2), "best", xlabel="optimizer step", ylabel="loss (nats per answer token)")
def loss_curve(
    ax, losses: list[float], before=None, after=None, held_out: dict[int, float] | None = None
) -> str:
    """Training loss a step with its running mean, and the held-out loss before, at the steps of
    `held_out`, and after.
    """
    steps = range(1, len(losses) + 1)
    ax.plot(
        steps, losses, color=COLOURS["other"], linewidth=0.8, label="training loss of each step"
    )
    window = max(1, len(losses) // 10)
    mean = [
        sum(losses[max(0, i - window) : i]) / len(losses[max(0, i - window) : i]) for i in steps
    ]
    ax.plot(
        steps, mean, color=COLOURS["LoRA"], linewidth=2.2, label=f"mean of the last {window} steps"
    )
    finding = (
        f"Training loss after {len(losses)} steps: {mean[-1] if mean else float('nan'):.2f} nats"
    )
    if before is not None and after is not None:
        seen = {0: before, **(held_out or {}), len(losses) + 1: after}
        ax.plot(
            list(seen),
            list(seen.values()),
            "D",
            color=COLOURS["NF4"],
            markersize=7,
            label="held-out rows",
            clip_on=False,
        )
        finding = f"Held-out loss goes from {before:.2f} to {after:.2f} nats"
    ax.set_ylim(bottom=0)
    return finding
