"""Checkers of the exercises in notebook 02; the right answers are computed, not written down."""

import torch

from qlora_nb.theory import lora
from qlora_nb.ui.checks import exercise

X, W = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
A, B = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-2.0]])

hint = "A has r · in numbers, B has out · r, and nothing else is trained"
check_count = exercise("trained numbers", lora.n_parameters(8, [(768, 3072)]), hint, 1e-9)
"""Exercise 1: trained numbers of rank 8 on a layer from 768 to 3072."""

hint = "x Aᵀ is one number, 3; times B it is [3, -6]; scale that by alpha / r and add x"
check_output = exercise("y", lora.forward(X, W, A, B, 2), hint)
"""Exercise 2: y for x = [1, 2], W = identity, A = [[1, 1]], B = [[1], [-2]], alpha = 2."""

check_alpha = exercise("alpha", lora.scale(16, 64) * 16, "the scale is alpha / r: 16 / 64 must stay what it is")
"""Exercise 3: the alpha that keeps the scale of (alpha 16, r 64) when r becomes 16."""

check_break_even = exercise("rank", 5120 * 15360 / (5120 + 15360), "solve r · (in + out) = in · out", 1e-9)
"""Exercise 4: the rank at which LoRA on a 5120 → 15360 layer trains as many numbers as the layer has."""
