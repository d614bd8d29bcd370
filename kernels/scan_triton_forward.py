"""The forward kernels of the selective scan: what chunks add to the state, the carry from chunk to chunk, and y.

Ahead of them, and of those of the backward, the matrices are laid out as they want them.
"""

import triton
import triton.language as tl

from .scan_triton_tiles import (
    LENGTHS,
    ahead,
    back,
    block,
    hold,
    load_A,
    load_matrix,
    load_row,
    load_rows,
    load_tile,
    place,
    step_size,
    store_row,
    store_tile,
)
from .triton_math import LOG2E, silu


@triton.jit(do_not_specialize=("rows", "l", "b_batch", "c_batch"))
def matrices_kernel(
    A_ptr, B_ptr, C_ptr, A_out_ptr, B_out_ptr, C_out_ptr,
    rows, l, d, n, width, a_channel, a_state, b_batch, b_time, b_group, b_state, c_batch, c_time, c_group, c_state,
    HAS_B: tl.constexpr, HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write A log2(e) (n, d) and, where they are asked for, B and C (b l, g n), in float32."""
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n * d, BLOCK)
    if i < blocks:
        own = i * BLOCK + tl.arange(0, BLOCK)
        exists = own < n * d
        value = tl.load(A_ptr + (own % d) * a_channel + (own // d) * a_state, mask=exists, other=0.0)
        tl.store(A_out_ptr + own, value * LOG2E, mask=exists)
    else:
        own = (i - blocks) * BLOCK + tl.arange(0, BLOCK)
        row, column = own // width, own % width
        batch, time, group, state = row // l, row % l, column // n, column % n
        exists = row < rows
        if HAS_B:
            B = B_ptr + batch * b_batch + time * b_time + group * b_group + state * b_state
            tl.store(B_out_ptr + own, tl.load(B, mask=exists, other=0.0).to(tl.float32), mask=exists)
        if HAS_C:
            C = C_ptr + batch * c_batch + time * c_time + group * c_group + state * c_state
            tl.store(C_out_ptr + own, tl.load(C, mask=exists, other=0.0).to(tl.float32), mask=exists)


@triton.jit(do_not_specialize=LENGTHS)
def chunk_states_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, bias_ptr, states_ptr, decays_ptr, table_ptr,
    l, d, n, size, blocks, length, per_sequence, u_batch, delta_batch,
    U_TIME: tl.constexpr, DELTA_TIME: tl.constexpr, MATRIX_TIME: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, U: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DELTA_ROWS: tl.constexpr, B_ROWS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    VARLEN: tl.constexpr, REVERSE: tl.constexpr, BUT_ONE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What a chunk makes of a state that was zero (n, d), and the sum of its steps (d,)."""
    columns = (d // size) * blocks
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    if BUT_ONE:
        # the last chunk of a sequence is left out
        i += i // (per_sequence - 1)
    group, channels, exists = block(j, blocks, size, BLOCK_D, VECTOR)
    states = tl.arange(0, N)
    batch, first, steps = place(i, table_ptr, l, length, per_sequence, VARLEN, REVERSE)
    A2, W2 = load_A(A_ptr, channels, states, exists, d, n, COMPLEX, EVEN)
    bias = load_row(bias_ptr + channels, exists, EVEN) if HAS_BIAS else 0.0
    raw = 0.0 if DELTA_ROWS else load_row(delta_ptr + channels, exists, EVEN)
    B_tile = 0.0 if B_ROWS else load_tile(B_ptr, channels, states, exists, d, n, EVEN)
    ON: tl.constexpr = -1 if REVERSE else 1
    u = u_ptr + batch * u_batch + first * U_TIME + channels
    delta = delta_ptr + batch * delta_batch + first * DELTA_TIME + channels
    B = B_ptr + (batch * l + first) * MATRIX_TIME + group * n

    h = tl.zeros((BLOCK_D, N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    full = steps // U
    if full > 0:
        us = load_rows(u, ON * U_TIME, exists, U, True, EVEN)
        deltas = load_rows(delta, ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN)
        Bs = load_matrix(B, ON * MATRIX_TIME, states, n, U, B_ROWS, EVEN)
        for m in range(full):
            t = tl.minimum(m + 1, full - 1) * U
            next_us = load_rows(u + t * (ON * U_TIME), ON * U_TIME, exists, U, True, EVEN)
            next_deltas = load_rows(
                delta + t * (ON * DELTA_TIME), ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN
            )
            next_Bs = load_matrix(B + t * (ON * MATRIX_TIME), ON * MATRIX_TIME, states, n, U, B_ROWS, EVEN)
            for k in tl.static_range(U):
                dt = step_size(deltas[k] if DELTA_ROWS else raw, bias, SOFTPLUS)
                decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
                x = us[k].to(tl.float32)[:, None] * gain
                h = ahead(h, decay, turn, COMPLEX) + x * (Bs[k][None, :] if B_ROWS else B_tile)
                total += dt
            us, deltas, Bs = next_us, next_deltas, next_Bs
    for t in range(full * U, steps):
        row = load_row(delta + t * (ON * DELTA_TIME), exists, EVEN) if DELTA_ROWS else raw
        dt = step_size(row, bias, SOFTPLUS)
        decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
        x = load_row(u + t * (ON * U_TIME), exists, EVEN).to(tl.float32)[:, None] * gain
        B_now = load_matrix(B + t * (ON * MATRIX_TIME), 0, states, n, 1, B_ROWS, EVEN)[0]
        h = ahead(h, decay, turn, COMPLEX) + x * (B_now[None, :] if B_ROWS else B_tile)
        total += dt
    store_tile(states_ptr + i.to(tl.int64) * n * d, h, channels, states, exists, d, n, EVEN)
    store_row(decays_ptr + i.to(tl.int64) * d + channels, total, exists, EVEN)


@triton.jit(do_not_specialize=LENGTHS)
def carry_kernel(
    A_ptr, states_ptr, decays_ptr, first_ptr, last_ptr, counts_ptr, d, n, per_sequence,
    BLOCK: tl.constexpr, U: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, BACKWARD: tl.constexpr,
    COMPLEX: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of a sequence: replace what each makes of zero by the state that enters it.

    Backward, the same for gradients, from the last chunk to the first. Every state, or pair that is a complex one, goes
    its own way, so that a program takes any of them (BLOCK, 1 or 2).
    """
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    blocks = tl.cdiv(n // PARTS * d, BLOCK)
    sequence = tl.program_id(0) // blocks
    numbers = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    channels, exists = numbers % d, numbers < n // PARTS * d
    own = ((numbers // d) * PARTS * d + channels)[:, None] + tl.arange(0, PARTS)[None, :] * d
    some = exists[:, None]
    if VARLEN:
        start = tl.load(counts_ptr + sequence)
        count = tl.load(counts_ptr + sequence + 1) - start
    else:
        start = sequence * per_sequence
        count = per_sequence
    A2 = tl.load(A_ptr + numbers, mask=exists, other=0.0)[:, None]
    W2 = tl.load(A_ptr + n // 2 * d + numbers, mask=exists, other=0.0)[:, None] if COMPLEX else 0.0
    h = tl.zeros((BLOCK, PARTS), tl.float32)
    if HAS_FIRST:
        h = tl.load(first_ptr + sequence.to(tl.int64) * n * d + own, mask=some, other=0.0)
    for m in range(0, count, U):
        # U loads under way at once; past the end they repeat the last, and nothing is made of them
        owns, totals = (), ()
        for k in tl.static_range(U):
            at = tl.minimum(m + k, count - 1)
            at = (start + (count - 1 - at if BACKWARD else at)).to(tl.int64)
            owns = owns + (tl.load(states_ptr + at * n * d + own, mask=some, other=0.0),)  # noqa: RUF005
            totals = totals + (tl.load(decays_ptr + at * d + channels, mask=exists, other=0.0),)  # noqa: RUF005
        for k in tl.static_range(U):
            if m + k < count:
                at = (start + (count - 1 - m - k if BACKWARD else m + k)).to(tl.int64)
                tl.store(states_ptr + at * n * d + own, h, mask=some)
                decay, turn, _ = hold(totals[k], A2, W2, False, COMPLEX)
                h = back(h, decay, turn, COMPLEX) if BACKWARD else ahead(h, decay, turn, COMPLEX)
                h += owns[k]
    if HAS_LAST:
        tl.store(last_ptr + sequence.to(tl.int64) * n * d + own, h, mask=some)


@triton.jit(do_not_specialize=LENGTHS)
def scan_fwd_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, states_ptr, y_ptr, table_ptr,
    l, d, n, size, blocks, length, per_sequence, u_batch, delta_batch, z_batch,
    U_TIME: tl.constexpr, DELTA_TIME: tl.constexpr, Z_TIME: tl.constexpr, Y_TIME: tl.constexpr,
    MATRIX_TIME: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, U: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, DELTA_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr, C_ROWS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    VARLEN: tl.constexpr, REVERSE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Write y of a chunk from the state that enters it."""
    columns = (d // size) * blocks
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    group, channels, exists = block(j, blocks, size, BLOCK_D, VECTOR)
    states = tl.arange(0, N)
    A2, W2 = load_A(A_ptr, channels, states, exists, d, n, COMPLEX, EVEN)
    bias = load_row(bias_ptr + channels, exists, EVEN) if HAS_BIAS else 0.0
    skip = load_row(D_ptr + channels, exists, EVEN) if HAS_D else 0.0
    raw = 0.0 if DELTA_ROWS else load_row(delta_ptr + channels, exists, EVEN)
    B_tile = 0.0 if B_ROWS else load_tile(B_ptr, channels, states, exists, d, n, EVEN)
    C_tile = 0.0 if C_ROWS else load_tile(C_ptr, channels, states, exists, d, n, EVEN)
    ON: tl.constexpr = -1 if REVERSE else 1
    batch, first, steps = place(i, table_ptr, l, length, per_sequence, VARLEN, REVERSE)
    row = batch * l + first
    u = u_ptr + batch * u_batch + first * U_TIME + channels
    delta = delta_ptr + batch * delta_batch + first * DELTA_TIME + channels
    z = z_ptr + batch * z_batch + first * Z_TIME + channels
    B = B_ptr + row * MATRIX_TIME + group * n
    C = C_ptr + row * MATRIX_TIME + group * n
    y = y_ptr + row * Y_TIME + channels

    h = load_tile(states_ptr + i.to(tl.int64) * n * d, channels, states, exists, d, n, EVEN)
    full = steps // U
    if full > 0:
        us = load_rows(u, ON * U_TIME, exists, U, True, EVEN)
        deltas = load_rows(delta, ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN)
        zs = load_rows(z, ON * Z_TIME, exists, U, HAS_Z, EVEN)
        Bs = load_matrix(B, ON * MATRIX_TIME, states, n, U, B_ROWS, EVEN)
        Cs = load_matrix(C, ON * MATRIX_TIME, states, n, U, C_ROWS, EVEN)
        for m in range(full):
            t = tl.minimum(m + 1, full - 1) * U
            next_us = load_rows(u + t * (ON * U_TIME), ON * U_TIME, exists, U, True, EVEN)
            next_deltas = load_rows(
                delta + t * (ON * DELTA_TIME), ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN
            )
            next_zs = load_rows(z + t * (ON * Z_TIME), ON * Z_TIME, exists, U, HAS_Z, EVEN)
            next_Bs = load_matrix(B + t * (ON * MATRIX_TIME), ON * MATRIX_TIME, states, n, U, B_ROWS, EVEN)
            next_Cs = load_matrix(C + t * (ON * MATRIX_TIME), ON * MATRIX_TIME, states, n, U, C_ROWS, EVEN)
            # what a step takes of a channel alone comes first: its chains of latency overlap
            wides, dts, gates = (), (), ()
            for k in tl.static_range(U):
                wides = wides + (us[k].to(tl.float32),)  # noqa: RUF005
                dts = dts + (step_size(deltas[k] if DELTA_ROWS else raw, bias, SOFTPLUS),)  # noqa: RUF005
                gates = gates + ((silu(zs[k]) if HAS_Z else 1.0),)  # noqa: RUF005
            for k in tl.static_range(U):
                decay, turn, gain = hold(dts[k], A2, W2, ZOH, COMPLEX)
                h = ahead(h, decay, turn, COMPLEX) + (wides[k][:, None] * gain) * (
                    Bs[k][None, :] if B_ROWS else B_tile
                )
                out = tl.sum(h * (Cs[k][None, :] if C_ROWS else C_tile), 1)
                out = (out + skip * wides[k] if HAS_D else out) * gates[k]
                store_row(y + (m * U + k) * (ON * Y_TIME), out, exists, EVEN)
            us, deltas, zs, Bs, Cs = next_us, next_deltas, next_zs, next_Bs, next_Cs
    for t in range(full * U, steps):
        u_now = load_row(u + t * (ON * U_TIME), exists, EVEN).to(tl.float32)
        row_now = load_row(delta + t * (ON * DELTA_TIME), exists, EVEN) if DELTA_ROWS else raw
        dt = step_size(row_now, bias, SOFTPLUS)
        decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
        B_now = load_matrix(B + t * (ON * MATRIX_TIME), 0, states, n, 1, B_ROWS, EVEN)[0]
        C_now = load_matrix(C + t * (ON * MATRIX_TIME), 0, states, n, 1, C_ROWS, EVEN)[0]
        z_now = load_rows(z + t * (ON * Z_TIME), 0, exists, 1, HAS_Z, EVEN)[0]
        h = ahead(h, decay, turn, COMPLEX) + (u_now[:, None] * gain) * (B_now[None, :] if B_ROWS else B_tile)
        out = tl.sum(h * (C_now[None, :] if C_ROWS else C_tile), 1)
        out = (out + skip * u_now if HAS_D else out) * (silu(z_now) if HAS_Z else 1.0)
        store_row(y + t * (ON * Y_TIME), out, exists, EVEN)
