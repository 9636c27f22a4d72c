"""Notebook 10, several processes: its exercises.

- `check_ring_all_reduce`: adding up gradients in a ring of processes;
- `check_bytes_sent`: what that costs.
"""

import torch

from qlora_nb.ui.checks import exercise
from qlora_nb.ui.written import Written


def _by_torch(gradients: torch.Tensor) -> tuple[torch.Tensor, int]:
    n, size = gradients.shape
    return gradients.sum(dim=0).repeat(n, 1), 2 * (n - 1) * size // n


def _half_way(gradients: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Each process has the sum of one piece alone."""
    n, size = gradients.shape
    pieces = gradients.reshape(n, n, -1)
    ranks = torch.arange(n)
    own = (ranks + 1) % n
    found = pieces.clone()
    found[ranks, own] = pieces.sum(dim=0)[own]
    return found.reshape(n, size), (n - 1) * size // n


def _mean(gradients: torch.Tensor) -> tuple[torch.Tensor, int]:
    found, sent = _by_torch(gradients)
    return found / len(gradients), sent


def _everything_to_everyone(gradients: torch.Tensor) -> tuple[torch.Tensor, int]:
    n, size = gradients.shape
    return _by_torch(gradients)[0], (n - 1) * size


check_ring_all_reduce = Written(
    "ring_all_reduce",
    _by_torch,
    lambda: [(torch.tensor([[1.0, 2.0], [30.0, 40.0]]),), (torch.randn(4, 12),)],
    "torch's sum over the processes, with the bytes of a ring",
    "n − 1 rounds in which a piece goes on and is added, n − 1 in which the sum goes on",
    {
        "the sums must go round a second time: each process has one piece of them": _half_way,
        "the sum is asked for; DDP divides by n afterwards": _mean,
        "whole gradients were sent: a piece is 1/n of one": _everything_to_everyone,
    },
)

check_bytes_sent = exercise(
    "bytes that each sends", want=2 * 7 * 4 * 188_743_680 // 8, hint="2 (n − 1) / n gradients"
)
