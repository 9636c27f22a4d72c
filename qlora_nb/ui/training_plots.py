"""Figures of notebooks 01, 06 and 07: the budget, what trains, the loss, the score, next tokens."""

import html
from collections.abc import Callable

from qlora_nb.engine import budget as memory
from qlora_nb.engine import ledger
from qlora_nb.ui.style import COLOURS, draws, look, stacked_bars

_PARTS = {
    "4-bit weights": (look("NF4"), (ledger.CODES,)),
    "scales": (look("NF4+DQ"), (ledger.SCALES, ledger.NESTED, ledger.TABLES)),
    "unquantized rest": (look("16-bit"), (ledger.LINEARS, ledger.EMBEDDINGS, ledger.SMALL, ledger.BUFFERS)),
    "LoRA weights": (look("LoRA", ""), (ledger.LORA,)),
    "gradients": (look("LoRA"), (ledger.GRADIENTS,)),
    "optimizer states": (look("optimizer"), (ledger.STATES,)),
    "kept for the backward pass": (look("INT4"), (memory.KEPT,)),
    "working memory": (look("FP4"), (memory.WORK,)),
    "key-value cache": (look("NF4+DQ", "//"), (memory.CACHE,)),
    "CUDA itself (assumed)": (look("other"), (memory.CUDA,)),
}


@draws()
def budget(ax, ledgers: dict[str, ledger.Ledger], limit_gib: float | None = None) -> str:
    """Stacked bars of what lies in memory, one bar a ledger, under a card's line if there is one.

    Args:
        ledgers: label → ledger; the largest one is in the title.
        limit_gib: a card's size.
    """
    largest = max(ledgers, key=lambda name: ledgers[name].total_bytes)
    top = ledgers[largest].total_bytes
    scale, unit = (ledger.GIB, "GiB") if top > 0.5 * ledger.GIB else (2**20, "MiB")
    ax.figure.set_size_inches(8.4, 1.9 + 0.45 * len(ledgers))
    rows = {row: {part: found.sum(names) for part, (_, names) in _PARTS.items()} for row, found in ledgers.items()}
    there = {part: drawn for part, (drawn, _) in _PARTS.items() if any(parts[part] for parts in rows.values())}
    stacked_bars(ax, rows, there, scale, text=lambda end: f" {end:.2f}")
    if limit_gib is not None:
        ax.axvline(limit_gib * ledger.GIB / scale, color="black", linestyle="--", label=f"card of {limit_gib:g} GiB")
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel(f"memory at the fullest moment ({unit})")
    ax.figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    if limit_gib is None:
        part, size = max(rows[largest].items(), key=lambda item: item[1])
        return f"The largest part: {part}, {100 * size / top:.0f} % of {top / scale:.2f} {unit}"
    over = [name for name, found in ledgers.items() if found.total_bytes > limit_gib * ledger.GIB]
    return f"Over {limit_gib:g} GiB: {', '.join(over)}" if over else f"All fit {limit_gib:g} GiB"


@draws((8, 2.8), "upper left", xlabel="length of a row (tokens)", ylabel="rows")
def lengths(ax, n_tokens: list[int], max_length: int, peak_gib: Callable[[int], float] | None = None) -> str:
    """Histogram of row lengths in tokens, prompt and answer together, under the peak that a batch of such length needs (GiB)."""
    ax.hist(n_tokens, bins=min(40, max(n_tokens) - min(n_tokens) + 1), color=COLOURS["other"], edgecolor="white")
    longest = sorted(n_tokens)[int(0.95 * (len(n_tokens) - 1))]
    ax.axvline(longest, ymax=0.77, color=COLOURS["NF4"], ls="--", label=f"95 % of rows are no longer than {longest}")
    end = 1.05 * min(max_length, max(n_tokens))
    if peak_gib:
        peaks, at = ax.twinx(), [round(end * i / 6) for i in range(1, 7)]
        found = [peak_gib(tokens) for tokens in at]
        peaks.plot(at, found, "D-", color=COLOURS["FP4"], label="predicted peak (right)", clip_on=False)
        peaks.set(ylabel="peak (GiB)", ylim=(0, 1.3 * max(found)))  # as below: room for the legends
        peaks.grid(visible=False)
        peaks.legend(loc="upper right")
    ax.set(xlim=(0, end), ylim=(0, 1.3 * ax.get_ylim()[1]))
    return f"Rows have {sum(n_tokens) / len(n_tokens):.0f} tokens on average; max_length allows {max_length}"


@draws((8, 3.2), "best", xlabel="optimizer step", ylabel="loss (nats per answer token)")
def loss_curve(ax, losses: list[float], before=None, after=None, held_out: dict[int, float] | None = None) -> str:
    """Training loss a step with its running mean, and the held-out loss before, at the steps of `held_out`, and after."""
    steps = range(1, len(losses) + 1)
    ax.plot(steps, losses, color=COLOURS["other"], linewidth=0.8, label="training loss of each step")
    window = max(1, len(losses) // 10)
    mean = [sum(losses[max(0, i - window) : i]) / len(losses[max(0, i - window) : i]) for i in steps]
    ax.plot(steps, mean, color=COLOURS["LoRA"], linewidth=2.2, label=f"mean of the last {window} steps")
    finding = f"Training loss after {len(losses)} steps: {mean[-1] if mean else float('nan'):.2f} nats"
    if before is not None and after is not None:
        seen = {0: before, **(held_out or {}), len(losses) + 1: after}
        ax.plot(list(seen), list(seen.values()), "D", color=COLOURS["NF4"], markersize=7, label="held-out rows", clip_on=False)
        finding = f"Held-out loss goes from {before:.2f} to {after:.2f} nats"
    ax.set_ylim(bottom=0)
    return finding


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
        ax.bar(x, [100 * share for share in result.values()], width, **looks[i % len(looks)], label=label)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.figure.legend(loc="outside lower center", ncols=len(results))
    if "all" not in result:
        return f"{label}: not every kind of question was seen in training"
    return f"{label}: {100 * result['all']:.0f} % of held-out answers exactly right"


def label_mask(tokens: list[str], trains: list[bool]) -> str:
    """HTML that shows a row's tokens, those that train both coloured and underlined; all text is escaped."""
    looks = {True: "background:#009E7333;border-bottom:2px solid #009E73", False: "opacity:.65"}
    cell = "<span style='{};white-space:pre-wrap'>{}</span>".format
    cells = [cell(looks[on], html.escape(token).replace("\n", "⏎<br>")) for token, on in zip(tokens, trains, strict=True)]
    note = f"<p>underlined and green: the {sum(trains)} tokens that train, of {len(tokens)}</p>"
    return f"<div style='font-family:monospace;line-height:1.7;max-width:60em'>{''.join(cells)}</div>{note}"


@draws((8, 2.6), grid={"ncols": 2})
def speeds(axes, answers: dict[str, list]) -> None:
    """Time to the first token and tokens a second, for each answerer (label → list of `generation.Answer`)."""
    shown = {"time to first token (ms)": lambda a: 1000 * a.first_token_s, "speed (tokens/s)": lambda a: a.tokens_per_s}
    for ax, (label, pick) in zip(axes, shown.items()):
        for i, said in enumerate(answers.values()):
            middle = sorted(map(pick, said))[len(said) // 2]
            ax.barh(i, middle, **look("LoRA" if i % 2 else "other", ".." if i % 2 else ""))
            ax.text(middle, i, f" {middle:.0f}", va="center")
        ax.set(xlabel=label, yticks=range(len(answers)), yticklabels=list(answers))
        ax.margins(x=0.2)
    _heading(axes, f"Median over {len(next(iter(answers.values())))} prompts")


@draws((8, 2.8), grid={"ncols": 2, "sharex": True}, xlabel="probability (%)", xlim=(0, 100))
def next_tokens(axes, base: list[tuple[str, float]], tuned: list[tuple[str, float]], divergence: float) -> None:
    """The most probable next tokens of both models, side by side, with the divergence between the distributions (bits)."""
    for ax, rows, name, drawn in zip(axes, (base, tuned), ("base", "tuned"), (look("other", ""), look("LoRA"))):
        ax.barh(range(len(rows)), [100 * p for _, p in rows], **drawn)
        ax.set(title=name, yticks=range(len(rows)), yticklabels=[repr(token)[1:-1] or "·" for token, _ in rows])
        ax.invert_yaxis()
    _heading(axes, f"The two differ by {divergence:.2f} bits at this token")


def _heading(axes, text: str) -> None:
    axes[0].figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


@draws((8, 2.8), xlabel="token of the tuned answer", ylabel="divergence (bits)")
def along(ax, steps: list[tuple]) -> str:
    """Divergence at every position of an answer (`generation.along`), the token written there under its bar."""
    bits = [step[3] for step in steps]
    ax.bar(range(len(steps)), bits, **look("LoRA"))
    tokens, many = [repr(step[0])[1:-1] for step in steps], len(steps) > 12
    ax.set_xticks(range(len(steps)), tokens, parse_math=False, rotation=45 if many else 0)
    return f"The models differ by {max(bits):.1f} bits at most, {sum(bits) / len(bits):.1f} on average"


@draws((8, 2.8), "upper left", xlabel="tokens", ylabel="cache (KiB)")
def cache_growth(ax, predicted: dict[int, int], measured: dict[int, int]) -> str:
    """Bytes of the key-value cache by tokens: the ledger's line, and what the real cache's tensors hold."""
    ax.plot(list(predicted), [n / 1024 for n in predicted.values()], color=COLOURS["NF4+DQ"], label="predicted")
    ax.plot(list(measured), [n / 1024 for n in measured.values()], "D", color=COLOURS["NF4"], label="measured")
    ax.set(xlim=(0, None), ylim=(0, None))
    return f"Every token adds {max(measured.values()) / max(measured):,.0f} bytes"
