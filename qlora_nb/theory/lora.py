"""LoRA: the big matrix stays frozen, two thin ones beside it are trained.

A linear layer computes y = x Wᵀ + b with W of shape (out, in). Fine-tuning would change W by some
ΔW with as many trained numbers as W has. LoRA (arXiv 2106.09685, section 4.1) writes ΔW =
(alpha / r) · B A with A of shape (r, in) and B of shape (out, r): only r · (in + out) numbers are
trained, and ΔW has at most rank r.

- B starts at zero and A at random: B A is zero, so training starts exactly at the base model. Both
  at zero would never move: the gradient of A is multiplied by B, the gradient of B by A.
- The product is scaled by alpha / r, so that r can be varied at the same learning rate.
- After training ΔW can be added into W (`merge`): the tuned model then costs nothing extra to run.

Two variants: rsLoRA (arXiv 2312.03732) scales by alpha / √r, so that high ranks still learn; DoRA
(arXiv 2402.09353) trains the length of every row of W + ΔW apart from its direction. Conventions
are those of PEFT's `tuners/lora/layer.py`; everything here is tested equal to it.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlora_nb.errors import KitError


def scale(lora_alpha: float, r: int, rslora: bool = False) -> float:
    """The factor before B A: alpha / r, with rsLoRA alpha / √r.

    Raises:
        KitError: r below 1.

    >>> scale(16, 64), scale(16, 64, rslora=True)
    (0.25, 2.0)
    """
    if r < 1:
        raise KitError("the rank is too small", value=r, allowed="1 or more")
    if rslora:
        return lora_alpha / math.sqrt(r)
    return lora_alpha / r


def forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_alpha: float) -> Tensor:
    """y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ, the thin product first: ΔW is never formed.

    Args:
        x: (…, in) inputs.
        weight: (out, in) frozen W.
        lora_a: (r, in) A.
        lora_b: (out, r) B.
        lora_alpha: alpha.

    Returns:
        (…, out).

    Raises:
        KitError: the shapes do not fit together.

    By hand: x = [1, 2], W = [[1, 0]], A = [[1, 1]], B = [[3]], alpha = 2, r = 1. x Wᵀ = 1, x Aᵀ =
    3, times B = 9, times 2 = 18: y = 19.

    >>> x, weight = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0]])
    >>> forward(x, weight, torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]]), lora_alpha=2)
    tensor([19.])
    """
    _check_shapes(weight, lora_a, lora_b)
    if x.shape[-1] != weight.shape[1]:
        raise KitError(
            f"x has {x.shape[-1]} features, the layer takes {weight.shape[1]}",
            remedy="give x of shape (…, in)",
        )
    thin = x @ lora_a.T
    return x @ weight.T + scale(lora_alpha, r=len(lora_a)) * (thin @ lora_b.T)


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_alpha: float) -> Tensor:
    """W + ΔW with ΔW = (alpha / r) B A: one matrix (out, in) that does what the two paths did.
    Exact only within the rounding of W's dtype.
    """
    _check_shapes(weight, lora_a, lora_b)
    delta = scale(lora_alpha, r=len(lora_a)) * (lora_b @ lora_a)
    return weight + delta.to(weight.dtype)


def n_parameters(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Trained numbers for LoRA of rank r on layers of these (in, out): r · (in + out) each.

    >>> n_parameters(16, [(5120, 15360)])  # query_key_value of pythia-12b
    327680
    """
    return sum(r * (n_in + n_out) for n_in, n_out in shapes)


def captured_energy(update: Tensor) -> Tensor:
    """How much of an update the best rank-r matrix holds, for every r.

    Args:
        update: (out, in) ΔW.

    Returns:
        (min(out, in),) cumulative share of the squared entries, 0 to 1; entry r − 1 belongs to rank
        r. The squared singular values add up to the squared entries, and the r largest are the best
        a rank-r matrix can do (Eckart and Young, 1936).

    Raises:
        KitError: an update of zeros, or with NaN or inf.

    >>> captured_energy(torch.diag(torch.tensor([3.0, 4.0])))  # 16/25, 25/25
    tensor([0.6400, 1.0000])
    """
    _check_finite(update)
    energy = torch.linalg.svdvals(update.float()) ** 2
    if energy.sum() == 0:
        raise KitError("the update is zero everywhere", remedy="train a few steps first")
    return energy.cumsum(0) / energy.sum()


def best_rank(update: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A, B) whose product B A is the rank-r matrix nearest to the update: A (r, in), B (out, r).

    Raises:
        KitError: r outside 1 … min(out, in), or an update with NaN or inf.
    """
    _check_finite(update)
    largest = min(update.shape)
    if not 1 <= r <= largest:
        raise KitError("the rank does not fit the matrix", value=r, allowed=f"1 to {largest}")
    u, s, v = torch.linalg.svd(update.float(), full_matrices=False)
    return v[:r], u[:, :r] * s[:r]


def dora_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_alpha: float, magnitude: Tensor
) -> Tensor:
    """DoRA's weight: rows of W + ΔW brought to trained lengths.

    Args:
        magnitude: (out,) row lengths; starts at the lengths of W's rows, so that training starts at
            the base model.

    Returns:
        (out, in). One number a row is trained beside A and B (DoRA, section 4; PEFT's
        `tuners/lora/dora.py`).
    """
    merged = merge(weight, lora_a, lora_b, lora_alpha)
    return magnitude[:, None] * nn.functional.normalize(merged, dim=1, eps=0.0)


def _check_shapes(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    n_out, n_in = weight.shape
    r = len(lora_a)
    if lora_a.shape != (r, n_in) or lora_b.shape != (n_out, r):
        raise KitError(
            f"A is {tuple(lora_a.shape)} and B is {tuple(lora_b.shape)}",
            allowed=f"for W of {tuple(weight.shape)}: A ({r}, {n_in}) and B ({n_out}, {r})",
        )


def _check_finite(update: Tensor) -> None:
    if not update.isfinite().all():
        raise KitError(
            "the update holds NaN or inf",
            remedy="look at the training loss: it has probably diverged",
        )
