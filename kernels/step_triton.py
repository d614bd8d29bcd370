"""The one-token update in Triton: one launch, the state read and written once.

    h <- exp(delta A) h + gain B u,   y = C . h + D u        (Mamba, equation 2)

A program takes some channels of one sequence with all their states, which lie side by side in memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend as backends
from .integers import cdiv, next_power_of_2
from .triton_math import LOG2E, expm1_over, silu, softplus


@triton.jit
def _matrix(ptr, channel, state, exists, group, column, SPAN: tl.constexpr, D: tl.constexpr):
    """B or C for each channel and state (BLOCK_D, BLOCK_N), of which SPAN channels share a row."""
    # a whole tile is read in either case, so that it is laid out as the state is
    row = channel * 0 if SPAN == D else channel // SPAN * group
    return tl.load(ptr + row + state * column, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _update_kernel(
    state_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr,
    state_batch, state_channel, state_column, u_batch, u_channel, delta_batch, delta_channel, z_batch, z_channel,
    A_channel, A_column, B_batch, B_group, B_column, C_batch, C_group, C_column,
    D: tl.constexpr, N: tl.constexpr, B_SPAN: tl.constexpr, C_SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ZOH: tl.constexpr,
):  # fmt: skip
    """Move BLOCK_D channels of a sequence on by a token."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = channel < D
    # a lane takes 16 bytes of float32, so that one layout serves narrower tensors too
    rows, states = channel[:, None], tl.max_contiguous(tl.arange(0, BLOCK_N), min(BLOCK_N, 4))[None, :]
    exists = real[:, None] & (states < N)

    h_ptr = state_ptr + batch * state_batch + rows * state_channel + states * state_column
    h = tl.load(h_ptr, mask=exists, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + rows * A_channel + states * A_column, mask=exists, other=0.0).to(tl.float32)
    B = _matrix(B_ptr + batch * B_batch, rows, states, exists, B_group, B_column, B_SPAN, D)
    C = _matrix(C_ptr + batch * C_batch, rows, states, exists, C_group, C_column, C_SPAN, D)
    u = tl.load(u_ptr + batch * u_batch + channel * u_channel, mask=real, other=0.0).to(tl.float32)
    delta_ptr += batch * delta_batch + channel * delta_channel
    delta = tl.load(delta_ptr, mask=real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)

    x = delta[:, None] * A
    decay = tl.exp2(x * LOG2E)
    gained = (delta * u)[:, None]
    if ZOH:
        gained *= expm1_over(x, decay)
    h = decay * h + gained * B
    tl.store(h_ptr, h.to(state_ptr.dtype.element_ty), mask=exists)
    y = tl.sum(h * C, 1)
    if HAS_D:
        y += tl.load(D_ptr + channel, mask=real, other=0.0).to(tl.float32) * u
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_batch + channel * z_channel, mask=real, other=0.0).to(tl.float32)
        y *= silu(z)
    tl.store(y_ptr + batch * D + channel, y.to(y_ptr.dtype.element_ty), mask=real)


def update(
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
    """Advance state (b, d, n) in place and return y (b, d); B and C are (b, g, n) or (1, g, n)."""
    b, d, n = state.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    # what is absent is not read: another tensor stands in for its pointer
    skip, bias = (u if vector is None else vector.contiguous() for vector in (D, delta_bias))
    gate = u if z is None else z
    block_n = next_power_of_2(n)
    block_d = max(512 // block_n, 1)
    with backends.launching_on(u):
        _update_kernel[(b * cdiv(d, block_d),)](
            state, u, delta, A, B, C, skip, gate, bias, y,
            *state.stride(), *u.stride(), *_strides(delta, 2), *gate.stride(), *A.stride(),
            *_strides(B, 3), *_strides(C, 3),
            D=d, N=n, B_SPAN=d // B.shape[1], C_SPAN=d // C.shape[1], BLOCK_D=block_d, BLOCK_N=block_n,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            ZOH=discretization == "zoh", num_warps=2,
        )  # fmt: skip
    return y


def _strides(x: Tensor, ndim: int) -> tuple[int, ...]:
    """The strides of x with a batch dimension, 0 along it where every sequence has the same."""
    if x.ndim < ndim:
        return 0, *x.stride()
    return (0 if x.shape[0] == 1 else x.stride(0)), *x.stride()[1:]
