"""Notebook 07, inference: its figures and exercises.

- `next_tokens`: the most probable next tokens of the base and the tuned model;
- `along`: how far their distributions differ, token by token of an answer;
- `sampled`: what temperature and top-p make of a distribution, and what is drawn from it;
- `strengths`: what an adapter wins and what it forgets, from switched off to half as strong again;
- `merge_ranks`: what three ways of merging change, at several ranks;
- `check_next_distribution`, `check_merge_dequantized`: the exercises.
"""

import statistics
from collections.abc import Sequence

import pandas
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from qlora_nb.lessons import n06
from qlora_nb.ui import style
from qlora_nb.ui.written import Written


@style.draws
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


@style.draws
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


@style.draws
def sampled(axes, shares: dict[str, dict[str, dict[str, float]]]) -> None:
    """The distribution of the next token under several settings, and beside it how often each token
    was drawn.

    Args:
        shares: heading → "probability" and "drawn" → {token: share (%)}.
    """
    looks = [style.look("LoRA"), style.look("other")]
    for ax, (heading, groups) in zip(axes, shares.items()):
        style.grouped_bars(ax, list(groups["drawn"]), groups, looks)
        ax.set_title(heading)
        ax.tick_params("x", rotation=60)
    axes[0].legend()


MEASURES = "questions right (%)", "facts known (%)", "story loss (nats)"
"""What an adapter wins, and two sides of what its base forgets."""


@style.draws
def strengths(
    axes, curves: dict[str, dict], heading: str, at: float | None = None, answers: Sequence = ()
) -> None:
    """What an adapter wins and what it forgets at several strengths.

    Args:
        curves: label → strength → each of `MEASURES` → its value, or `mean` and `high`: the mean
            over several trainings and the upper end of its interval, which is symmetric.
        heading: above the figure.
        at: a strength that is marked by a line.
        answers: what the model says at that strength.
    """
    for (label, curve), meaning in zip(curves.items(), ("LoRA", "other")):
        for ax, measure in zip(axes, MEASURES):
            found = pandas.DataFrame({float(k): curve[k][measure] for k in curve}, ["mean", "high"])
            half = found.loc["high"] - found.loc["mean"]
            ax.errorbar(found.columns, found.loc["mean"], half, label=label, **style.mark(meaning))
            ax.set_ylabel(measure)
    if at is not None:
        heading = f"{heading} {at:g}: {' · '.join(answers)}"
        for ax in axes:
            ax.axvline(at, color=style.GREY, linestyle="--")
    axes[1].legend(loc="lower left")
    axes[0].figure.suptitle(heading, x=0.01, ha="left")


WAYS = {"dequantized": "LoRA", "packed": "NF4+DQ", "original": "16-bit"}
"""Weights that an adapter is merged into → how they are drawn."""


@style.draws
def merge_ranks(axes, by_rank: dict[str, dict]) -> None:
    """What merging changes at several ranks, in three ways: the logits, beside the distance from
    the likeliest token's logit to the second's; the answers; the loss on held-out rows.

    Args:
        by_rank: rank → `gap` and `ways`, as `benchmarks/merge_ranks.py` records them.
    """
    ranks = [int(r) for r in by_rank]
    gaps = [found["gap"] for found in by_rank.values()]
    axes[0].plot(ranks, gaps, "--", color=style.GREY, label="first to second")
    labels = "mean difference (logits)", "answers that change (%)", "held-out loss (nats)"
    for ax, label in zip(axes, labels):
        for way, meaning in WAYS.items():
            values = [found["ways"][way][label] for found in by_rank.values()]
            ax.plot(ranks, values, label=way, **style.mark(meaning))
        ax.set_ylabel(label)
        style.log2_axis(ax, ranks)
    axes[0].set_yscale("log")
    axes[0].legend()
    heading = "Merged in three ways: what changes against the trained model"
    axes[0].figure.suptitle(heading, x=0.01, ha="left")


# ---- exercises -----------------------------------------------------------------------------------


def _by_transformers(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    return TopPLogitsWarper(top_p)(None, scores).softmax(dim=-1)[0]


def _crossing_left_out(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    probabilities = (logits / temperature).softmax(-1)
    ordered, places = probabilities.sort(descending=True)
    kept = torch.zeros_like(ordered)
    kept[places] = ordered * (ordered.cumsum(-1) <= top_p)
    return kept / kept.sum()


def _logits() -> list[tuple]:
    by_hand = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    drawn = 4 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    return [(by_hand, 1.0, 1.0), (by_hand, 1.0, 0.8), (drawn, 2.0, 0.9)]


check_next_distribution = Written(
    "next_distribution",
    _by_transformers,
    _logits,
    "transformers' TemperatureLogitsWarper and TopPLogitsWarper",
    "softmax of logits / temperature; keep the largest until they reach top_p together; each at "
    "its place in the vocabulary, divided by their sum",
    {"the token with which the sum reaches top_p stays too": _crossing_left_out},
)


def _layers() -> list[tuple]:
    by_hand = n06.adapted(torch.ones(2, 64), r=1, bias=False)
    drawn = n06.adapted(torch.randn(512, 128), r=8, bias=False)
    return [(by_hand,), (drawn,)]


def _by_peft(layer: torch.nn.Module) -> torch.Tensor:
    return dequantize_module_weight(layer.base_layer) + layer.get_delta_weight("default")


check_merge_dequantized = Written(
    "merge_dequantized",
    _by_peft,
    _layers,
    "PEFT's get_delta_weight on bitsandbytes' dequantized weight",
    "the dequantized W of shape (out, in), plus α/r times B A",
)
