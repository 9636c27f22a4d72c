"""Checkers of the exercises in notebook 02; the right answers are computed, not written down."""

import torch

from qlora_nb.theory import lora
from qlora_nb.ui.checks import verdict

X, W = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-2.0]])


def check_count(answer: object) -> bool:
    """Exercise 1: trained numbers of rank 8 on a layer from 768 to 3072."""
    hint = "A has r · in numbers, B has out · r, and nothing else is trained"
    return verdict(answer, lora.n_parameters(8, [(768, 3072)]), "trained numbers", hint, tolerance=1e-9)


def check_output(answer: object) -> bool:
    """Exercise 2: y for x = [1, 2], W = identity, A = [[1, 1]], B = [[1], [-2]], alpha = 2."""
    hint = "x Aᵀ is one number, 3; times B it is [3, -6]; scale that by alpha / r and add x"
    return verdict(answer, lora.forward(X, W, A, B, 2), "y", hint)


def check_alpha(answer: object) -> bool:
    """Exercise 3: the alpha that keeps the scale of (alpha 16, r 64) when r becomes 16."""
    return verdict(answer, lora.scale(16, 64) * 16, "alpha", "the scale is alpha / r: 16 / 64 must stay what it is")


def check_break_even(answer: object) -> bool:
    """Exercise 4: the rank at which LoRA on a 5120 → 15360 layer trains as many numbers as the layer has."""
    n_in, n_out = 5120, 15360
    hint = "solve r · (in + out) = in · out"
    return verdict(answer, n_in * n_out / (n_in + n_out), "rank", hint, tolerance=1e-9)
