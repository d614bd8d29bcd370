"""Root mean square normalisation, fused with the addition to the residual stream before it and a gate.

s = x + residual,   y = (s silu(gate)) / rms(s silu(gate)) * weight        (Zhang and Sennrich, 1910.07467, eq. 4)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend as backends
from . import reference
from .checks import check_tensor, expect
from .operators import Operator


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
    check_tensor("x", x)
    if x.ndim == 0:
        raise ValueError("x must be (..., d), not ()")
    expect("weight", weight, x.device, (x.shape[-1],))
    expect("residual", residual, x.device, tuple(x.shape))
    expect("gate", gate, x.device, tuple(x.shape))
    # of nothing the reference alone makes nothing without further care
    name = backends.choose("reference" if x.numel() == 0 else backend, x, weight, residual, gate)
    if name == "reference":
        return reference.rms_norm(x, weight, residual=residual, gate=gate, eps=eps)
    y, stream = _norm(x, weight, residual, gate, eps, name)
    return y, stream


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from . import norm_triton

        return norm_triton.norm_fwd(x, weight, residual, gate, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    stream = x.to(dtype, copy=True) if residual is None else x.to(dtype) + residual.to(dtype)
    gated = stream if gate is None else stream * F.silu(gate.to(dtype))
    y = F.rms_norm(gated, weight.shape, weight.to(dtype), eps)
    return y.to(x.dtype).contiguous(), stream.contiguous()


def _gradients(
    dy: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    wants_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x in dy's dtype, of the residual in float32, of weight and of gate; empty where unwanted."""
    if backend == "triton":
        from . import norm_triton

        return norm_triton.norm_bwd(dy, d_stream, stream, weight, gate, eps, wants_residual)
    dtype = torch.promote_types(stream.dtype, torch.float32)
    wide = None if gate is None else gate.to(dtype)
    gated = stream.to(dtype) if wide is None else stream * F.silu(wide)
    inverse = _inverse_rms(gated, eps)
    normed, grad = gated * inverse, dy.to(dtype)
    d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
    grad = grad * weight
    grad = inverse * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    d_gate = dy.new_empty(0)
    if gate is not None and wide is not None:
        d_gate = torch.ops.aten.silu_backward(grad * stream, wide).to(gate.dtype).contiguous()
        grad = grad * F.silu(wide)
    grad = (grad if d_stream is None else grad + d_stream).contiguous()
    # an operator may not return a tensor twice
    dx = grad.to(dy.dtype, copy=wants_residual)
    return dx, grad if wants_residual else dy.new_empty(0), d_weight, d_gate


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _fake(x, weight, residual, gate, eps, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape, dtype=dtype)


def _gradients_fake(dy, d_stream, stream, weight, gate, eps, wants_residual, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(stream.dtype, torch.float32)
    return (
        torch.empty_like(dy, memory_format=torch.contiguous_format),
        dy.new_empty(dy.shape, dtype=dtype) if wants_residual else dy.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        dy.new_empty(0) if gate is None else dy.new_empty(dy.shape, dtype=gate.dtype),
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, residual, gate, ctx.eps, ctx.backend = inputs
    ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
    # x alone is the stream, and may be narrower
    ctx.save_for_backward(x if residual is None else output[1], weight, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_stream):  # type: ignore[no-untyped-def]
    stream, weight, gate = ctx.saved_tensors
    x, residual = ctx.dtypes
    dy = torch.zeros_like(stream, dtype=x) if dy is None else dy
    # one tensor serves both x and the residual where their dtypes agree
    wants_residual = residual not in (None, x)
    dx, d_residual, d_weight, d_gate = _norm_backward(
        dy, d_stream, stream, weight, gate, ctx.eps, wants_residual, ctx.backend
    )
    if residual is not None:
        d_residual = d_residual.to(residual) if wants_residual else dx
    return (
        dx,
        d_weight,
        None if residual is None else d_residual,
        None if gate is None else d_gate,
        None,
        None,
    )


_norm = Operator("rms_norm", _forward, _fake, (_save_for_backward, _backward))
_norm_backward = Operator("rms_norm_backward", _gradients, _gradients_fake)
