"""The causal depthwise convolution in PyTorch operations: one pass over the input for each tap.

    y_t = act(bias + sum_j weight_{k-1-j} x_{t-j}),   j = 0 .. k - 1        (Mamba, figure 3)

The taps that reach before the first step of a sequence are added from its initial state afterwards, so that the
passes over the input need no padded copy of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y (b, l, d) and, when asked for, the last k - 1 inputs of every sequence, both in x's dtype."""
    y = _convolve(x, weight, bias, initial_state, cu_seqlens)
    y = (F.silu(y, inplace=True) if silu else y).to(x.dtype)
    return y, _last_inputs(x, weight.shape[1] - 1, initial_state, cu_seqlens) if return_final_state else None


def conv_bwd(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state, each in its dtype; None where there was none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, wide, taps = weight.shape[1], x.to(dtype), weight.to(dtype)
    grad = dy.to(dtype)
    if silu:
        grad = torch.ops.aten.silu_backward(grad, _convolve(x, weight, bias, initial_state, cu_seqlens))
    dx = (grad * taps[:, -1]).contiguous()
    d_taps = [(grad * wide).sum((0, 1))]
    within = _position_within(x, cu_seqlens)
    for j in range(1, k):
        later = grad[:, j:] if within is None else grad[:, j:] * (within[j:, None] >= j)
        dx[:, : later.shape[1]].addcmul_(later, taps[:, -1 - j])
        d_taps.append((later * wide[:, : later.shape[1]]).sum((0, 1)))
    d_weight = torch.stack(d_taps[::-1], dim=1)
    d_initial = None
    if initial_state is not None:
        past = initial_state.to(x.dtype).to(dtype)
        where, inside = _first_steps(x, k - 1, cu_seqlens)
        edge = grad.flatten(0, 1)[where] * inside
        d_initial = torch.zeros_like(past)
        for step in range(k - 1):
            for i in range(step, k - 1):
                d_initial[:, i].addcmul_(edge[:, step], taps[:, i - step])
                d_weight[:, i - step] += (edge[:, step] * past[:, i]).sum(0)
    if d_final is not None:
        _add_to_last_inputs(dx, d_initial, d_final.to(dtype), cu_seqlens)
    return (
        dx.to(x.dtype),
        d_weight.to(weight.dtype),
        None if bias is None else grad.sum((0, 1)).to(bias.dtype),
        None if d_initial is None or initial_state is None else d_initial.to(initial_state.dtype),
    )


def conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve one token x (b, d) with the k - 1 before it, state (b, k - 1, d), moved on in place; return y (b, d)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state.to(dtype), x.to(dtype).unsqueeze(1)], dim=1)
    state.copy_(window[:, 1:])
    y = (window * weight.to(dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The convolution before its activation, at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, wide, taps = weight.shape[1], x.to(dtype), weight.to(dtype)
    y = wide * taps[:, -1] if bias is None else torch.addcmul(bias.to(dtype), wide, taps[:, -1])
    y = y.contiguous()
    within = _position_within(x, cu_seqlens)
    for j in range(1, min(k, x.shape[1])):
        earlier = wide[:, :-j]
        if within is not None:
            earlier = earlier * (within[j:, None] >= j)
        y[:, j:].addcmul_(earlier, taps[:, -1 - j])
    if initial_state is not None:
        past = initial_state.to(x.dtype).to(dtype)
        edge = torch.zeros_like(past)
        for step in range(k - 1):
            for i in range(step, k - 1):
                edge[:, step].addcmul_(past[:, i], taps[:, i - step])
        where, inside = _first_steps(x, k - 1, cu_seqlens)
        y.flatten(0, 1).index_add_(0, where.flatten(), (edge * inside).flatten(0, 1))
    return y


def _last_inputs(x: Tensor, count: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `count` inputs of every sequence (s, count, d), reaching into its initial state where it is shorter."""
    if cu_seqlens is None:
        past = (
            x.new_zeros(x.shape[0], count, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
        )
        recent = torch.cat([past, x[:, max(0, x.shape[1] - count) :]], dim=1)
        return recent[:, recent.shape[1] - count :].contiguous()
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    where = ends[:, None] - count + torch.arange(count, device=x.device)
    inside = (where >= starts[:, None]).unsqueeze(-1)
    inputs = x[0, where.clamp(min=0)]
    if initial_state is None:
        return inputs * inside
    before = (where - starts[:, None] + count).clamp(0, max(0, count - 1))
    past = initial_state.to(x.dtype).gather(1, before.unsqueeze(-1).expand_as(inputs))
    return torch.where(inside, inputs, past)


def _add_to_last_inputs(
    dx: Tensor, d_initial: Tensor | None, d_final: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Add the gradient of `_last_inputs` (s, count, d) to the gradients of what it was taken from, in place."""
    bounds, count = _bounds(dx, cu_seqlens), d_final.shape[1]
    where = bounds[1:, None] - count + torch.arange(count, device=dx.device)
    inside = (where >= bounds[:-1, None]).unsqueeze(-1)
    dx.flatten(0, 1).index_add_(0, where.clamp(min=0).flatten(), (d_final * inside).flatten(0, 1))
    if d_initial is not None:
        lengths = bounds.diff()[:, None, None]
        for length in range(count):
            d_initial[:, length:] += d_final[:, : count - length] * (lengths == length)


def _position_within(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """How far each step of packed sequences is from the start of its own (l,)."""
    if cu_seqlens is None:
        return None
    t = torch.arange(x.shape[1], device=x.device)
    return t - cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1]


def _first_steps(x: Tensor, count: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the first steps of each sequence are in x as (b l, d), (s, count), and which exist (s, count, 1)."""
    bounds = _bounds(x, cu_seqlens)
    where = bounds[:-1, None] + torch.arange(count, device=x.device)
    return where.clamp(max=x.shape[0] * x.shape[1] - 1), (where < bounds[1:, None]).unsqueeze(-1)


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where sequences start, and the last one ends, in x as (b l, d): (s + 1,), int64."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    return torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
