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
from .integers import cdiv, next_power_of_2
from .sequences import by_rows
from .triton_math import sigmoid

# a stretch is as long as leaves this many programs, so that a GPU is full, and no shorter, in steps: a longer one
# rereads fewer rows at its ends and leaves fewer partial sums
_PROGRAMS, _SHORTEST = 2048, 16
# what a lane holds of a row, bytes or channels; rows on their way while one is worked on; steps of the longest stretch
_BYTES_FWD, _AHEAD_FWD, _LONGEST_FWD = 8, 16, 32
_CHANNELS_BWD, _AHEAD_BWD, _LONGEST_BWD = 4, 4, 256


@triton.jit
def _place(l, stretch, stretches, first_ptr, b, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's part (row of partial sums), sequences [low, high), steps [begin, stop) and channels."""
    i = tl.program_id(0)
    blocks: tl.constexpr = tl.cdiv(D, BLOCK_D)
    part = i // blocks
    channels = (i % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    # where all of them exist, no load need ask
    exists = (channels < D) | (D % BLOCK_D == 0)
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
    return part, low, high, begin, tl.minimum(begin + stretch, l), channels, exists


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
def _before(
    x_ptr, past_ptr, t, start, sequence, exists, TIME: tl.constexpr, D: tl.constexpr, K: tl.constexpr
):
    """The K - 1 inputs before step t of a sequence, the oldest first, reaching into its initial state."""
    window = ()
    for i in tl.static_range(K - 1):
        at = t - (K - 1) + i
        x = tl.load(x_ptr + tl.cast(at, tl.int64) * TIME, mask=exists & (at >= start), other=0.0)
        if past_ptr is not None:
            row = sequence * (K - 1) + (at - start + K - 1)
            past = tl.load(past_ptr + tl.cast(row, tl.int64) * D, mask=exists & (at < start), other=0.0)
            x = tl.where(at < start, past.to(x.dtype), x)
        window = window + (x,)
    return window


@triton.jit
def _row(ptr, t, stop, exists, TIME: tl.constexpr, I: tl.constexpr):
    """The row of step t + I, zero from `stop` on."""
    return tl.load(ptr + (tl.cast(t, tl.int64) * TIME + I * TIME), mask=exists & (t + I < stop), other=0.0)


@triton.jit
def _ahead(ptr, t, stop, exists, TIME: tl.constexpr, AHEAD: tl.constexpr):
    """The rows of the next steps, zero from `stop` on."""
    rows = ()
    for i in tl.static_range(AHEAD):
        rows = rows + (_row(ptr, t, stop, exists, TIME, i),)
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
    l, stretch, stretches, x_batch,
    X_TIME: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    _, low, high, begin, stop, channels, exists = _place(l, stretch, stretches, first_ptr, 1, 1, D, BLOCK_D)
    taps, bias = _taps(weight_ptr, bias_ptr, channels, exists, K)
    # offsets may pass 2^31
    x_batch = tl.cast(x_batch, tl.int64)
    y_batch = tl.cast(l, tl.int64) * D
    if past_ptr is not None:
        past_ptr += channels
    for sequence in range(low, high):
        row, start, end, first, last = _steps(sequence, begin, stop, l, bounds_ptr)
        x, y = x_ptr + row * x_batch + channels, y_ptr + row * y_batch + channels
        window = _before(x, past_ptr, first, start, sequence, exists, X_TIME, D, K)
        ahead = _ahead(x, first, last, exists, X_TIME, AHEAD)
        for t in range(first, last, AHEAD):
            here = y + tl.cast(t, tl.int64) * D
            for i in tl.static_range(AHEAD):
                window = window + (ahead[0],)
                ahead = ahead[1:] + (_row(x, t, last, exists, X_TIME, AHEAD + i),)
                out = _weigh(window, taps, bias, K)
                if SILU:
                    out *= sigmoid(out)
                _store(here + i * D, out, exists & (t + i < last))
                window = window[1:]
        if final_ptr is not None:
            # a sequence that ended where this stretch begins was the one before's
            if (last == end) & ((first < last) | (first == start)):
                window = _before(x, past_ptr, last, start, sequence, exists, X_TIME, D, K)
                for i in tl.static_range(K - 1):
                    at = tl.cast(sequence * (K - 1) + i, tl.int64)
                    _store(final_ptr + at * D + channels, window[i], exists)


@triton.jit(do_not_specialize=["l", "stretch", "stretches", "b"])
def _conv_bwd_kernel(
    dy_ptr, d_final_ptr, x_ptr, weight_ptr, bias_ptr, past_ptr, bounds_ptr, first_ptr,
    dx_ptr, d_past_ptr, partial_ptr,
    l, stretch, stretches, b, rows, x_batch, dy_batch,
    X_TIME: tl.constexpr, DY_TIME: tl.constexpr, D: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    part, low, high, begin, stop, channels, exists = _place(
        l, stretch, stretches, first_ptr, b, rows, D, BLOCK_D
    )
    taps, bias = _taps(weight_ptr, bias_ptr, channels, exists, K)
    # offsets may pass 2^31
    x_batch, dy_batch = tl.cast(x_batch, tl.int64), tl.cast(dy_batch, tl.int64)
    dx_batch = tl.cast(l, tl.int64) * D
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
        x, dy = x_ptr + row * x_batch + channels, dy_ptr + row * dy_batch + channels
        dx = dx_ptr + row * dx_batch + channels
        window = _before(x, past_ptr, first, start, sequence, exists, X_TIME, D, K)
        grads = (zero,) * (K - 1)
        ahead = _ahead(x, first, reach, exists, X_TIME, AHEAD)
        dy_ahead = _ahead(dy, first, reach, exists, DY_TIME, AHEAD)
        for t in range(first, last + K - 1, AHEAD):
            here = dx + tl.cast(t, tl.int64) * D
            for i in tl.static_range(AHEAD):
                window = window + (ahead[0],)
                grad = dy_ahead[0].to(tl.float32)
                ahead = ahead[1:] + (_row(x, t, reach, exists, X_TIME, AHEAD + i),)
                dy_ahead = dy_ahead[1:] + (_row(dy, t, reach, exists, DY_TIME, AHEAD + i),)
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
                        d_final_ptr + tl.cast(sequence * (K - 1) + i_final, tl.int64) * D,
                        mask=exists & (i_final >= 0) & (i_final < K - 1),
                        other=0.0,
                    ).to(tl.float32)
                _store(here + (i - (K - 1)) * D, back, exists & (at >= first) & (at < last))
                if past_ptr is not None:
                    i_past = at - start + K - 1
                    _store(
                        d_past_ptr + tl.cast(sequence * (K - 1) + i_past, tl.int64) * D,
                        back,
                        exists & (first == start) & (at < start),
                    )
                window = window[1:]
                grads = grads[1:]
    partial_ptr += part.to(tl.int64) * (K + 1) * D + channels
    for i in tl.static_range(K):
        _store(partial_ptr + i * D, d_taps[i], exists)
    _store(partial_ptr + K * D, d_bias, exists)


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
    window = ()
    for i in tl.static_range(K - 1):
        window = window + (tl.load(state_ptr + i * stride_k, mask=exists, other=0.0),)
    window = window + (x,)
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
        plan = _plan(x, cu_seqlens, _BYTES_FWD // x.element_size(), _LONGEST_FWD, shared=False)
        if plan.parts and d:
            _conv_fwd_kernel[(plan.parts * cdiv(d, plan.block),)](
                x, weight.contiguous(), _contiguous(bias), _contiguous(initial_state),
                plan.bounds, plan.first, y, final,
                l, plan.stretch, plan.stretches, x.stride(0),
                X_TIME=x.stride(1), D=d, K=k, BLOCK_D=plan.block, AHEAD=_AHEAD_FWD, SILU=silu, num_warps=1,
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
        plan = _plan(x, cu_seqlens, _CHANNELS_BWD, _LONGEST_BWD, shared=True)
        partial = x.new_empty(plan.parts, k + 1, d, dtype=torch.float32)
        if plan.parts and d:
            _conv_bwd_kernel[(plan.parts * cdiv(d, plan.block),)](
                dy, _contiguous(d_final), x, weight.contiguous(), _contiguous(bias), past,
                plan.bounds, plan.first, dx, d_past, partial,
                l, plan.stretch, plan.stretches, b, plan.rows, x.stride(0), dy.stride(0),
                X_TIME=x.stride(1), DY_TIME=dy.stride(1), D=d, K=k, BLOCK_D=plan.block, AHEAD=_AHEAD_BWD,
                SILU=silu, num_warps=1,
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
    block = min(128, next_power_of_2(max(1, d)))
    if b and d:
        with backends.launching_on(x):
            _conv_update_kernel[(b, cdiv(d, block))](
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


def _plan(x: Tensor, cu_seqlens: Tensor | None, channels_a_lane: int, longest: int, *, shared: bool) -> _Plan:
    """Cut x (b, l, d); `shared`, a part may have several rows."""
    b, l, d = x.shape
    block = min(32 * channels_a_lane, next_power_of_2(max(1, d)))
    wanted = next_power_of_2(max(1, b * l * cdiv(d, block) // _PROGRAMS))
    stretch = min(longest, max(_SHORTEST, wanted))
    if cu_seqlens is None:
        stretches = max(1, cdiv(l, stretch))
        # so that short rows do not leave more partial sums than they have steps
        rows = max(1, stretch // max(1, l)) if shared else 1
        return _Plan(cdiv(b, rows) * stretches, block, stretch, stretches, rows, None, None)
    # a last stretch, which may have no steps, has the empty sequences at the end
    stretches = l // stretch + 1
    bounds = cu_seqlens.to(torch.int32).contiguous()
    begins = torch.arange(0, (stretches + 1) * stretch, stretch, dtype=torch.int32, device=x.device)
    first = torch.searchsorted(bounds[:-1], begins, out_int32=True)
    return _Plan(stretches, block, stretch, stretches, 1, bounds, first)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
