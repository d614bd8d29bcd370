"""The selective scan of one part of a sequence whose other parts are elsewhere, on other devices or at other times.

A part starts in a state that depends on all the parts before it, and its end matters to all the parts behind. Both are
asked for in the middle of the work: forward, once it is known what the part makes of zero and how much of a state it
keeps; backward, once it is known what its outputs ask of its start. So all parts are worked on side by side, and where
the scan is cut into chunks anyway, nothing is computed twice for it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from . import backend as backends
from .scan import TRITON_ALSO, _check, _implementation


class Neighbours(Protocol):
    """The other parts, as one part sees them in one scan."""

    def start(self, end: Tensor, total: Tensor) -> Tensor:
        """The state (b, d, n) that the part starts from.

        Args:
            end: the state (b, d, n) that the part ends in if it starts from zero.
            total: the sum of its steps (b, d); the part decays a state by exp(A total).
        """
        ...

    def end_gradient(self, d_start: Tensor) -> Tensor:
        """The gradient (b, d, n) of the state that the part ends in, given what its own outputs ask of its start."""
        ...


def selective_scan_part(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    neighbours: Neighbours,
    discretization: str = "euler",
    backend: str | None = None,
) -> Tensor:
    """Scan u (b, l, d), a part of a sequence, with steps delta; return y (b, l, d), that part of the whole scan's.

    Arguments are those of `selective_scan`. Gradients are whole too: what the parts behind ask of this one is in them.

    Raises:
        ValueError: when shapes, dtypes or devices do not fit; the message names the argument.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, None, None, discretization)
    name = backends.choose(backend, u, delta, A, B, C, D, z, delta_bias, also=TRITON_ALSO[discretization])
    flags = (delta_softplus, discretization, _implementation("torch" if name == "reference" else name))
    return _part(neighbours, flags, u, delta, A, B, C, D, z, delta_bias)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, neighbours: Neighbours, flags: tuple[bool, str, Any], u: Tensor, *rest: Tensor | None
    ) -> Tensor:
        softplus, discretization, implementation = flags
        started: list[Tensor] = []

        def start(end: Tensor, total: Tensor) -> Tensor:
            started.append(neighbours.start(end.contiguous(), total))
            return started[0]

        with torch.autocast(u.device.type, enabled=False), backends.launching_on(u):
            y, _, kept = implementation.scan_fwd(
                u, *rest, None, None, softplus, False, discretization, start=start
            )
        ctx.neighbours, ctx.flags = neighbours, flags
        ctx.save_for_backward(kept, *started, u, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        softplus, discretization, implementation = ctx.flags
        kept, started, *inputs = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False), backends.launching_on(dy):
            gradients = implementation.scan_bwd(
                dy, None, kept, *inputs, started, None, softplus, False, discretization,
                end_gradient=lambda d_start: ctx.neighbours.end_gradient(d_start.contiguous()),
            )  # fmt: skip
        wanted = (
            None if x is None or gradient is None else gradient.to(x.dtype)
            for x, gradient in zip(inputs, gradients, strict=False)
        )
        return None, None, *wanted


_part: Any = _Part.apply
