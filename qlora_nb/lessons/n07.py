"""Notebook 07: the figures and checkers of inference."""

from itertools import accumulate

from qlora_nb.ui.checks import verdict
from qlora_nb.ui.style import COLOURS, draws, look


@draws((8, 2.6), grid={"ncols": 2})
def speeds(axes, answers: dict[str, list]) -> None:
    """Time to the first token and tokens a second, for each answerer (label → list of
    `generation.Answer`).
    """
    shown = {
        "time to first token (ms)": lambda a: 1000 * a.first_token_s,
        "speed (tokens/s)": lambda a: a.tokens_per_s,
    }
    for ax, (label, pick) in zip(axes, shown.items()):
        for i, said in enumerate(answers.values()):
            middle = sorted(map(pick, said))[len(said) // 2]
            ax.barh(i, middle, **look("LoRA" if i % 2 else "other", ".." if i % 2 else ""))
            ax.text(middle, i, f" {middle:.0f}", va="center")
        ax.set(xlabel=label, yticks=range(len(answers)), yticklabels=list(answers))
        ax.margins(x=0.2)
    _heading(axes, f"Median over {len(next(iter(answers.values())))} prompts")


@draws((8, 2.8), grid={"ncols": 2, "sharex": True}, xlabel="probability (%)", xlim=(0, 100))
def next_tokens(
    axes, base: list[tuple[str, float]], tuned: list[tuple[str, float]], divergence: float
) -> None:
    """The most probable next tokens of both models, side by side, with the divergence between the
    distributions (bits).
    """
    for ax, rows, name, drawn in zip(
        axes, (base, tuned), ("base", "tuned"), (look("other", ""), look("LoRA"))
    ):
        ax.barh(range(len(rows)), [100 * p for _, p in rows], **drawn)
        ax.set(
            title=name,
            yticks=range(len(rows)),
            yticklabels=[repr(token)[1:-1] or "·" for token, _ in rows],
        )
        ax.invert_yaxis()
    _heading(axes, f"The two differ by {divergence:.2f} bits at this token")


def _heading(axes, text: str) -> None:
    axes[0].figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


@draws((8, 2.8), xlabel="token of the tuned answer", ylabel="divergence (bits)")
def along(ax, steps: list[tuple]) -> str:
    """Divergence at every position of an answer (`generation.along`), the token written there under
    its bar.
    """
    bits = [step[3] for step in steps]
    ax.bar(range(len(steps)), bits, **look("LoRA"))
    tokens, many = [repr(step[0])[1:-1] for step in steps], len(steps) > 12
    ax.set_xticks(range(len(steps)), tokens, parse_math=False, rotation=45 if many else 0)
    return (
        f"The models differ by {max(bits):.1f} bits at most, {sum(bits) / len(bits):.1f} on average"
    )


@draws((8, 2.8), "upper left", xlabel="tokens", ylabel="cache (KiB)")
def cache_growth(ax, predicted: dict[int, int], measured: dict[int, int]) -> str:
    """Bytes of the key-value cache by tokens: the ledger's line, and what the real cache's tensors
    hold.
    """
    ax.plot(
        list(predicted),
        [n / 1024 for n in predicted.values()],
        color=COLOURS["NF4+DQ"],
        label="predicted",
    )
    ax.plot(
        list(measured),
        [n / 1024 for n in measured.values()],
        "D",
        color=COLOURS["NF4"],
        label="measured",
    )
    ax.set(xlim=(0, None), ylim=(0, None))
    return f"Every token adds {max(measured.values()) / max(measured):,.0f} bytes"


def check_cache_bytes(stub, n_layers: int, hidden: int, bytes_per_value: int) -> bool:
    """KV cache of one token: a key and a value of `hidden` numbers in every layer."""
    want = 2 * n_layers * hidden * bytes_per_value
    hint = (
        "each layer keeps a key and a value"
        if stub == want // 2
        else "2 × layers × hidden × bytes of one number"
    )
    return verdict(stub, want, "cache bytes per token", hint)


def check_kept_by_top_p(stub, probabilities: list[float], top_p: float) -> bool:
    """How many tokens nucleus sampling keeps: the fewest, largest first, that reach `top_p`
    together.
    """
    sums = accumulate(sorted(probabilities, reverse=True))
    kept = 1 + sum(total < top_p for total in sums)
    hint = "add the largest probabilities until top_p is reached; the one that reaches it stays"
    return verdict(stub, kept, "tokens kept", hint)
