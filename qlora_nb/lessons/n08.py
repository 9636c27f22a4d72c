"""Notebook 08, optimizers: its figures and exercise.

- `estimates`: Sophia's estimate of the curvature beside the exact one;
- `clipped`: the share of the numbers that a step clips;
- `rates`: held-out loss over the learning rate;
- `race`: held-out loss against steps, seconds and bytes of state;
- `check_sophia_update`, `check_state_bytes`: the exercises.
"""

from collections.abc import Mapping

import torch

from qlora_nb.theory import sophia
from qlora_nb.ui import style
from qlora_nb.ui.checks import exercise
from qlora_nb.ui.written import Written


@style.draws
def estimates(axes, exact: torch.Tensor, drawn: Mapping[int, torch.Tensor]) -> None:
    """The estimated curvature of every weight over the exact one, for the mean of one draw and of
    many.

    Args:
        exact: second derivatives, one for each weight.
        drawn: number of draws → the mean of their estimates, in the same order.
    """
    for ax, (n, estimate) in zip(axes, drawn.items()):
        off = 100 * (estimate / exact - 1).abs().median()
        draws = "draw" if n == 1 else "draws"
        ax.plot(exact, exact, color=style.GREY)
        ax.plot(exact, estimate, linestyle="", **style.mark("Sophia-G"))
        ax.set_title(f"{n:,} {draws}: off by {off:.0f} %")
    axes[0].set_ylabel("estimate")


@style.draws
def clipped(ax, shares: Mapping[float, list[float]]) -> None:
    """Share of the numbers that are clipped in each step.

    Args:
        shares: ρ → share in each step (0 to 1).
    """
    for style_of_line, (rho, of_step) in zip(("-", "--", ":"), shares.items()):
        percent = [100 * share for share in of_step]
        steps = range(1, len(percent) + 1)
        look = {"color": style.COLOURS["Sophia-G"], "linestyle": style_of_line}
        ax.plot(steps, percent, label=f"ρ = {rho:g}", **look)


def _loss_axis(ax) -> None:
    """A logarithmic axis of losses with numbers that can be read."""
    ax.set_yscale("log")
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    ax.minorticks_off()
    ax.set_ylabel("held-out loss (nats)")


@style.draws
def rates(ax, groups: Mapping[str, Mapping[float, float | None]]) -> str:
    """Held-out loss after a run over its learning rate, both axes logarithmic.

    Args:
        groups: label → {learning rate: loss (nats), None or NaN where the run diverged}. A label of
            `style.LOOKS` is drawn as there.
    """
    others = iter(("LoRA", "NF4+DQ", "NF4", "INT4", "FP4", "16-bit"))  # six that stay apart
    best = {}
    for label, losses in groups.items():
        values = {rate: loss for rate, loss in losses.items() if loss is not None}
        meaning = label if label in style.LOOKS else next(others)
        ax.plot(list(values), list(values.values()), label=label, **style.mark(meaning))
        best[label] = min(values.values())
    _loss_axis(ax)
    ax.figure.legend(loc="outside right upper")
    first = min(best, key=best.get)
    return f"Lowest: {first}, {best[first]:.3f} nats"


@style.draws
def race(axes, curves: Mapping[str, Mapping[int, float]], of_each: Mapping[str, Mapping]) -> None:
    """Held-out loss against steps, against seconds, and at the end against bytes of state.

    Args:
        curves: optimizer → {step: loss (nats), mean over the seeds}.
        of_each: optimizer → "seconds a step", "state bytes", and "loss" at the end with its "mean",
            "low" and "high".
    """
    for name, curve in curves.items():
        look = style.mark(name)
        found = of_each[name]
        steps = list(curve)
        losses = list(curve.values())
        seconds = [found["seconds a step"] * step for step in steps]
        axes[0].plot(steps, losses, label=name, **look)
        axes[1].plot(seconds, losses, **look)
        mean = found["loss"]["mean"]
        reach = [[mean - found["loss"]["low"]], [found["loss"]["high"] - mean]]
        axes[2].errorbar(found["state bytes"] / 2**10, mean, reach, capsize=4, **look)
    for ax, label in zip(axes, ("step", "time (s)", "optimizer states (KiB)")):
        ax.set_xlabel(label)
    axes[2].set_xlim(left=0)
    _loss_axis(axes[0])
    axes[0].figure.legend(loc="outside lower center", ncols=len(curves))


# ---- exercises -----------------------------------------------------------------------------------


def _as_the_authors_write_it(weight, momentum, curvature, lr, rho, weight_decay):
    ratio = (momentum.abs() / (rho * curvature + sophia.EPSILON)).clamp(max=1)
    decayed = weight * (1 - lr * weight_decay)
    return decayed - lr * momentum.sign() * ratio


def _not_clipped(weight, momentum, curvature, lr, rho, weight_decay):
    return (1 - lr * weight_decay) * weight - lr * momentum / (rho * curvature + sophia.EPSILON)


def _clipped_above_alone(weight, momentum, curvature, lr, rho, weight_decay):
    ratio = (momentum / (rho * curvature + sophia.EPSILON)).clamp(max=1)
    return (1 - lr * weight_decay) * weight - lr * ratio


def _root(weight, momentum, curvature, lr, rho, weight_decay):
    return sophia.update(weight, momentum, curvature.sqrt(), lr, rho, weight_decay)


def _inputs() -> list[tuple]:
    by_hand = torch.ones(2), torch.tensor([2.0, -1.0]), torch.tensor([1.0, 4.0]), 0.5, 1.0, 0.0
    weight, momentum = torch.randn(2, 8, 64)
    curvature = torch.randn(8, 64) ** 2
    return [by_hand, (weight, momentum, curvature, 0.1, 2.0, 0.1)]


check_sophia_update = Written(
    "sophia_update",
    _as_the_authors_write_it,
    _inputs,
    "the update as the authors' code has it",
    "momentum / (rho · curvature), each number clipped to −1 … 1, times lr, taken from the weight "
    "after (1 − lr · weight_decay) times it",
    {
        "clip each number to −1 … 1": _not_clipped,
        "clip at −1 as well": _clipped_above_alone,
        "the curvature itself is divided by: the root is Adam's": _root,
    },
)


check_state_bytes = exercise(
    "bytes of Sophia's states", want=2 * 4 * 188_743_680, hint="two states a number, in float32"
)
