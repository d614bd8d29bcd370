"""The causal depthwise convolution before the scan, with its activation.

    y_t = act(bias + sum_j weight_{k-1-j} x_{t-j}),   j = 0 .. k - 1        (Mamba, figure 3)

The inputs before the first step, k - 1 of them, are its state: zeros, or what an earlier part left behind.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve x (b, l, d) along l, channel by channel; return y (b, l, d) and, when asked for, the last inputs.

    weight is (d, k), bias (d,), activation None or "silu". States are the k - 1 inputs before a step, (b, k -
    1, d), in x's dtype and differentiable. With cu_seqlens, int32 (s + 1,) beside b = 1, sequence i fills
    [cu_seqlens[i], cu_seqlens[i + 1]), sees only itself, and states are (s, k - 1, d).

    Raises:
        ValueError: when shapes do not fit; the message names the argument.
    """
    _check(x, weight, bias, activation)
    k = weight.shape[1]
    states = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape != (states, k - 1, x.shape[2]):
        raise ValueError(
            f"initial_state must be ({states}, {k - 1}, {x.shape[2]}), the k - 1 inputs before each sequence, "
            f"not {tuple(initial_state.shape)}"
        )
    if backends.choose(x.device, backend) == "reference":
        y, final_state = reference.causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
        return y, final_state if return_final_state else None
    y = _conv(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    return y, _last_inputs(x, k - 1, initial_state, cu_seqlens) if return_final_state else None


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve one token x (b, d) with the k - 1 before it, state (b, k - 1, d), moved on in place; return y (b, d)."""
    _check(x.unsqueeze(1), weight, bias, activation)
    if state.shape != (x.shape[0], weight.shape[1] - 1, x.shape[1]):
        raise ValueError(f"state must be (b, k - 1, d), not {tuple(state.shape)} beside x {tuple(x.shape)}")
    if backends.choose(x.device, backend) == "reference":
        y, new_state = reference.causal_conv1d(
            x.unsqueeze(1), weight, bias, activation=activation, initial_state=state
        )
        state.copy_(new_state)
        return y.squeeze(1)
    # an operator is what compilers and exporters need to see; a call of the function itself costs less
    update = _conv_update_op if torch.compiler.is_compiling() else _conv_update
    return update(x, state, weight, bias, activation == "silu")


def _last_inputs(x: Tensor, count: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `count` inputs of every sequence (s, count, d), reaching into its initial state where it is shorter."""
    if cu_seqlens is None:
        past = (
            x.new_zeros(x.shape[0], count, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
        )
        return torch.cat([past, x[:, max(0, x.shape[1] - count) :]], dim=1)[:, -count:] if count else past
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    where = ends[:, None] - count + torch.arange(count, device=x.device)
    inside = (where >= starts[:, None]).unsqueeze(-1)
    inputs = x[0, where.clamp(min=0)]
    if initial_state is None:
        return inputs * inside
    before = (where - starts[:, None] + count).clamp(0, max(0, count - 1))
    past = initial_state.to(x.dtype).gather(1, before.unsqueeze(-1).expand_as(inputs))
    return torch.where(inside, inputs, past)


@torch.library.custom_op("mambazoo::causal_conv1d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    y = _convolve(x, weight, bias, initial_state, cu_seqlens)
    return (F.silu(y, inplace=True) if silu else y).to(x.dtype)


@torch.library.custom_op("mambazoo::causal_conv1d_backward", mutates_args=())
def _conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state; an empty tensor where there was none."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, wide, taps = weight.shape[1], x.to(dtype), weight.to(dtype)
    grad = dy.to(dtype)
    if silu:
        grad = torch.ops.aten.silu_backward(grad, _convolve(x, weight, bias, initial_state, cu_seqlens))
    dx = grad * taps[:, -1]
    d_taps = [(grad * wide).sum((0, 1))]
    within = _position_within(x, cu_seqlens)
    for j in range(1, k):
        later = grad[:, j:] if within is None else grad[:, j:] * (within[j:, None] >= j)
        dx[:, : later.shape[1]].addcmul_(later, taps[:, -1 - j])
        d_taps.append((later * wide[:, : later.shape[1]]).sum((0, 1)))
    d_weight = torch.stack(d_taps[::-1], dim=1)
    d_initial = x.new_empty(0)
    if initial_state is not None:
        past = initial_state.to(dtype)
        where, inside = _first_steps(x, k - 1, cu_seqlens)
        edge = grad.flatten(0, 1)[where] * inside
        d_initial = torch.zeros_like(past)
        for step in range(k - 1):
            for i in range(step, k - 1):
                d_initial[:, i].addcmul_(edge[:, step], taps[:, i - step])
                d_weight[:, i - step] += (edge[:, step] * past[:, i]).sum(0)
        d_initial = d_initial.to(initial_state.dtype)
    d_bias = x.new_empty(0) if bias is None else grad.sum((0, 1)).to(bias.dtype)
    return dx.to(x.dtype), d_weight.to(weight.dtype), d_bias, d_initial


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The convolution before its activation, at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    k, wide, taps = weight.shape[1], x.to(dtype), weight.to(dtype)
    y = wide * taps[:, -1] if bias is None else torch.addcmul(bias.to(dtype), wide, taps[:, -1])
    within = _position_within(x, cu_seqlens)
    for j in range(1, min(k, x.shape[1])):
        earlier = wide[:, :-j]
        if within is not None:
            earlier = earlier * (within[j:, None] >= j)
        y[:, j:].addcmul_(earlier, taps[:, -1 - j])
    if initial_state is not None:
        past = initial_state.to(dtype)
        edge = torch.zeros_like(past)
        for step in range(k - 1):
            for i in range(step, k - 1):
                edge[:, step].addcmul_(past[:, i], taps[:, i - step])
        where, inside = _first_steps(x, k - 1, cu_seqlens)
        y.flatten(0, 1).index_add_(0, where.flatten(), (edge * inside).flatten(0, 1))
    return y


def _position_within(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """How far each step of packed sequences is from the start of its own (l,)."""
    if cu_seqlens is None:
        return None
    t = torch.arange(x.shape[1], device=x.device)
    return t - cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1]


def _first_steps(x: Tensor, count: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the first steps of each sequence are in x as (b l, d), (s, count), and which exist (s, count, 1)."""
    b, l, _ = x.shape
    bounds = torch.arange(b + 1, device=x.device) * l if cu_seqlens is None else cu_seqlens.long()
    where = bounds[:-1, None] + torch.arange(count, device=x.device)
    return where.clamp(max=b * l - 1), (where < bounds[1:, None]).unsqueeze(-1)


@torch.no_grad()
def _conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x.to(state.dtype).unsqueeze(1)], dim=1)
    state.copy_(window[:, 1:])
    y = (window.to(dtype) * weight.to(dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


_conv_update_op = torch.library.custom_op(
    "mambazoo::causal_conv1d_update", _conv_update, mutates_args=("state",)
)


@_conv.register_fake
def _conv_fake(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_conv_backward.register_fake
def _conv_backward_fake(dy, x, weight, bias, initial_state, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (x, weight, bias, initial_state)
    )


@_conv_update_op.register_fake
def _conv_update_fake(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, d_weight, d_bias, d_initial = _conv_backward(dy, x, weight, bias, initial_state, cu_seqlens, ctx.silu)
    return (
        dx,
        d_weight,
        None if bias is None else d_bias,
        None if initial_state is None else d_initial,
        None,
        None,
    )


_conv.register_autograd(_backward, setup_context=_save_for_backward)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    d = x.shape[-1]
    if x.ndim != 3:
        raise ValueError(f"x must be (b, l, d), not {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[0] != d:
        raise ValueError(f"weight must be (d, k) = ({d}, k), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != (d,):
        raise ValueError(f"bias must be (d,) = ({d},), not {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", not {activation!r}')
