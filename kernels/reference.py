"""The truth every kernel is tested against: each operator in a few lines of plain PyTorch.

Letters are the paper's: b batch, l length, d channels, n state, g groups of channels, k convolution width.
Whatever has a time axis is channel-last, (b, l, ...). Arithmetic is at least float32 and follows its inputs
to float64 and complex. Nothing here is ever made faster.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def hold(delta: Tensor, A: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Return the decay and the gain of x in h' = A h + x over a step delta, by Euler's rule or exactly (equation 4)."""
    x = delta * A
    if discretization == "euler":
        return torch.exp(x), delta.to(x.dtype).expand_as(x)
    near_zero = x.abs() < 1e-2
    # expm1(x) / x loses its digits near zero; there six terms of its series hold to double precision
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    quotient = torch.expm1(x) / torch.where(near_zero, torch.ones_like(x), x)
    return torch.exp(x), delta * torch.where(near_zero, series, quotient)


def _each_channel(matrix: Tensor, b: int, l: int, d: int) -> Tensor:
    """Spread B or C, constant (d, n), selective (b, l, n) or grouped (b, l, g, n), to (b, l, d, n)."""
    if matrix.ndim == 2:
        return matrix.expand(b, l, d, -1)
    grouped = matrix.unsqueeze(2) if matrix.ndim == 3 else matrix
    return grouped.repeat_interleave(d // grouped.shape[2], dim=2).expand(b, l, d, -1)


def selective_scan(
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
    B_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "euler",
) -> tuple[Tensor, Tensor]:
    """Scan u (b, l, d) one step after the other; return y (b, l, d) and the last state (b, d, n).

    h_t = decay_t h_{t-1} + gain_t B_t u_t,  y_t = C_t . h_t + D u_t,  gated by silu(z_t)  (Mamba, algorithm
    2).
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        moving = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
        parts = []
        for i, (start, end) in enumerate(pairwise(bounds)):
            own = {name: x[:, start:end] if x is not None and x.ndim > 2 else x for name, x in moving.items()}
            part = selective_scan(
                **own,  # type: ignore[arg-type]
                A=A,
                B_bias=B_bias,
                D=D,
                delta_bias=delta_bias,
                delta_softplus=delta_softplus,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                reverse=reverse,
                discretization=discretization,
            )
            parts.append(part)
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([h for _, h in parts])

    dtype = torch.promote_types(u.dtype, torch.float32)
    state_dtype = torch.promote_types(A.dtype, dtype)
    b, l, d = u.shape
    step = delta.to(dtype).expand(b, l, d)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    x, A = u.to(dtype), A.to(state_dtype)
    B, C = (_each_channel(matrix.to(state_dtype), b, l, d) for matrix in (B, C))
    if B_bias is not None:
        B = B + B_bias.to(state_dtype)
    h = A.new_zeros(b, *A.shape) if initial_state is None else initial_state.to(state_dtype)
    rows = {}
    for t in reversed(range(l)) if reverse else range(l):
        decay, gain = hold(step[:, t, :, None], A, discretization)
        h = decay * h + gain * B[:, t] * x[:, t, :, None]
        row = (C[:, t] * h).sum(-1)
        rows[t] = 2 * row.real if row.is_complex() else row
    y = torch.stack([rows[t] for t in range(l)], dim=1) if l else x
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


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
) -> tuple[Tensor, Tensor]:
    """Advance state (b, d, n) by one token u (b, d); return y (b, d) and the new state: a scan of length one."""
    u, B, C = u.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
    delta = delta if delta.ndim == 1 else delta.unsqueeze(1)
    z = None if z is None else z.unsqueeze(1)
    y, state = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        delta_softplus,
        initial_state=state,
        discretization=discretization,
    )
    return y.squeeze(1), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel of x (b, l, d) with its weight (d, k); return y (b, l, d) and the last k - 1 inputs."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            causal_conv1d(
                x[:, start:end],
                weight,
                bias,
                activation=activation,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
            )
            for i, (start, end) in enumerate(pairwise(bounds))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([state for _, state in parts])
    dtype = torch.promote_types(x.dtype, torch.float32)
    (b, l, d), k = x.shape, weight.shape[1]
    past = x.new_zeros(b, k - 1, d) if initial_state is None else initial_state
    padded = torch.cat([past.to(x.dtype), x], dim=1)
    y = sum(
        (weight[:, i].to(dtype) * padded[:, i : i + l].to(dtype) for i in range(k)),
        start=x.new_zeros((), dtype=dtype),
    )
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), padded[:, l:]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Add x (..., d) to the residual stream and normalise the sum; return it, in x's dtype, and the sum, unrounded."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    stream = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    gated = stream if gate is None else stream * F.silu(gate.to(dtype))
    y = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return y.to(x.dtype), stream


def linear_cross_entropy(
    y: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Read y (..., d) out by weight (v, d); return the losses of targets (...), summed and each."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    log_p = (y.to(dtype) @ weight[:vocab_size].to(dtype).T).log_softmax(-1)
    used = targets != ignore_index
    losses = -log_p.gather(-1, targets.where(used, 0).unsqueeze(-1)).squeeze(-1) * used
    return (losses if token_weights is None else losses * token_weights).sum(), losses
