"""One token through the recurrence: the selective scan of length one that decoding repeats.

h <- exp(delta A) h + gain B u,   y = C . h + D u        (Mamba, equation 2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference


def selective_state_update(
    state: Tensor,
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
    discretization: str = "euler",
    backend: str | None = None,
) -> Tensor:
    """Advance state (b, d, n) by one token u (b, d), in place, and return y (b, d). It has no gradient.

    The arguments are those of `selective_scan` without the time axis: delta (b, d) or (d,), A (d, n), z (b,
    d); B and C selective (b, n), by groups of channels (b, g, n), or constant (1, d, n).

    Raises:
        ValueError: when shapes do not fit; the message names the argument.
    """
    B, C = (matrix.unsqueeze(1) if matrix.ndim == 2 else matrix for matrix in (B, C))
    _check(state, u, delta, A, B, C, z)
    name = backends.choose(u.device, backend)
    if name == "reference":
        y, new_state = reference.selective_state_update(
            state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization=discretization
        )
        state.copy_(new_state)
        return y
    # an operator is what compilers and exporters need to see; a call of the function itself costs less
    update = _update_op if torch.compiler.is_compiling() else _update
    return update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization)


@torch.no_grad()
def _update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    discretization: str,
) -> Tensor:
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, step = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias
    if delta_softplus:
        step = F.softplus(step)
    # channels by groups, (b, g, e, n), so that B and C broadcast over a group's
    groups = state.unflatten(1, (B.shape[1], -1))
    if discretization == "euler":
        state.mul_(torch.exp(step.unsqueeze(-1) * A))
        groups.addcmul_(
            (step * x).unflatten(1, (B.shape[1], -1)).unsqueeze(-1), B.to(state.dtype).unsqueeze(2)
        )
    else:
        decay, gain = reference.hold(step.unsqueeze(-1), A, discretization)
        state.mul_(decay)
        groups.addcmul_(
            (gain * x.unsqueeze(-1)).unflatten(1, (B.shape[1], -1)), B.to(state.dtype).unsqueeze(2)
        )
    y = (state.unflatten(1, (C.shape[1], -1)) @ C.to(state.dtype).unsqueeze(-1)).flatten(1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), x)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


_update_op = torch.library.custom_op("mambazoo::selective_state_update", _update, mutates_args=("state",))


@_update_op.register_fake
def _update_fake(state, u, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _check(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None
) -> None:
    if state.ndim != 3 or state.dtype != A.dtype or A.shape != state.shape[1:]:
        raise ValueError(
            f"state must be (b, d, n) beside A (d, n), in its dtype, not {tuple(state.shape)} {state.dtype} "
            f"beside {tuple(A.shape)} {A.dtype}"
        )
    b, d, n = state.shape
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        if x is not None and x.shape != (b, d) and not (name == "delta" and x.shape == (d,)):
            raise ValueError(f"{name} must be (b, d) = ({b}, {d}), not {tuple(x.shape)}")
    for name, matrix in (("B", B), ("C", C)):
        if matrix.shape[0] not in (1, b) or d % matrix.shape[1] or matrix.shape[2] != n:
            raise ValueError(
                f"{name} must be (b, n), (b, g, n) or (1, d, n), not {tuple(matrix.shape)}: b {b}, d {d}, n {n}"
            )
