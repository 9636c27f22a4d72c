"""Notebook 07, inference: its figures and exercises.

- `next_tokens`: the most probable next tokens of the base and the tuned model;
- `along`: how far their distributions differ, token by token of an answer;
- `speeds`: time to the first token, and tokens a second;
- `cache_growth`: bytes of the key-value cache, predicted and measured;
- `check_cache_bytes`, `check_kept_by_top_p`: the exercises.
"""

import itertools
import statistics

import pandas

from qlora_nb.ui import checks, style


@style.draws((8, 2.8), grid={"ncols": 2, "sharex": True}, xlabel="probability (%)", xlim=(0, 100))
def next_tokens(axes, base: list[tuple], tuned: list[tuple], divergence: float) -> None:
    """The most probable next tokens of both models, side by side.

    Args:
        base: (token, probability), the most probable first.
        tuned: the same of the tuned model.
        divergence: of the two distributions (bits).
    """
    looks = {"base": style.look("other", hatch=""), "tuned": style.look("LoRA")}
    for ax, rows, (name, look) in zip(axes, (base, tuned), looks.items()):
        places = range(len(rows))
        tokens = [repr(token)[1:-1] or "·" for token, _ in rows]  # line breaks as \n
        percent = [100 * probability for _, probability in rows]
        ax.barh(places, percent, **look)
        ax.set(title=name, yticks=places, yticklabels=tokens)
        ax.invert_yaxis()
    heading = f"The two differ by {divergence:.2f} bits at this token"
    ax.figure.suptitle(heading, x=0.01, ha="left")


@style.draws((8, 2.8), xlabel="token of the tuned answer", ylabel="divergence (bits)")
def along(ax, steps: list[tuple]) -> str:
    """Divergence at every position of an answer, the token written there under its bar.

    Args:
        steps: (token, top tokens of base, top tokens of tuned, bits), from
            `generate.next_tokens_along`.
    """
    tokens = [repr(token)[1:-1] for token, *_ in steps]  # line breaks as \n
    bits = [step[-1] for step in steps]
    ax.bar(range(len(steps)), bits, **style.look("LoRA"))
    rotation = 45 if len(steps) > 12 else 0
    ax.set_xticks(range(len(steps)), tokens, parse_math=False, rotation=rotation)
    mean = statistics.fmean(bits)
    return f"The models differ by {max(bits):.1f} bits at most, {mean:.1f} on average"


@style.draws((8, 2.6), grid={"ncols": 2})
def speeds(axes, answers: dict[str, list]) -> None:
    """Time to the first token (ms) and tokens a second of each answerer, medians over the prompts.

    Args:
        answers: answerer → one `generate.Answer` for each prompt.
    """
    looks = itertools.cycle([style.look("other", hatch=""), style.look("LoRA")])
    for i, (said, look) in enumerate(zip(answers.values(), looks)):
        waits = [1000 * answer.first_token_s for answer in said]
        rates = [answer.tokens_per_s for answer in said]
        for ax, values in zip(axes, (waits, rates)):
            bars = ax.barh(i, statistics.median_high(values), **look)
            ax.bar_label(bars, fmt=" {:.0f}")
    for ax, label in zip(axes, ("time to first token (ms)", "speed (tokens/s)")):
        ax.set(xlabel=label, yticks=range(len(answers)), yticklabels=list(answers))
        ax.margins(x=0.2)
    ax.figure.suptitle(f"Median over {len(said)} prompts", x=0.01, ha="left")


@style.draws((8, 2.8), "upper left", xlabel="tokens", ylabel="cache (KiB)")
def cache_growth(ax, predicted: dict[int, int], measured: dict[int, int]) -> str:
    """Size of the key-value cache over the number of tokens in it.

    Args:
        predicted: tokens → bytes by the ledger.
        measured: tokens → bytes of the real cache's tensors.
    """
    ax.plot(pandas.Series(predicted) / 1024, color=style.SKY, label="predicted")
    ax.plot(pandas.Series(measured) / 1024, "D", color=style.BLUE, label="measured")
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
