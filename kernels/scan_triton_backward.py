"""The backward kernels of the selective scan: a sweep forward over every chunk, then one backward.

The gradient of delta needs the state and its gradient at the same time only in g_t = G_t a_t h_{t-1}, that of
delta_t A, where G_t = C_t dy_t + a_{t+1} G_{t+1}. But from one step to the next

    g_{t+1} = g_t + (a_{t+1} G_{t+1}) x_t - C_t dy_t (a_t h_{t-1}),      x_t = gain_t B_t u_t,

so that its sum over states, which is all that is asked for, is a running sum of what a sweep forward in time gives and
what a sweep backward gives, and neither sweep needs the other's states. Where states decay away within a step, both
terms vanish with them. A running sum in float32 is right to a part in 10^7 of its largest value in the chunk. dA is
carried along the sweep forward by the derivative of h by A.
"""

import triton
import triton.language as tl

from .scan_triton_tiles import (
    LENGTHS,
    ahead,
    back,
    block,
    gain_by_A,
    hold,
    load_A,
    load_matrix,
    load_row,
    load_rows,
    load_states,
    load_tile,
    place,
    spread,
    step_size,
    store_row,
    store_tile,
    swapped,
    times_A,
    times_A_back,
)
from .triton_math import LN2, sigmoid, silu, softplus


@triton.jit
def _pick_states(A2, states, WARPS: tl.constexpr, MMA: tl.constexpr, OPERAND: tl.constexpr):
    """The matrix (WARPS, 16, 64) that _store_sums multiplies by, one row a state; 0 where no product is taken.

    Both lie in registers as the operands of a product do: the bits of a channel are (warp, 3 high and 2 low bits of the
    lane, its 2 channels), so that a row of it is (channel of the lane, high bits), a column (state, low bits).
    """
    if MMA:
        channels = tl.arange(0, A2.shape[0])
        rows = ((channels >> 3) & 7) + (channels & 1) * 8
        # the second term, which is false, has it made where A2 is: in the lanes that multiply by it
        pick = (rows[:, None] == states[None, :]) | (A2 != A2)
        pick = tl.reshape(pick.to(OPERAND), (WARPS, 8, 4, 2, 2, 2, 2, 2))
        return tl.reshape(tl.permute(pick, (0, 3, 1, 4, 5, 6, 2, 7)), (WARPS, 16, 64))
    else:  # noqa: RET505
        return 0.0


@triton.jit
def _store_sums(
    ptr, value, pick, states, n, stride,
    WARPS: tl.constexpr, MMA: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Store the sum over each warp's channels (N,) of a tile (BLOCK_D, N), stride apart; by the matrix units if MMA."""
    if MMA:
        # columns are (channel of the lane, high bits of the lane): nothing moves from one lane to another
        x = tl.reshape(value.to(OPERAND), (WARPS, 8, 4, 2, 2, 2, 2, 2))
        x = tl.reshape(tl.permute(x, (0, 4, 5, 6, 2, 7, 3, 1)), (WARPS, 64, 16))
        sums = tl.sum(tl.dot(pick, x, input_precision="ieee"), 2)
        # twice, so that a warp's lanes hold a row of their own and store half of it
        sums = tl.reshape(tl.broadcast_to(sums[:, None, :], (WARPS, 2, 16)), (WARPS, 32))
        lanes = tl.arange(0, 32)[None, :]
        tl.store(ptr + tl.arange(0, WARPS)[:, None] * stride + lanes % 16, sums, mask=lanes < n)
    else:
        # All lanes have the sums, each rounded in its own way, and those of the first channel store them. The hint,
        # which is of channels, keeps them there: else all lanes would write theirs to one place in shared memory
        rows = tl.arange(0, value.shape[0])[:, None]
        where = tl.max_contiguous(ptr + rows + states[None, :], [value.shape[0], 1])
        sums = tl.broadcast_to(tl.sum(value, 0)[None, :], value.shape)
        tl.store(where, sums, mask=(rows == 0) & (states < n)[None, :])


@triton.jit
def _store_terms(ptr, rest_ptr, value, exists, SPLIT: tl.constexpr, EVEN: tl.constexpr):
    """Keep float32 values where the gradients of u and delta will be written, in two halves where those are 16-bit."""
    if SPLIT:
        bits = value.to(tl.uint32, bitcast=True)
        store_row(ptr, (bits >> 16).to(tl.uint16), exists, EVEN)
        store_row(rest_ptr, (bits & 0xFFFF).to(tl.uint16), exists, EVEN)
    else:
        store_row(ptr, value, exists, EVEN)


@triton.jit
def _join(high, low, SPLIT: tl.constexpr):
    if SPLIT:
        return ((high.to(tl.uint32) << 16) | low.to(tl.uint32)).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return high


@triton.jit(do_not_specialize=LENGTHS)
def chunk_grads_kernel(
    delta_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, dy_ptr, grads_ptr, decays_ptr, table_ptr,
    l, d, n, size, blocks, length, per_sequence, delta_batch, z_batch, dy_batch,
    DELTA_TIME: tl.constexpr, Z_TIME: tl.constexpr, DY_TIME: tl.constexpr, MATRIX_TIME: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, U: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, DELTA_ROWS: tl.constexpr, C_ROWS: tl.constexpr,
    COMPLEX: tl.constexpr, VARLEN: tl.constexpr, REVERSE: tl.constexpr, BUT_ONE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The gradient that a chunk's own y give the state that enters it (n, d), and the sum of its steps (d,)."""
    columns = (d // size) * blocks
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    if BUT_ONE:
        # the first chunk of a sequence is left out
        i += i // (per_sequence - 1) + 1
    group, channels, exists = block(j, blocks, size, BLOCK_D, VECTOR)
    states = tl.arange(0, N)
    batch, first, steps = place(i, table_ptr, l, length, per_sequence, VARLEN, REVERSE)
    A2, W2 = load_A(A_ptr, channels, states, exists, d, n, COMPLEX, EVEN)
    bias = load_row(bias_ptr + channels, exists, EVEN) if HAS_BIAS else 0.0
    raw = 0.0 if DELTA_ROWS else load_row(delta_ptr + channels, exists, EVEN)
    C_tile = 0.0 if C_ROWS else load_tile(C_ptr, channels, states, exists, d, n, EVEN)
    # from the last step to the first
    ON: tl.constexpr = 1 if REVERSE else -1
    last = first - ON * (steps - 1)
    delta = delta_ptr + batch * delta_batch + last * DELTA_TIME + channels
    z = z_ptr + batch * z_batch + last * Z_TIME + channels
    dy = dy_ptr + batch * dy_batch + last * DY_TIME + channels
    C = C_ptr + (batch * l + last) * MATRIX_TIME + group * n

    G = tl.zeros((BLOCK_D, N), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    full = steps // U
    if full > 0:
        deltas = load_rows(delta, ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN)
        zs = load_rows(z, ON * Z_TIME, exists, U, HAS_Z, EVEN)
        dys = load_rows(dy, ON * DY_TIME, exists, U, True, EVEN)
        Cs = load_matrix(C, ON * MATRIX_TIME, states, n, U, C_ROWS, EVEN)
        for m in range(full):
            t = tl.minimum(m + 1, full - 1) * U
            next_deltas = load_rows(
                delta + t * (ON * DELTA_TIME), ON * DELTA_TIME, exists, U, DELTA_ROWS, EVEN
            )
            next_zs = load_rows(z + t * (ON * Z_TIME), ON * Z_TIME, exists, U, HAS_Z, EVEN)
            next_dys = load_rows(dy + t * (ON * DY_TIME), ON * DY_TIME, exists, U, True, EVEN)
            next_Cs = load_matrix(C + t * (ON * MATRIX_TIME), ON * MATRIX_TIME, states, n, U, C_ROWS, EVEN)
            for k in tl.static_range(U):
                dt = step_size(deltas[k] if DELTA_ROWS else raw, bias, SOFTPLUS)
                grad = dys[k].to(tl.float32) * (silu(zs[k]) if HAS_Z else 1.0)
                decay, turn, _ = hold(dt, A2, W2, False, COMPLEX)
                G += grad[:, None] * spread(Cs[k], C_tile, C_ROWS, False)
                G = back(G, decay, turn, COMPLEX)
                total += dt
            deltas, zs, dys, Cs = next_deltas, next_zs, next_dys, next_Cs
    for at in range(full * U, steps):
        row = load_row(delta + at * (ON * DELTA_TIME), exists, EVEN) if DELTA_ROWS else raw
        dt = step_size(row, bias, SOFTPLUS)
        z_now = load_rows(z + at * (ON * Z_TIME), 0, exists, 1, HAS_Z, EVEN)[0]
        C_row = load_matrix(C + at * (ON * MATRIX_TIME), 0, states, n, 1, C_ROWS, EVEN)[0]
        grad = load_row(dy + at * (ON * DY_TIME), exists, EVEN).to(tl.float32) * (
            silu(z_now) if HAS_Z else 1.0
        )
        decay, turn, _ = hold(dt, A2, W2, False, COMPLEX)
        G = back(G + grad[:, None] * spread(C_row, C_tile, C_ROWS, False), decay, turn, COMPLEX)
        total += dt
    store_tile(grads_ptr + i.to(tl.int64) * n * d, G, channels, states, exists, d, n, EVEN)
    store_row(decays_ptr + i.to(tl.int64) * d + channels, total, exists, EVEN)


@triton.jit(do_not_specialize=LENGTHS)
def forward_sweep_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, B_tile_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dy_ptr, states_ptr, grads_ptr,
    terms_ptr, rest_ptr, flows_ptr, dz_ptr, sums_ptr, dC_ptr, table_ptr,
    rows, l, d, n, size, blocks, length, per_sequence, u_batch, delta_batch, z_batch, dy_batch,
    U_TIME: tl.constexpr, DELTA_TIME: tl.constexpr, Z_TIME: tl.constexpr, Y_TIME: tl.constexpr, DY_TIME: tl.constexpr,
    MATRIX_TIME: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, DELTA_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr, B_TILE: tl.constexpr, C_ROWS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    VARLEN: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, WARPS: tl.constexpr, MMA: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sweep a chunk forward: dz, the parts of dA, dC and dD, and sum_n A C dy a h of every step for the sweep back."""
    columns = (d // size) * blocks
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    group, channels, exists = block(j, blocks, size, BLOCK_D, VECTOR)
    states = tl.arange(0, N)
    batch, first, steps = place(i, table_ptr, l, length, per_sequence, VARLEN, REVERSE)
    A2, W2 = load_A(A_ptr, channels, states, exists, d, n, COMPLEX, EVEN)
    bias = load_row(bias_ptr + channels, exists, EVEN) if HAS_BIAS else 0.0
    skip = load_row(D_ptr + channels, exists, EVEN) if HAS_D else 0.0
    raw = 0.0 if DELTA_ROWS else load_row(delta_ptr + channels, exists, EVEN)
    B_tile = load_tile(B_tile_ptr, channels, states, exists, d, n, EVEN) if B_TILE else 0.0
    C_tile = 0.0 if C_ROWS else load_tile(C_ptr, channels, states, exists, d, n, EVEN)
    ON: tl.constexpr = -1 if REVERSE else 1
    row = batch * l + first
    u = u_ptr + batch * u_batch + first * U_TIME + channels
    delta = delta_ptr + batch * delta_batch + first * DELTA_TIME + channels
    z = z_ptr + batch * z_batch + first * Z_TIME + channels
    dy = dy_ptr + batch * dy_batch + first * DY_TIME + channels
    B = B_ptr + row * MATRIX_TIME + group * n
    C = C_ptr + row * MATRIX_TIME + group * n
    stride = rows.to(tl.int64) * MATRIX_TIME
    dC = dC_ptr + (j % blocks) * WARPS * stride + row * MATRIX_TIME + group * n
    dz = dz_ptr + row * Y_TIME + channels
    terms = terms_ptr + row * Y_TIME + channels
    rest = rest_ptr + row * Y_TIME + channels

    tile = i.to(tl.int64) * n * d
    h = load_tile(states_ptr + tile, channels, states, exists, d, n, EVEN)
    left = h
    by_A = tl.zeros((BLOCK_D, N), tl.float32)
    dA = tl.zeros((BLOCK_D, N), tl.float32)
    dA_swapped = dA if COMPLEX else 0.0
    pick = _pick_states(A2, states, WARPS, MMA, OPERAND)
    dC_tile = 0.0 if C_ROWS else tl.zeros((BLOCK_D, N), tl.float32)
    dD = tl.zeros((BLOCK_D,), tl.float32)
    if steps > 0:
        u_row = load_row(u, exists, EVEN)
        delta_row = load_row(delta, exists, EVEN) if DELTA_ROWS else raw
        z_row = load_row(z, exists, EVEN) if HAS_Z else 0.0
        dy_row = load_row(dy, exists, EVEN)
        B_row = load_states(B, states, n, EVEN) if B_ROWS else 0.0
        C_row = load_states(C, states, n, EVEN) if C_ROWS else 0.0
        for at in range(steps):
            t = tl.minimum(at + 1, steps - 1)
            next_u = load_row(u + t * (ON * U_TIME), exists, EVEN)
            next_delta = load_row(delta + t * (ON * DELTA_TIME), exists, EVEN) if DELTA_ROWS else raw
            next_z = load_row(z + t * (ON * Z_TIME), exists, EVEN) if HAS_Z else 0.0
            next_dy = load_row(dy + t * (ON * DY_TIME), exists, EVEN)
            next_B = load_states(B + t * (ON * MATRIX_TIME), states, n, EVEN) if B_ROWS else 0.0
            next_C = load_states(C + t * (ON * MATRIX_TIME), states, n, EVEN) if C_ROWS else 0.0

            wide = u_row.to(tl.float32)
            dt = step_size(delta_row, bias, SOFTPLUS)
            grad, slope = _split_gate(dy_row, z_row, HAS_Z)
            B_now = spread(B_row, B_tile, B_ROWS, B_TILE)
            C_now = spread(C_row, C_tile, C_ROWS, False)
            decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
            left = ahead(h, decay, turn, COMPLEX)
            h = left + (wide[:, None] * gain) * B_now
            if HAS_Z:
                out = tl.sum(C_now * h, 1)
                out = (out + skip * wide if HAS_D else out) * slope
                store_row(dz + at * (ON * Y_TIME), out, exists, EVEN)
            if C_ROWS:
                _store_sums(
                    dC + at * (ON * MATRIX_TIME),
                    grad[:, None] * h,
                    pick,
                    states,
                    n,
                    stride,
                    WARPS,
                    MMA,
                    OPERAND,
                )
            else:
                dC_tile += grad[:, None] * h
            if COMPLEX:
                term = tl.sum(C_now * times_A(left, A2, W2, COMPLEX), 1) * (grad * LN2)
            else:
                term = tl.sum(A2 * C_now * left, 1) * (grad * LN2)
            _store_terms(terms + at * (ON * Y_TIME), rest + at * (ON * Y_TIME), term, exists, SPLIT, EVEN)
            into = grad[:, None] * C_now
            by_A = ahead(by_A, decay, turn, COMPLEX) + dt[:, None] * left
            if ZOH:
                by_A += gain_by_A(dt, A2, decay) * B_now * wide[:, None]
            dA += into * by_A
            if COMPLEX:
                dA_swapped += into * swapped(by_A)
            dD += grad * wide
            u_row, delta_row, z_row, dy_row, B_row, C_row = (
                next_u,
                next_delta,
                next_z,
                next_dy,
                next_B,
                next_C,
            )
    G = load_tile(grads_ptr + tile, channels, states, exists, d, n, EVEN)
    sums = sums_ptr + i.to(tl.int64) * ((2 * n if COMPLEX else n) + 2) * d
    store_row(sums + channels, dD, exists, EVEN)
    store_tile(sums + 2 * d, dA + G * by_A, channels, states, exists, d, n, EVEN)
    if COMPLEX:
        dA_swapped += G * swapped(by_A)
        store_tile(sums + (2 + n) * d, dA_swapped, channels, states, exists, d, n, EVEN)
    # what the gradient of the state that leaves the chunk adds to sum_n A g_n of its last step
    flow = tl.sum(G * times_A(left, A2, W2, COMPLEX), 1) * LN2
    store_row(flows_ptr + i.to(tl.int64) * d + channels, flow, exists, EVEN)
    if not C_ROWS:
        store_tile(dC_ptr + tile, dC_tile, channels, states, exists, d, n, EVEN)


@triton.jit
def _split_gate(dy, z, HAS_Z: tl.constexpr):
    """The gradient of what the gate multiplies, and the factor that makes dz of it."""
    dy = dy.to(tl.float32)
    if HAS_Z:
        gate = z.to(tl.float32)
        slope = sigmoid(gate)
        opened = gate * slope
        return dy * opened, dy * (slope + opened * (1.0 - slope))
    else:  # noqa: RET505
        return dy, dy


@triton.jit(do_not_specialize=LENGTHS)
def backward_sweep_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, B_tile_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dy_ptr, grads_ptr,
    terms_ptr, rest_ptr, flows_ptr, du_ptr, d_delta_ptr, sums_ptr, dB_ptr, dB_tile_ptr, table_ptr,
    rows, l, d, n, size, blocks, length, per_sequence, u_batch, delta_batch, z_batch, dy_batch,
    U_TIME: tl.constexpr, DELTA_TIME: tl.constexpr, Z_TIME: tl.constexpr, Y_TIME: tl.constexpr, DY_TIME: tl.constexpr,
    MATRIX_TIME: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, DELTA_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr, B_TILE: tl.constexpr, C_ROWS: tl.constexpr, ZOH: tl.constexpr, COMPLEX: tl.constexpr,
    VARLEN: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, WARPS: tl.constexpr, MMA: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sweep a chunk backward from the gradient of the state it leaves: du, d delta, the parts of dB and d bias."""
    columns = (d // size) * blocks
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    group, channels, exists = block(j, blocks, size, BLOCK_D, VECTOR)
    states = tl.arange(0, N)
    batch, first, steps = place(i, table_ptr, l, length, per_sequence, VARLEN, REVERSE)
    A2, W2 = load_A(A_ptr, channels, states, exists, d, n, COMPLEX, EVEN)
    bias = load_row(bias_ptr + channels, exists, EVEN) if HAS_BIAS else 0.0
    skip = load_row(D_ptr + channels, exists, EVEN) if HAS_D else 0.0
    raw = 0.0 if DELTA_ROWS else load_row(delta_ptr + channels, exists, EVEN)
    B_tile = load_tile(B_tile_ptr, channels, states, exists, d, n, EVEN) if B_TILE else 0.0
    C_tile = 0.0 if C_ROWS else load_tile(C_ptr, channels, states, exists, d, n, EVEN)
    ON: tl.constexpr = 1 if REVERSE else -1
    last = first - ON * (steps - 1)
    row = batch * l + last
    u = u_ptr + batch * u_batch + last * U_TIME + channels
    delta = delta_ptr + batch * delta_batch + last * DELTA_TIME + channels
    z = z_ptr + batch * z_batch + last * Z_TIME + channels
    dy = dy_ptr + batch * dy_batch + last * DY_TIME + channels
    B = B_ptr + row * MATRIX_TIME + group * n
    C = C_ptr + row * MATRIX_TIME + group * n
    stride = rows.to(tl.int64) * MATRIX_TIME
    dB = dB_ptr + (j % blocks) * WARPS * stride + row * MATRIX_TIME + group * n
    du = du_ptr + row * Y_TIME + channels
    d_delta = d_delta_ptr + row * Y_TIME + channels
    terms = terms_ptr + row * Y_TIME + channels
    rest = rest_ptr + row * Y_TIME + channels

    tile = i.to(tl.int64) * n * d
    G = load_tile(grads_ptr + tile, channels, states, exists, d, n, EVEN)
    flow = load_row(flows_ptr + i.to(tl.int64) * d + channels, exists, EVEN)
    numbers = n // 2 if COMPLEX else n
    real = tl.arange(0, A2.shape[1])
    slowest = tl.max(A2 if EVEN else tl.where(real[None, :] < numbers, A2, float("-inf")), 1)
    pick = _pick_states(A2, states, WARPS, MMA, OPERAND)
    dB_tile = tl.zeros((BLOCK_D, N), tl.float32) if B_TILE else 0.0
    d_bias = tl.zeros((BLOCK_D,), tl.float32)
    if steps > 0:
        u_row = load_row(u, exists, EVEN)
        delta_row = load_row(delta, exists, EVEN) if DELTA_ROWS else raw
        z_row = load_row(z, exists, EVEN) if HAS_Z else 0.0
        dy_row = load_row(dy, exists, EVEN)
        high = load_row(terms, exists, EVEN)
        low = load_row(rest, exists, EVEN) if SPLIT else 0.0
        B_row = load_states(B, states, n, EVEN) if B_ROWS else 0.0
        C_row = load_states(C, states, n, EVEN) if C_ROWS else 0.0
        for at in range(steps):
            t = tl.minimum(at + 1, steps - 1)
            next_u = load_row(u + t * (ON * U_TIME), exists, EVEN)
            next_delta = load_row(delta + t * (ON * DELTA_TIME), exists, EVEN) if DELTA_ROWS else raw
            next_z = load_row(z + t * (ON * Z_TIME), exists, EVEN) if HAS_Z else 0.0
            next_dy = load_row(dy + t * (ON * DY_TIME), exists, EVEN)
            next_high = load_row(terms + t * (ON * Y_TIME), exists, EVEN)
            next_low = load_row(rest + t * (ON * Y_TIME), exists, EVEN) if SPLIT else 0.0
            next_B = load_states(B + t * (ON * MATRIX_TIME), states, n, EVEN) if B_ROWS else 0.0
            next_C = load_states(C + t * (ON * MATRIX_TIME), states, n, EVEN) if C_ROWS else 0.0

            wide = u_row.to(tl.float32)
            raw_now = delta_row.to(tl.float32) + bias
            dt = softplus(raw_now) if SOFTPLUS else raw_now
            # nothing flows through states that are gone within a step, and no rounding error of before
            kept = dt * slowest >= -24.0
            grad, _ = _split_gate(dy_row, z_row, HAS_Z)
            B_now = spread(B_row, B_tile, B_ROWS, B_TILE)
            C_now = spread(C_row, C_tile, C_ROWS, False)
            decay, turn, G, summed, held, through, by_gain = _sweep_backward(
                G, wide, dt, grad, B_now, C_now, A2, W2, ZOH, COMPLEX
            )
            # what follows the last step is in the flow that it begins with
            flow += _join(high, low, SPLIT) - tl.where(at > 0, through, 0.0)
            flow = tl.where(kept, flow, 0.0)
            d_raw = flow + by_gain
            if SOFTPLUS:
                d_raw *= sigmoid(raw_now)
            d_bias += d_raw
            store_row(du + at * (ON * Y_TIME), held + (skip * grad if HAS_D else 0.0), exists, EVEN)
            if DELTA_ROWS:
                store_row(d_delta + at * (ON * Y_TIME), d_raw, exists, EVEN)
            if B_ROWS:
                _store_sums(
                    dB + at * (ON * MATRIX_TIME), summed, pick, states, n, stride, WARPS, MMA, OPERAND
                )
            if B_TILE:
                dB_tile += summed
            G = back(G, decay, turn, COMPLEX)
            u_row, delta_row, z_row, dy_row, B_row, C_row = (
                next_u,
                next_delta,
                next_z,
                next_dy,
                next_B,
                next_C,
            )
            high, low = next_high, next_low
    sums = sums_ptr + i.to(tl.int64) * ((2 * n if COMPLEX else n) + 2) * d
    store_row(sums + d + channels, d_bias, exists, EVEN)
    if B_TILE:
        store_tile(dB_tile_ptr + tile, dB_tile, channels, states, exists, d, n, EVEN)


@triton.jit
def _sweep_backward(G, u, dt, grad, B, C, A2, W2, ZOH: tl.constexpr, COMPLEX: tl.constexpr):
    """One step backward: its decay and turn, the gradient of its state, and what it gives B u and delta."""
    later = B * G
    if COMPLEX:
        through = tl.sum(B * times_A_back(G, A2, W2, COMPLEX), 1) * (dt * u * LN2)
    G += grad[:, None] * C
    if ZOH:
        decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
        later *= gain
        held = tl.sum(gain * B * G, 1)
        through = tl.sum(A2 * later, 1) * u * LN2
        by_gain = u * tl.sum(decay * B * G, 1)
        summed = gain * G * u[:, None]
    else:
        both = tl.sum(B * G, 1)
        held = dt * both
        if not COMPLEX:
            through = tl.sum(A2 * later, 1) * (dt * u * LN2)
        by_gain = u * both
        summed = G * (dt * u)[:, None]
        decay, turn, gain = hold(dt, A2, W2, ZOH, COMPLEX)
    return decay, turn, G, summed, held, through, by_gain
