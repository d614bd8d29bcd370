"""Random problems for the kernels, and comparison by name."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

Problem = dict[str, Tensor]

# Triton's tests run on the GPU where there is one, else interpreted, in a process of their own
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1 as make test sets it",
)


def scan_problem(
    b: int = 2,
    l: int = 13,
    d: int = 6,
    n: int = 4,
    *,
    groups: int | None = None,
    constant: tuple[str, ...] = (),
    complex_: bool = False,
    without: tuple[str, ...] = (),
    B_bias: bool = False,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Tensors of a selective scan by the names of its arguments, all of them requiring gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = (torch.complex128 if wide == torch.float64 else torch.complex64) if complex_ else wide
    narrow = state if complex_ else dtype
    selective = (b, l, n) if groups is None else (b, l, groups, n)
    A = -torch.rand(d, n, dtype=wide) - 0.1
    problem = {
        "u": torch.randn(b, l, d, dtype=dtype),
        "delta": torch.randn(d, dtype=wide) if "delta" in constant else torch.randn(b, l, d, dtype=dtype),
        "A": torch.complex(A, torch.randn(d, n, dtype=wide)) if complex_ else A,
        "B": torch.randn(d, n, dtype=state) if "B" in constant else torch.randn(selective, dtype=narrow),
        "C": torch.randn(d, n, dtype=state) if "C" in constant else torch.randn(selective, dtype=narrow),
        "D": torch.randn(d, dtype=wide),
        "z": torch.randn(b, l, d, dtype=dtype),
        "delta_bias": torch.randn(d, dtype=wide),
        "B_bias": torch.randn(d, n, dtype=state),
        "initial_state": torch.randn(sequences or b, d, n, dtype=state),
    }
    if not B_bias:
        without = (*without, "B_bias")
    return {name: x.requires_grad_() for name, x in problem.items() if name not in without}


def gradients(outputs: list[Tensor], inputs: Problem, weights: list[Tensor]) -> Problem:
    """The gradient of a weighted sum of outputs by every input."""
    found = torch.autograd.grad(outputs, list(inputs.values()), weights)
    return dict(zip(inputs, found, strict=True))


def assert_close(name: str, found: Tensor, truth: Tensor, tolerance: float) -> None:
    """Compare by the largest error over the largest value."""
    assert found.shape == truth.shape, f"{name}: {tuple(found.shape)} is not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    kind = torch.complex128 if truth.is_complex() else torch.float64
    found, truth = found.detach().to(kind), truth.detach().to(kind)
    error = float((found - truth).abs().max() / truth.abs().max().clamp(min=1e-6))
    assert error < tolerance, f"{name}: off by {error:.2e}, {tolerance:.0e} is allowed"


def double(problem: Problem) -> Problem:
    """The same problem in double precision, for the truth."""
    return {
        name: x.detach().to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_()
        for name, x in problem.items()
    }


Options = dict[str, Any]
