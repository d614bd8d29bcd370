"""Root mean square normalisation, fused with the addition to the residual stream before it and a gate.

s = x + residual,   y = (s silu(gate)) / rms(s silu(gate)) * weight        (Zhang and Sennrich, 1910.07467, eq. 4)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x (..., d) to the residual stream and normalise; return y (..., d) in x's dtype and the stream.

    The stream is x + residual, or x alone, in float32 (float64 for float64 x), so that no block rounds it.
    weight is (d,); gate (..., d) multiplies the stream by silu(gate) before the norm, as Mamba-2 does.

    Raises:
        ValueError: when shapes do not fit; the message names the argument.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be (d,) = ({x.shape[-1]},), not {tuple(weight.shape)}")
    for name, other in (("residual", residual), ("gate", gate)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, not {tuple(other.shape)}")
    if backends.choose(x.device, backend) == "reference":
        return reference.rms_norm(x, weight, residual=residual, gate=gate, eps=eps)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _norm_op(x, weight, residual, gate, eps)
    # without a gradient to register, a call of the function itself costs less
    return _norm(x, weight, residual, gate, eps)


def _norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    stream = x.to(dtype, copy=True) if residual is None else x.to(dtype) + residual
    gated = stream if gate is None else stream * F.silu(gate.to(dtype))
    y = F.rms_norm(gated, weight.shape, weight.to(dtype), eps)
    return y.to(x.dtype).contiguous(), stream.contiguous()


_norm_op = torch.library.custom_op("mambazoo::rms_norm", _norm, mutates_args=())


@torch.library.custom_op("mambazoo::rms_norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, d_stream: Tensor | None, stream: Tensor, weight: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the stream, the weight and the gate (empty without one)."""
    wide = None if gate is None else gate.to(stream.dtype)
    gated = stream if wide is None else stream * F.silu(wide)
    inverse = _inverse_rms(gated, eps)
    normed, dy = gated * inverse, dy.to(stream.dtype)
    d_weight = (dy * normed).flatten(0, -2).sum(0)
    dy = dy * weight
    d_gated = inverse * (dy - normed * (dy * normed).mean(-1, keepdim=True))
    d_gate = stream.new_empty(0)
    if wide is not None:
        d_gate = torch.ops.aten.silu_backward(d_gated * stream, wide)
        d_gated = d_gated * F.silu(wide)
    d_stream = d_gated if d_stream is None else d_gated + d_stream
    return d_stream.contiguous(), d_weight.to(weight.dtype), d_gate.contiguous()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@_norm_op.register_fake
def _norm_fake(x, weight, residual, gate, eps):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape, dtype=dtype)


@_norm_backward.register_fake
def _norm_backward_fake(dy, d_stream, stream, weight, gate, eps):  # type: ignore[no-untyped-def]
    d_gate = stream.new_empty(0 if gate is None else stream.shape)
    return torch.empty_like(stream), torch.empty_like(weight), d_gate


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, residual, gate, ctx.eps = inputs
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype, None if gate is None else gate.dtype)
    ctx.save_for_backward(output[1], weight, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_stream):  # type: ignore[no-untyped-def]
    stream, weight, gate = ctx.saved_tensors
    dy = torch.zeros_like(stream) if dy is None else dy
    d_stream, d_weight, d_gate = _norm_backward(dy, d_stream, stream, weight, gate, ctx.eps)
    x, residual, gated = ctx.dtypes
    return (
        d_stream.to(x),
        d_weight,
        None if residual is None else d_stream.to(residual),
        None if gated is None else d_gate.to(gated),
        None,
    )


_norm_op.register_autograd(_backward, setup_context=_save_for_backward)
