"""Which implementation of an operator runs: the one place that asks."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("triton", "torch", "reference")
# what every Triton kernel reads; double precision goes to the torch back end, as complex numbers mostly do
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# found once, here: torch.compile cannot trace the search
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(
    requested: str | None, x: Tensor, *others: Tensor | None, also: tuple[torch.dtype, ...] = ()
) -> str:
    """Name the back end for x and what comes with it: `requested`, else MAMBAZOO_BACKEND, else the fastest there is.

    Where Triton has no kernel for their dtypes, those it always reads and `also`, "triton" gives way to "torch".

    Raises:
        ValueError: for an unknown name, for "triton" where it cannot run, and under a transform of torch.func.
    """
    on_gpu = x.is_cuda
    name = (
        requested or os.environ.get("MAMBAZOO_BACKEND") or ("triton" if on_gpu and _HAS_TRITON else "torch")
    )
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: use one of {', '.join(BACKENDS)}")
    if name != "reference" and is_transformed():
        raise ValueError(
            f"backend {name!r} has a gradient, but no rule for torch.func, vmap and derivatives in forward mode: "
            'call it without them, or use backend "reference"'
        )
    if name == "triton":
        if not _HAS_TRITON or not (on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                f'backend "triton" cannot run on {x.device}: it needs a GPU and the package triton; '
                'use backend "torch", or TRITON_INTERPRET=1 to debug'
            )
        if any(t.dtype not in (*_TRITON_DTYPES, *also) for t in (x, *others) if t is not None):
            return "torch"
    return name


def has_kernels(x: Tensor) -> bool:
    """Whether `choose` says "triton" of x where nobody asks for another."""
    name = os.environ.get("MAMBAZOO_BACKEND") or "triton"
    return (
        x.is_cuda and _HAS_TRITON and name == "triton" and x.dtype in _TRITON_DTYPES and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether torch.func or forward mode is at work, under which an operator without a rule fails or leaves zeros."""
    # a compiler cannot trace the question, and has transforms of its own
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Launch kernels where x is: Triton takes the current device, whatever the tensors are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
