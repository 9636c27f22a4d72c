"""Notebook 07, inference: its figures and exercises.

- `next_tokens`: the most probable next tokens of the base and the tuned model;
- `along`: how far their distributions differ, token by token of an answer;
- `speeds`: time to the first token, and tokens a second;
- `cache_growth`: bytes of the key-value cache, predicted and measured;
- `check_cache_bytes`, `check_kept_by_top_p`: the exercises.
"""

import statistics

from qlora_nb.ui import checks, style


@style.draws((8, 2.8), grid={"ncols": 2, "sharex": True}, xlabel="probability (%)", xlim=(0, 100))
def next_tokens(axes, base: list[tuple], tuned: list[tuple], divergence: float) -> None:
    """The most probable next tokens of both models, side by side.

    Args:
        base: (token, probability), the most probable first.
        tuned: the same of the tuned model.
        divergence: of the two distributions (bits).
    """
    left, right = axes
    _bars_of_tokens(left, "base", base, style.look("other", ""))
    _bars_of_tokens(right, "tuned", tuned, style.look("LoRA"))
    _heading(axes, f"The two differ by {divergence:.2f} bits at this token")


def _bars_of_tokens(ax, name: str, rows: list[tuple], look: dict) -> None:
    places = range(len(rows))
    tokens = [_visible(token) or "·" for token, _ in rows]
    percent = [100 * probability for _, probability in rows]
    ax.barh(places, percent, **look)
    ax.set(title=name, yticks=places, yticklabels=tokens)
    ax.invert_yaxis()


def _visible(token: str) -> str:
    """A token with its line breaks as \\n."""
    return repr(token)[1:-1]


def _heading(axes, text: str) -> None:
    axes[0].figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")


@style.draws((8, 2.8), xlabel="token of the tuned answer", ylabel="divergence (bits)")
def along(ax, steps: list[tuple]) -> str:
    """Divergence at every position of an answer, the token written there under its bar.

    Args:
        steps: (token, top tokens of base, top tokens of tuned, bits), from
            `generate.next_tokens_along`.
    """
    tokens = [_visible(token) for token, *_ in steps]
    bits = [step[-1] for step in steps]
    ax.bar(range(len(steps)), bits, **style.look("LoRA"))
    rotation = 45 if len(steps) > 12 else 0
    ax.set_xticks(range(len(steps)), tokens, parse_math=False, rotation=rotation)
    mean = sum(bits) / len(bits)
    return f"The models differ by {max(bits):.1f} bits at most, {mean:.1f} on average"


@style.draws((8, 2.6), grid={"ncols": 2})
def speeds(axes, answers: dict[str, list]) -> None:
    """Time to the first token (ms) and tokens a second of each answerer, medians over the prompts.

    Args:
        answers: answerer → one `generate.Answer` for each prompt.
    """
    left, right = axes
    for i, said in enumerate(answers.values()):
        waits = [1000 * answer.first_token_s for answer in said]
        rates = [answer.tokens_per_s for answer in said]
        look = style.look("LoRA") if i % 2 else style.look("other", "")
        for ax, values in ((left, waits), (right, rates)):
            median = statistics.median_high(values)
            ax.barh(i, median, **look)
            ax.text(median, i, f" {median:.0f}", va="center")
    for ax, label in ((left, "time to first token (ms)"), (right, "speed (tokens/s)")):
        ax.set(xlabel=label, yticks=range(len(answers)), yticklabels=list(answers))
        ax.margins(x=0.2)
    _heading(axes, f"Median over {len(said)} prompts")


@style.draws((8, 2.8), "upper left", xlabel="tokens", ylabel="cache (KiB)")
def cache_growth(ax, predicted: dict[int, int], measured: dict[int, int]) -> str:
    """Size of the key-value cache over the number of tokens in it.

    Args:
        predicted: tokens → bytes by the ledger.
        measured: tokens → bytes of the real cache's tensors.
    """
    kib = [size / 1024 for size in predicted.values()]
    ax.plot(list(predicted), kib, color=style.SKY, label="predicted")
    kib = [size / 1024 for size in measured.values()]
    ax.plot(list(measured), kib, "D", color=style.BLUE, label="measured")
    ax.set(xlim=(0, None), ylim=(0, None))
    longest = max(measured)
    return f"Every token adds {measured[longest] / longest:,.0f} bytes"


def check_cache_bytes(stub, n_layers: int, hidden: int, bytes_per_value: int) -> bool:
    """Bytes of one token in the cache: a key and a value of `hidden` numbers in every layer."""
    want = 2 * n_layers * hidden * bytes_per_value
    hint = "2 × layers × hidden × bytes of one number"
    if stub == want // 2:
        hint = "each layer keeps a key and a value"
    return checks.verdict(stub, want, "cache bytes per token", hint)


def check_kept_by_top_p(stub, probabilities: list[float], top_p: float) -> bool:
    """How many tokens nucleus sampling keeps: the fewest, largest first, that reach `top_p`
    together.
    """
    kept = 0
    together = 0.0
    for probability in sorted(probabilities, reverse=True):
        if together < top_p:
            kept += 1
            together += probability
    hint = "add the largest probabilities until top_p is reached; the one that reaches it stays"
    return checks.verdict(stub, kept, "tokens kept", hint)
