"""One token through the recurrence: the selective scan of length one that decoding repeats.

h <- exp(delta A) h + gain B u,   y = C . h + D u        (Mamba, equation 2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference
from .checks import NUMBERS, check_discretization, check_states, check_tensor, check_written, expect


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
    for name, matrix in (("state", state), ("A", A), ("B", B), ("C", C)):
        check_tensor(name, matrix, NUMBERS)
    check_tensor("u", u)
    B, C = (matrix.unsqueeze(1) if matrix.ndim == 2 else matrix for matrix in (B, C))
    _check(state, u, delta, A, B, C, D, z, delta_bias, discretization)
    name = backends.choose(backend, u, state, delta, A, B, C, D, z, delta_bias)
    if name == "reference":
        y, new_state = reference.selective_state_update(
            state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization=discretization
        )
        state.copy_(new_state)
        return y
    tensors = (state, u, delta, A, B, C, D, z, delta_bias)
    # an operator is what compilers and exporters need to see, and views that negate; a call of the function costs less
    seen = torch.compiler.is_compiling() or any(x is not None and x.is_neg() for x in tensors)
    return (_update_op if seen else _update)(*tensors, delta_softplus, discretization, name)


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
    backend: str,
) -> Tensor:
    if backend == "triton":
        from . import step_triton

        return step_triton.update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization)
    with torch.autocast(u.device.type, enabled=False):
        return _update_torch(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, discretization)


def _update_torch(
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
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    discretization: str,
) -> None:
    if state.ndim != 3 or u.ndim != 2 or state.dtype != A.dtype or A.shape != state.shape[1:]:
        raise ValueError(
            f"state must be (b, d, n), beside u (b, d) and A (d, n) in one dtype, not {tuple(state.shape)} "
            f"{state.dtype} beside {tuple(A.shape)} {A.dtype}"
        )
    b, d, n = state.shape
    check_states(n)
    expect("A", A, u.device, (d, n), dtypes=NUMBERS)
    expect("state", state, u.device, (b, d, n), dtypes=NUMBERS)
    check_written("state", state)
    expect("u", u, u.device, (b, d))
    expect("delta", delta, u.device, (b, d), (d,))
    expect("z", z, u.device, (b, d))
    expect("D", D, u.device, (d,))
    expect("delta_bias", delta_bias, u.device, (d,))
    check_discretization(discretization)
    for name, matrix in (("B", B), ("C", C)):
        expect(name, matrix, u.device, (b, None, n), (1, None, n), dtypes=NUMBERS)
        if d % matrix.shape[1]:
            raise ValueError(f"{name} has {matrix.shape[1]} groups, which do not divide d = {d} channels")
        if matrix.is_complex() != A.is_complex():
            raise ValueError(
                f"{name} must be {'complex' if A.is_complex() else 'real'}, as A is, not {matrix.dtype}"
            )
