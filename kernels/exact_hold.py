"""The exact hold of an input over a step (Mamba, equation 4): its gain is delta phi(delta A)."""

import torch
from torch import Tensor


def phi(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, by its series near zero: the exact hold's gain is delta phi(delta A)."""
    near_zero = x.abs() < 1e-2
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return torch.where(near_zero, series, torch.expm1(x) / torch.where(near_zero, 1, x))


def gain_gradients(delta: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exact hold's gain, delta phi(x) with x = delta A, its derivative by delta, exp(x), and by A."""
    x = delta * A
    value, near_zero = phi(x), x.abs() < 1e-1
    terms = (1 / 2, 1 / 3, 1 / 8, 1 / 30, 1 / 144, 1 / 840, 1 / 5760, 1 / 45360)
    series = torch.zeros_like(x)
    for term in reversed(terms):
        series = series * x + term
    slope = torch.where(near_zero, series, (torch.exp(x) - value) / torch.where(near_zero, 1, x))
    return delta * value, torch.exp(x), delta.square() * slope
