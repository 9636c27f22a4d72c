"""Sophia-G: a step as long as the curvature of the loss allows, and never longer than the learning
rate.

Adam divides the running mean of the gradient by the root of its running square. Sophia (arXiv
2305.14342, algorithm 3) divides it by an estimate h of the loss's second derivative, one number for
each weight: long steps where the loss is flat, short ones where it is steep. Where h is small or
negative such a step would be far too long, so every number is clipped to [-1, 1]::

    m ← β₁ m + (1 − β₁) g                      every step
    h ← β₂ h + (1 − β₂) B ĝ²                   every k-th step
    θ ← (1 − lr λ) θ − lr clip(m / (ρ h), 1)

ĝ is the gradient of the mean loss of B tokens whose labels are drawn from the model's *own*
probabilities (`sampled_labels`). B ĝ² is then, on average, the diagonal of the Gauss–Newton matrix:
the Gauss–Newton–Bartlett estimator (algorithm 2), which the G stands for. Two states a number, as
Adam has.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

EPSILON = 1e-15
"""Keeps 0/0 away; the authors' code adds it, the paper takes the maximum with it."""


def sampled_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels drawn from the model's own probabilities, wherever there is a label.

    Args:
        logits: (rows, tokens, vocabulary); those at a place speak of the token after it.
        labels: (rows, tokens) token ids; -100 is not counted, and stays.

    Returns:
        (rows, tokens) token ids. The first of a row stays too, as nothing is before it.
    """
    drawn = torch.distributions.Categorical(logits=logits[:, :-1].float()).sample()
    sampled = labels.clone()
    sampled[:, 1:] = torch.where(labels[:, 1:] == -100, labels[:, 1:], drawn)
    return sampled


def update(
    weight: Tensor, momentum: Tensor, curvature: Tensor, lr: float, rho: float, weight_decay: float
) -> Tensor:
    """The weight after one step: the last of the three lines above.

    Args:
        weight, momentum, curvature: θ, m and h, of one shape; h is not negative.
        lr: how far a clipped number moves.
        rho: the larger, the fewer numbers are clipped.
        weight_decay: λ.

    By hand: m/(ρh) is 2, clipped to 1, and −0.25; there is no decay.

    >>> one = torch.ones(2)
    >>> update(one, torch.tensor([2.0, -1.0]), torch.tensor([1.0, 4.0]), 0.5, 1.0, 0.0)
    tensor([0.5000, 1.1250])
    """
    ratio = momentum / (rho * curvature + EPSILON)
    return (1 - lr * weight_decay) * weight - lr * ratio.clamp(-1, 1)


class SophiaG(torch.optim.Optimizer):
    """Sophia-G as a torch optimizer, with the defaults of the authors' code.

    Args:
        parameters: what trains.
        lr, rho, weight_decay: as in `update`.
        betas: β₁ of the gradient's running mean, β₂ of the curvature's.
        rule: computes the new weight, with the arguments of `update`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        rule: Callable[..., Tensor] = update,
    ):
        self.rule = rule
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def estimate(self, n_tokens: int) -> None:
        """Take the gradients that are there as ĝ, of a mean over so many sampled labels (B)."""
        for parameter, state, group in self._trained():
            beta = group["betas"][1]
            estimate = n_tokens * parameter.grad**2
            state["curvature"].mul_(beta).add_(estimate, alpha=1 - beta)

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient."""
        for parameter, state, group in self._trained():
            beta = group["betas"][0]
            state["momentum"].mul_(beta).add_(parameter.grad, alpha=1 - beta)
            options = {name: group[name] for name in ("lr", "rho", "weight_decay")}
            moved = self.rule(parameter, state["momentum"], state["curvature"], **options)
            parameter.copy_(moved)

    def clipped(self) -> float:
        """Share of all numbers that the last step clipped (0 to 1)."""
        n_clipped = 0
        n = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                limit = group["rho"] * state["curvature"]
                n_clipped += (state["momentum"].abs() > limit).sum().item()
                n += limit.numel()
        return n_clipped / n

    def _trained(self):
        """(parameter, its state, its group) of each parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                        state["curvature"] = torch.zeros_like(parameter)
                    yield parameter, state, group
