"""The fused norm in Triton: whole rows in registers, each tensor read or written once, forward and backward.

With g = s silu(gate), r = 1 / rms(g) and e = dy weight, the gradient of y = g r weight is

    dg = r (e - g r^2 mean(e g)),   d_weight = sum over rows of dy g r.

The backward finds r again from the row rather than from memory. A fixed number of programs walk over the rows, each
with a sum of d_weight of its own: no atomics, and so the same result to the bit from run to run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend as backends
from .integers import cdiv, next_power_of_2
from .triton_math import sigmoid


@triton.jit
def _tile(first, rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows from `first` on (ROWS, 1), the columns (1, BLOCK_D), and which of both exist (ROWS, BLOCK_D)."""
    row = (first + tl.arange(0, ROWS))[:, None]
    # four columns a lane are 16 bytes of float32, so that one layout serves every tensor of the row
    column = tl.max_contiguous(tl.arange(0, BLOCK_D), 4)[None, :]
    return row, column, (row < rows) & (column < D)


@triton.jit(do_not_specialize=["rows"])
def _norm_fwd_kernel(
    x_ptr, weight_ptr, residual_ptr, gate_ptr, y_ptr, stream_ptr, rows, x_row, residual_row, gate_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Write the stream and its norm of ROWS rows."""
    row, column, exists = _tile(tl.program_id(0).to(tl.int64) * ROWS, rows, D, ROWS, BLOCK_D)
    stream = tl.load(x_ptr + row * x_row + column, mask=exists, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        stream += tl.load(residual_ptr + row * residual_row + column, mask=exists, other=0.0).to(tl.float32)
    gated = stream
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gate_row + column, mask=exists, other=0.0).to(tl.float32)
        gated *= gate * sigmoid(gate)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(stream_ptr + row * D + column, stream, mask=exists)
    inverse = tl.rsqrt(tl.sum(gated * gated, 1) / D + eps)[:, None]
    y = gated * inverse * weight
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_kernel(
    dy_ptr, d_stream_ptr, stream_ptr, weight_ptr, gate_ptr, dx_ptr, d_residual_ptr, d_gate_ptr, d_weight_ptr,
    rows, dy_row, d_stream_row, stream_row, gate_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_D_STREAM: tl.constexpr,
    HAS_D_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of every `programs`-th tile of rows, and the sum of d_weight over them."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    d_weight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(tl.cdiv(tl.cdiv(rows, ROWS), programs)):
        row, column, exists = _tile((i * programs + program).to(tl.int64) * ROWS, rows, D, ROWS, BLOCK_D)
        stream = tl.load(stream_ptr + row * stream_row + column, mask=exists, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + column, mask=exists, other=0.0).to(tl.float32)
        gated = stream
        if HAS_GATE:
            gate = tl.load(gate_ptr + row * gate_row + column, mask=exists, other=0.0).to(tl.float32)
            slope = sigmoid(gate)
            silu = gate * slope
            gated *= silu
            # the derivative of the product by the gate
            by_gate = stream * (slope + silu * (1.0 - slope))
        # the two sums do not wait for one another
        squares = tl.sum(gated * gated, 1)[:, None]
        along = tl.sum(dy * weight * gated, 1)[:, None]
        inverse = tl.rsqrt(squares / D + eps)
        d_weight += dy * gated * inverse
        grad = inverse * (dy * weight - gated * (inverse * inverse * along / D))
        if HAS_GATE:
            d_gate = (grad * by_gate).to(d_gate_ptr.dtype.element_ty)
            tl.store(d_gate_ptr + row * D + column, d_gate, mask=exists)
            grad *= silu
        if HAS_D_STREAM:
            grad += tl.load(d_stream_ptr + row * d_stream_row + column, mask=exists, other=0.0)
        tl.store(dx_ptr + row * D + column, grad.to(dx_ptr.dtype.element_ty), mask=exists)
        if HAS_D_RESIDUAL:
            tl.store(d_residual_ptr + row * D + column, grad, mask=exists)
    total = tl.sum(d_weight, 0)[None, :]
    _, column, _ = _tile(0, rows, D, ROWS, BLOCK_D)
    tl.store(d_weight_ptr + program.to(tl.int64) * D + column, total, mask=column < D)


def norm_fwd(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype and the stream in float32, both (..., d)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stream = torch.empty_like(y, dtype=torch.float32)
    own = _rows(x)
    # what is absent is not read: another tensor stands in for its pointer
    added, gates = (own if other is None else _rows(other) for other in (residual, gate))
    (rows, d), weight = own.shape, weight.contiguous()
    block_d, tile_rows, warps = _blocks(d)
    with backends.launching_on(x):
        _norm_fwd_kernel[(cdiv(rows, tile_rows),)](
            own, weight, added, gates, y, stream, rows, own.stride(0), added.stride(0), gates.stride(0), eps,
            D=d, ROWS=tile_rows, BLOCK_D=block_d, HAS_RESIDUAL=residual is not None, HAS_GATE=gate is not None,
            num_warps=warps,
        )  # fmt: skip
    return y, stream


def norm_bwd(
    dy: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x in dy's dtype, of the residual in float32, of weight and of gate; empty if unwanted."""
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    d_residual = torch.empty_like(dx, dtype=torch.float32) if wants_residual else dx.new_empty(0)
    d_gate = dx.new_empty(0) if gate is None else torch.empty_like(dx, dtype=gate.dtype)
    own, streams = _rows(dy), _rows(stream)
    onward, gates = (own if other is None else _rows(other) for other in (d_stream, gate))
    rows, d = own.shape
    block_d, tile_rows, warps = _blocks(d)
    # enough warps to fill a large GPU; fixed, so that sums are taken in the same order everywhere
    programs = min(cdiv(rows, tile_rows), 4096 // warps)
    d_weight = torch.empty(programs, d, dtype=torch.float32, device=dy.device)
    with backends.launching_on(dy):
        _norm_bwd_kernel[(programs,)](
            own, onward, streams, weight.contiguous(), gates, dx, d_residual, d_gate, d_weight,
            rows, own.stride(0), onward.stride(0), streams.stride(0), gates.stride(0), eps,
            D=d, ROWS=tile_rows, BLOCK_D=block_d, HAS_D_STREAM=d_stream is not None,
            HAS_D_RESIDUAL=wants_residual, HAS_GATE=gate is not None, num_warps=warps,
        )  # fmt: skip
    return dx, d_residual, d_weight.sum(0).to(weight.dtype), d_gate


def _blocks(d: int) -> tuple[int, int, int]:
    """The columns and rows of a tile, and its warps: eight numbers a lane, or eight warps of longer lanes."""
    block_d = max(next_power_of_2(d), 4)
    tile_rows = max(1024 // block_d, 1)
    # sixteen warps would halve the registers of a lane, and the widest rows need them
    return block_d, tile_rows, block_d * tile_rows // 256 if block_d <= 4096 else 8


def _rows(x: Tensor) -> Tensor:
    """View x (..., d) as rows (r, d) whose channels are neighbours in memory, or copy where its strides forbid that."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
