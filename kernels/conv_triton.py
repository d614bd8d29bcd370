"""The causal depthwise convolution in Triton: one kernel forward, one backward, one for a token.

    y_t = act(bias + sum_i weight_i x_{t-k+1+i}),   i = 0 .. k - 1        (Mamba, figure 3)

A program is one warp. It holds some channels, several a lane, and walks over a stretch of time with the last
k inputs in registers; rows are loaded a few steps ahead of their use. So x is read once and y written once. The
backward walks the same way, forward in time: it recomputes what went into the activation, keeps the last k gradients
g_t of it, and k - 1 steps behind

    dx_t = sum_j weight_{k-1-j} g_{t+j},   j = 0 .. k - 1

is complete. A stretch looks k - 1 steps past its ends, never past those of a sequence: there the initial state is,
whose gradient comes last out of the same sum, and the final state is made of the same rows. The gradients of weight
and bias leave a program as partial sums: no atomics, and so the same result to the bit from run to run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code=assignment
# ruff: noqa: RUF005, SIM102

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend as backends
from .sequences import by_rows
from .triton_math import sigmoid

# a stretch is as long as leaves this many programs, so that a GPU is full, within these bounds, in steps: a longer
# one rereads fewer rows at its ends and leaves fewer partial sums
_PROGRAMS, _SHORTEST, _LONGEST = 2048, 16, 128
# channels a lane holds, as many bytes as one load takes or, backward, as many as registers allow; and rows on their way
# while one is worked on
_BYTES_FWD, _AHEAD_FWD = 16, 8
_CHANNELS_BWD, _AHEAD_BWD = 4, 4


@triton.jit
def _place(l, d, stretch, stretches, first_ptr, b, rows, BLOCK_D: tl.constexpr):
    """A program's part (row of partial sums), sequences [low, high), steps [begin, stop) and channels."""
    i = tl.program_id(0)
    blocks = tl.cdiv(d, BLOCK_D)
    part = i // blocks
    channels = (i % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = (part % stretches) * stretch
    if first_ptr is not None:
        # the sequences that start here, and the one before them, which may reach into this stretch
        low = tl.maximum(tl.load(first_ptr + part) - 1, 0)
        high = tl.load(first_ptr + part + 1)
    else:
        low = (part // stretches) * rows
        high = low + rows
        # one row is known at compile time, and then there is no loop over rows
        if rows > 1:
            high = tl.minimum(high, b)
    return part, low, high, begin, tl.minimum(begin + stretch, l), channels, channels < d


@triton.jit
def _steps(sequence, begin, stop, l, bounds_ptr):
    """A sequence's row of x, where it starts and ends there, and which steps [first, last) are in this stretch."""
    if bounds_ptr is not None:
        row = 0
        start = tl.load(bounds_ptr + sequence)
        end = tl.load(bounds_ptr + sequence + 1)
    else:
        row = sequence
        start = 0
        end = l
    return row, start, end, tl.maximum(start, begin), tl.minimum(end, stop)


@triton.jit
def _taps(weight_ptr, bias_ptr, channels, exists, K: tl.constexpr):
    """The weights of each step of the window, the oldest first, and the bias, in fp32."""
    taps = ()
    for i in tl.static_range(K):
        taps = taps + (tl.load(weight_ptr + channels * K + i, mask=exists, other=0.0).to(tl.float32),)
    bias = tl.zeros(channels.shape, tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _before(x_ptr, past_ptr, t, start, sequence, stride, d, exists, K: tl.constexpr):
    """The K - 1 inputs before step t of a sequence, the oldest first, reaching into its initial state."""
    window = ()
    for i in tl.static_range(K - 1):
        at = t - (K - 1) + i
        x = tl.load(x_ptr + at * stride, mask=exists & (at >= start), other=0.0)
        if past_ptr is not None:
            row = sequence * (K - 1) + (at - start + K - 1)
            past = tl.load(past_ptr + row * d, mask=exists & (at < start), other=0.0)
            x = tl.where(at < start, past.to(x.dtype), x)
        window = window + (x,)
    return window


@triton.jit
def _ahead(ptr, t, stop, stride, exists, AHEAD: tl.constexpr):
    """The rows of the next steps, zero from `stop` on."""
    rows = ()
    for i in tl.static_range(AHEAD):
        rows = rows + (tl.load(ptr + (t + i) * stride, mask=exists & (t + i < stop), other=0.0),)
    return rows


@triton.jit
def _store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weigh(window, taps, bias, K: tl.constexpr):
    out = bias
    for i in tl.static_range(K):
        out += window[i].to(tl.float32) * taps[i]
    return out


@triton.jit(do_not_specialize=["l", "stretch", "stretches"])
def _conv_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, past_ptr, bounds_ptr, first_ptr, y_ptr, final_ptr,
    l, d, stretch, stretches, stride_b, stride_l,
    K: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    _, low, high, begin, stop, channels, exists = _place(l, d, stretch, stretches, first_ptr, 1, 1, BLOCK_D)
    taps, bias = _taps(weight_ptr, bias_ptr, channels, exists, K)
    # offsets may pass 2^31
    stride_b, stride_l = tl.cast(stride_b, tl.int64), tl.cast(stride_l, tl.int64)
    stride_y = tl.cast(d, tl.int64)
    if past_ptr is not None:
        past_ptr += channels
    for sequence in range(low, high):
        row, start, end, first, last = _steps(sequence, begin, stop, l, bounds_ptr)
        x, y = x_ptr + row * stride_b + channels, y_ptr + row * (l * stride_y) + channels
        window = _before(x, past_ptr, first, start, sequence, stride_l, stride_y, exists, K)
        ahead = _ahead(x, first, last, stride_l, exists, AHEAD)
        for t in range(first, last, AHEAD):
            for i in tl.static_range(AHEAD):
                window = window + (ahead[0],)
                ahead = ahead[1:] + _ahead(x, t + i + AHEAD, last, stride_l, exists, 1)
                out = _weigh(window, taps, bias, K)
                if SILU:
                    out *= sigmoid(out)
                _store(y + (t + i) * stride_y, out, exists & (t + i < last))
                window = window[1:]
        if final_ptr is not None:
            # a sequence that ended where this stretch begins was the one before's
            if (last == end) & ((first < last) | (first == start)):
                window = _before(x, past_ptr, last, start, sequence, stride_l, stride_y, exists, K)
                for i in tl.static_range(K - 1):
                    _store(final_ptr + (sequence * (K - 1) + i) * stride_y + channels, window[i], exists)


@triton.jit(do_not_specialize=["l", "stretch", "stretches", "b"])
def _conv_bwd_kernel(
    dy_ptr, d_final_ptr, x_ptr, weight_ptr, bias_ptr, past_ptr, bounds_ptr, first_ptr,
    dx_ptr, d_past_ptr, partial_ptr,
    l, d, stretch, stretches, b, rows, stride_b, stride_l, stride_dyb, stride_dyl,
    K: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    part, low, high, begin, stop, channels, exists = _place(
        l, d, stretch, stretches, first_ptr, b, rows, BLOCK_D
    )
    taps, bias = _taps(weight_ptr, bias_ptr, channels, exists, K)
    # offsets may pass 2^31
    stride_b, stride_l = tl.cast(stride_b, tl.int64), tl.cast(stride_l, tl.int64)
    stride_dyb, stride_dyl = tl.cast(stride_dyb, tl.int64), tl.cast(stride_dyl, tl.int64)
    stride_dx = tl.cast(d, tl.int64)
    if past_ptr is not None:
        past_ptr += channels
        d_past_ptr += channels
    if d_final_ptr is not None:
        d_final_ptr += channels
    zero = tl.zeros((BLOCK_D,), tl.float32)
    d_bias, d_taps = zero, (zero,) * K
    for sequence in range(low, high):
        row, start, end, first, last = _steps(sequence, begin, stop, l, bounds_ptr)
        # the steps that the last inputs of this stretch act on
        reach = tl.minimum(last + K - 1, end)
        x, dy = x_ptr + row * stride_b + channels, dy_ptr + row * stride_dyb + channels
        dx = dx_ptr + row * (l * stride_dx) + channels
        window = _before(x, past_ptr, first, start, sequence, stride_l, stride_dx, exists, K)
        grads = (zero,) * (K - 1)
        ahead = _ahead(x, first, reach, stride_l, exists, AHEAD)
        dy_ahead = _ahead(dy, first, reach, stride_dyl, exists, AHEAD)
        for t in range(first, last + K - 1, AHEAD):
            for i in tl.static_range(AHEAD):
                window = window + (ahead[0],)
                grad = dy_ahead[0].to(tl.float32)
                ahead = ahead[1:] + _ahead(x, t + i + AHEAD, reach, stride_l, exists, 1)
                dy_ahead = dy_ahead[1:] + _ahead(dy, t + i + AHEAD, reach, stride_dyl, exists, 1)
                if SILU:
                    out = _weigh(window, taps, bias, K)
                    slope = sigmoid(out)
                    grad *= slope + out * slope * (1.0 - slope)
                # what lies past the end of the stretch counts in the next one
                own = tl.where(t + i < last, grad, 0.0)
                d_bias += own
                sums = ()
                for j in tl.static_range(K):
                    sums = sums + (d_taps[j] + own * window[j].to(tl.float32),)
                d_taps = sums
                grads = grads + (grad,)
                back = zero
                for j in tl.static_range(K):
                    back += grads[j] * taps[K - 1 - j]
                at = t + i - (K - 1)
                if d_final_ptr is not None:
                    i_final = at - end + K - 1
                    back += tl.load(
                        d_final_ptr + (sequence * (K - 1) + i_final) * stride_dx,
                        mask=exists & (i_final >= 0) & (i_final < K - 1),
                        other=0.0,
                    ).to(tl.float32)
                _store(dx + at * stride_dx, back, exists & (at >= first) & (at < last))
                if past_ptr is not None:
                    i_past = at - start + K - 1
                    _store(
                        d_past_ptr + (sequence * (K - 1) + i_past) * stride_dx,
                        back,
                        exists & (first == start) & (at < start),
                    )
                window = window[1:]
                grads = grads[1:]
    partial_ptr += part.to(tl.int64) * (K + 1) * d + channels
    for i in tl.static_range(K):
        _store(partial_ptr + i * d, d_taps[i], exists)
    _store(partial_ptr + K * d, d_bias, exists)


@triton.jit
def _conv_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr,
    d, stride_x, stride_b, stride_k, stride_d,
    K: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = channels < d
    taps, bias = _taps(weight_ptr, bias_ptr, channels, exists, K)
    state_ptr += batch * stride_b + channels * stride_d
    x = tl.load(x_ptr + batch * stride_x + channels, mask=exists, other=0.0)
    window = _ahead(state_ptr, 0, K - 1, stride_k, exists, K - 1) + (x,)
    out = _weigh(window, taps, bias, K)
    if SILU:
        out *= sigmoid(out)
    _store(y_ptr + batch * d + channels, out, exists)
    for i in tl.static_range(K - 1):
        _store(state_ptr + i * stride_k, window[i + 1], exists)


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
    x = by_rows(x)
    (b, l, d), k = x.shape, weight.shape[1]
    y, final = x.new_empty(b, l, d), None
    if return_final_state:
        final = x.new_empty(b if cu_seqlens is None else len(cu_seqlens) - 1, k - 1, d)
    with backends.launching_on(x):
        plan = _plan(x, cu_seqlens, _BYTES_FWD // x.element_size(), shared=False)
        if plan.parts and d:
            _conv_fwd_kernel[(plan.parts * triton.cdiv(d, plan.block),)](
                x, weight.contiguous(), _contiguous(bias), _contiguous(initial_state),
                plan.bounds, plan.first, y, final,
                l, d, plan.stretch, plan.stretches, x.stride(0), x.stride(1),
                K=k, BLOCK_D=plan.block, AHEAD=_AHEAD_FWD, SILU=silu, num_warps=1,
            )  # fmt: skip
    return y, final


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
    x, dy = by_rows(x), by_rows(dy)
    (b, l, d), k = x.shape, weight.shape[1]
    dx = x.new_empty(b, l, d)
    past = _contiguous(initial_state)
    d_past = None if past is None else torch.empty_like(past)
    with backends.launching_on(x):
        plan = _plan(x, cu_seqlens, _CHANNELS_BWD, shared=True)
        partial = x.new_empty(plan.parts, k + 1, d, dtype=torch.float32)
        if plan.parts and d:
            _conv_bwd_kernel[(plan.parts * triton.cdiv(d, plan.block),)](
                dy, _contiguous(d_final), x, weight.contiguous(), _contiguous(bias), past,
                plan.bounds, plan.first, dx, d_past, partial,
                l, d, plan.stretch, plan.stretches, b, plan.rows,
                x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
                K=k, BLOCK_D=plan.block, AHEAD=_AHEAD_BWD, SILU=silu, num_warps=1,
            )  # fmt: skip
    total = partial.sum(0)
    # a copy: a view may not leave an operator beside another of the same memory
    d_weight = total[:k].t().to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, d_weight, None if bias is None else total[k].to(bias.dtype), d_past


def conv_update(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve one token x (b, d) with the k - 1 before it, state (b, k - 1, d), moved on in place; return y (b, d)."""
    x = by_rows(x)
    b, d = x.shape
    y = x.new_empty(b, d)
    block = min(128, triton.next_power_of_2(max(1, d)))
    if b and d:
        with backends.launching_on(x):
            _conv_update_kernel[(b, triton.cdiv(d, block))](
                x, state, weight.contiguous(), _contiguous(bias), y,
                d, x.stride(0), *state.stride(),
                K=weight.shape[1], BLOCK_D=block, SILU=silu, num_warps=1,
            )  # fmt: skip
    return y


class _Plan(NamedTuple):
    """How the work is cut: a program has a part, a stretch of time of one row or some short rows, and a block of
    channels.
    """

    parts: int
    block: int
    stretch: int
    stretches: int  # of a row
    rows: int  # of a part
    bounds: Tensor | None  # where packed sequences start, and the last one ends (s + 1,)
    first: Tensor | None  # the packed sequences first[i] up to first[i + 1] start in stretch i


def _plan(x: Tensor, cu_seqlens: Tensor | None, channels_a_lane: int, *, shared: bool) -> _Plan:
    """Cut x (b, l, d); `shared`, a part may have several rows."""
    b, l, d = x.shape
    block = min(32 * channels_a_lane, triton.next_power_of_2(max(1, d)))
    wanted = triton.next_power_of_2(max(1, b * l * triton.cdiv(d, block) // _PROGRAMS))
    stretch = min(_LONGEST, max(_SHORTEST, wanted))
    if cu_seqlens is None:
        stretches = max(1, triton.cdiv(l, stretch))
        # so that short rows do not leave more partial sums than they have steps
        rows = max(1, stretch // max(1, l)) if shared else 1
        return _Plan(triton.cdiv(b, rows) * stretches, block, stretch, stretches, rows, None, None)
    # a last stretch, which may have no steps, has the empty sequences at the end
    stretches = l // stretch + 1
    bounds = cu_seqlens.to(torch.int32).contiguous()
    begins = torch.arange(0, (stretches + 1) * stretch, stretch, dtype=torch.int32, device=x.device)
    first = torch.searchsorted(bounds[:-1], begins, out_int32=True)
    return _Plan(stretches, block, stretch, stretches, 1, bounds, first)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
