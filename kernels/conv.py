"""The causal depthwise convolution before the scan, with its activation.

    y_t = act(bias + sum_j weight_{k-1-j} x_{t-j}),   j = 0 .. k - 1        (Mamba, figure 3)

The inputs before the first step, k - 1 of them, are its state: zeros, or what an earlier part left behind.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import backend as backends
from . import conv_torch, reference
from .checks import check_tensor, check_written, count_sequences, expect
from .operators import Operator

# the widths that conv_triton is written for; the others go to the torch back end
_TRITON_WIDTHS = (2, 3, 4)


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
    states, k = count_sequences(cu_seqlens, x), weight.shape[1]
    expect("initial_state", initial_state, x.device, (states, k - 1, x.shape[2]))
    # of nothing the reference alone makes nothing without further care
    name = _choose("reference" if x.numel() == 0 else backend, x, weight, bias, initial_state)
    if name == "reference":
        y, final_state = reference.causal_conv1d(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens
        )
    else:
        y, final_state = _conv(
            x, weight, bias, initial_state, cu_seqlens, activation == "silu", return_final_state, name
        )
    return y, final_state if return_final_state else None


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve one token x (b, d) with the k - 1 before it, state (b, k - 1, d), moved on in place; return y (b, d).

    It has no gradient.
    """
    check_tensor("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must be (b, d), not {tuple(x.shape)}")
    _check(x.unsqueeze(1), weight, bias, activation)
    expect("state", state, x.device, (x.shape[0], weight.shape[1] - 1, x.shape[1]))
    check_written("state", state)
    name = _choose(backend, x, weight, bias, state)
    if name == "reference":
        y, new_state = reference.causal_conv1d(
            x.unsqueeze(1), weight, bias, activation=activation, initial_state=state
        )
        state.copy_(new_state)
        return y.squeeze(1)
    # an operator is what compilers and exporters need to see; a call of the function itself costs less
    update = _conv_update_op if torch.compiler.is_compiling() else _conv_update
    return update(x, state, weight, bias, activation == "silu", name)


def _choose(requested: str | None, x: Tensor, weight: Tensor, *others: Tensor | None) -> str:
    name = backends.choose(requested, x, weight, *others)
    return "torch" if name == "triton" and weight.shape[1] not in _TRITON_WIDTHS else name


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        # the package triton is there on Linux alone
        from . import conv_triton

        return conv_triton
    return conv_torch


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, final_state = _implementation(backend).conv_fwd(
            x, weight, bias, initial_state, cu_seqlens, silu, return_final_state
        )
    return y, x.new_empty(0) if final_state is None else final_state


def _gradients(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state; an empty tensor where there was none."""
    dx, d_weight, d_bias, d_initial = _implementation(backend).conv_bwd(
        dy, d_final, x, weight, bias, initial_state, cu_seqlens, silu
    )
    d_bias, d_initial = (x.new_empty(0) if gradient is None else gradient for gradient in (d_bias, d_initial))
    return dx, d_weight, d_bias, d_initial


@torch.no_grad()
def _conv_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str
) -> Tensor:
    return _implementation(backend).conv_update(x, state, weight, bias, silu)


_conv_update_op = torch.library.custom_op(
    "mambazoo::causal_conv1d_update", _conv_update, mutates_args=("state",)
)


def _fake(x, weight, bias, initial_state, cu_seqlens, silu, return_final_state, backend):  # type: ignore[no-untyped-def]
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (states, weight.shape[1] - 1, x.shape[2]) if return_final_state else (0,)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(shape)


def _gradients_fake(dy, d_final, x, weight, bias, initial_state, *rest):  # type: ignore[no-untyped-def]
    return tuple(
        x.new_empty(0) if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (x, weight, bias, initial_state)
    )


@_conv_update_op.register_fake
def _conv_update_fake(x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.silu, ctx.returned_final_state, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_final):  # type: ignore[no-untyped-def]
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, d_weight, d_bias, d_initial = _conv_backward(
        torch.zeros_like(x) if dy is None else dy,
        d_final if ctx.returned_final_state else None,
        x, weight, bias, initial_state, cu_seqlens, ctx.silu, ctx.backend,
    )  # fmt: skip
    d_bias = None if bias is None else d_bias
    d_initial = None if initial_state is None else d_initial
    return dx, d_weight, d_bias, d_initial, None, None, None, None


_conv = Operator("causal_conv1d", _forward, _fake, (_save_for_backward, _backward))
_conv_backward = Operator("causal_conv1d_backward", _gradients, _gradients_fake)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight)
    if x.ndim != 3:
        raise ValueError(f"x must be (b, l, d), not {tuple(x.shape)}")
    d = x.shape[2]
    if weight.ndim != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ValueError(f"weight must be (d, k) = ({d}, k), not {tuple(weight.shape)}")
    expect("weight", weight, x.device, tuple(weight.shape))
    expect("bias", bias, x.device, (d,))
    if activation not in (None, "silu"):
        raise ValueError(f'activation must be None or "silu", not {activation!r}')
