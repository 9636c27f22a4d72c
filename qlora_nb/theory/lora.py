"""LoRA: the big matrix stays frozen, two thin ones beside it are trained.

A linear layer computes y = x Wᵀ + b with W of shape (out, in). Fine-tuning would change W by some
ΔW with as many trained numbers as W has. LoRA (arXiv 2106.09685, section 4.1) writes ΔW =
(alpha / r) · B A with A of shape (r, in) and B of shape (out, r): only r · (in + out) numbers are
trained, and ΔW has at most rank r.

- B starts at zero and A at random: B A is zero, so training starts exactly at the base model. Both
  at zero would never move: the gradient of A is multiplied by B, the gradient of B by A.
- The product is scaled by alpha / r, so that r can be varied at the same learning rate.
- After training ΔW can be added into W: the tuned model then costs nothing extra to run.

The layer itself and its merging are written by the reader of notebook 02. Here is what is counted
and measured there: how many numbers are trained, and how much of an update rank r can hold.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from qlora_nb.errors import KitError


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
    if not update.isfinite().all():
        raise KitError(
            "the update holds NaN or inf",
            remedy="look at the training loss: it has probably diverged",
        )
    energy = torch.linalg.svdvals(update.float()) ** 2
    if energy.sum() == 0:
        raise KitError("the update is zero everywhere", remedy="train a few steps first")
    return energy.cumsum(0) / energy.sum()


def best_rank(update: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A, B) whose product B A is the rank-r matrix nearest to the update: A (r, in), B (out, r)
    with r up to min(out, in).
    """
    u, s, v = torch.linalg.svd(update.float(), full_matrices=False)
    return v[:r], u[:, :r] * s[:r]
