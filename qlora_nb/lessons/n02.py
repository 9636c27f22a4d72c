"""Notebook 02: the figures of LoRA and the checkers of its exercises.

The figures: the loss of a layer for three ways of starting A and B; how much of a fully fine-tuned
layer's update the best matrix of each rank holds, and a corner of that update. What is drawn is
measured in `theory/lora.py`; what the reader writes is compared with PEFT.
"""

import torch
from matplotlib import cycler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from qlora_nb.ui.checks import exercise
from qlora_nb.ui.style import COLOURS, draws, log2_axis, maps, mark
from qlora_nb.ui.written import Written

LINES = cycler(
    color=[COLOURS["LoRA"], COLOURS["16-bit"], COLOURS["other"]], linestyle=["-", "--", "-."]
)
"""How one line after another is drawn, from the first again after the last."""


@draws
def plot_losses(ax, losses, title: str):
    """Loss over steps, one line a way of starting A and B.

    Args:
        losses: {way of starting: loss of every step}.
        title: the finding.
    """
    ax.set_prop_cycle(LINES)
    for name, values in losses.items():
        ax.plot(values, label=name, linewidth=2)
    return title


@draws
def plot_captured(ax, curves, r: int):
    """Share of an update that the best rank-r matrix holds, over r.

    Args:
        curves: name → cumulative energy (`lora.captured_energy`); the first is the finding, the
            others are for comparison.
        r: the rank to mark.
    """
    ax.set_prop_cycle(LINES)
    for name, curve in curves.items():
        ranks = range(1, len(curve) + 1)
        ax.plot(ranks, 100 * curve, label=name, linewidth=2)
    first, *_ = curves.values()
    r = min(r, len(first))
    held = 100 * first[r - 1]
    ax.plot([r], [held], **mark("LoRA"), markersize=11)
    ax.axvline(r, color=COLOURS["other"], linewidth=1, linestyle=":")
    n_ticks = len(first).bit_length()
    log2_axis(ax, [2**i for i in range(n_ticks)])
    return f"Rank {r} holds {held:.0f} % of this update"


@draws
def plot_update(axes, update, factors, r: int):
    """A corner of the update (32 rows and columns), of its best rank-r matrix, and what is left, in
    one colour scale.

    Args:
        update: (out, in) ΔW, in units of its standard deviation.
        factors: (A, B) of `lora.best_rank` at full rank; their first r rows and columns are the
            best of rank r.
        r: rank of the approximation; more than the matrix has counts as all.
    """
    a, b = factors
    r = min(r, len(a))
    energy = (b**2).sum(dim=0)
    left = 100 * energy[r:].sum() / energy.sum()
    corner = update[:32, :32]
    near = b[:32, :r] @ a[:r, :32]
    maps(axes, (corner, near, corner - near), 2, "change (std of ΔW)")
    titles = ("update ΔW", f"best of rank {r}", f"left over: {left:.0f} %")
    for ax, title in zip(axes, titles):
        ax.set(title=title, xticks=[0, 16], yticks=[0, 16])
    axes[0].set_ylabel("output (index)")


BY_HAND = (
    torch.tensor([1.0, 2.0]),
    torch.tensor([[0.5, -1.0], [1.0, 0.0]]),
    torch.tensor([[1.0, 1.0]]),
    torch.tensor([[3.0], [-2.0]]),
    2,
)
"""x, W, A, B, alpha of a layer to check by hand: y = [16.5, -11]."""


def at_random() -> tuple:
    """x, W, A, B, alpha of a layer from 128 to 96 at rank 8."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 128), (96, 128), (8, 128), (96, 8))
    tensors = []
    for shape in shapes:
        tensors.append(torch.randn(shape, generator=generator))
    return (*tensors, 16)


def adapted(weight, lora_a, lora_b, lora_alpha) -> tuple[PeftModel, dict[str, Tensor]]:
    """A model of one linear layer as PEFT adapts it, and the layer's parameters by their names.

    Args:
        weight: (out, in) W.
        lora_a, lora_b: (r, in) A and (out, r) B.
        lora_alpha: alpha.
    """
    n_out, n_in = weight.shape
    plain = nn.Sequential(nn.Linear(n_in, n_out, bias=False))
    config = LoraConfig(r=len(lora_a), lora_alpha=lora_alpha, target_modules=["0"])
    tensors = {
        "base_layer.weight": weight,
        "lora_A.default.weight": lora_a,
        "lora_B.default.weight": lora_b,
    }
    return get_peft_model(plain, config), tensors


def in_peft(x, *layer) -> Tensor:
    """(…, out) of PEFT's layer; gradients reach the tensors that are given (those of
    `adapted`).
    """
    model, tensors = adapted(*layer)
    return functional_call(model.base_model.model[0], tensors, x)


def merged_by_peft(*layer) -> Tensor:
    """(out, in) weight after PEFT's `merge_and_unload` of `adapted`."""
    model, tensors = adapted(*layer)
    model.base_model.model[0].load_state_dict(tensors)
    return model.merge_and_unload()[0].weight.detach()


def with_gradients(function, x, weight, lora_a, lora_b, lora_alpha) -> tuple[Tensor, ...]:
    """Output of a layer, and the gradients of A and B if the loss is the sum of its squares."""
    trained = [lora_a.requires_grad_(), lora_b.requires_grad_()]
    y = function(x, weight, lora_a, lora_b, lora_alpha)
    return y, *torch.autograd.grad((y**2).sum(), trained)


def _without_rank(x, weight, lora_a, lora_b, lora_alpha) -> Tensor:
    return x @ weight.T + lora_alpha * (x @ lora_a.T) @ lora_b.T


check_forward = Written(
    "lora_forward",
    in_peft,
    lambda: [BY_HAND, at_random()],
    "PEFT's layer, output and gradients of A and B",
    "y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ, with r the number of A's rows",
    {"the factor is alpha / r, not alpha: divide by the number of A's rows": _without_rank},
    call=with_gradients,
)
"""Exercise: `lora_forward(x, weight, A, B, alpha)`."""

check_merge = Written(
    "lora_merge",
    merged_by_peft,
    lambda: [BY_HAND[1:], at_random()[1:]],
    "PEFT's merge_and_unload",
    "W + (alpha / r) B A, a new matrix with the shape of W",
)
"""Exercise: `lora_merge(weight, A, B, alpha)`."""

check_alpha = exercise(
    "alpha",
    want=16 / 64 * 16,
    hint="the scale is alpha / r: 16 / 64 must stay what it is",
)
"""Exercise: the alpha that keeps the scale of (alpha 16, r 64) when r becomes 16."""
