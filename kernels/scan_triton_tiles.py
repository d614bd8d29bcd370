"""What the kernels of the selective scan share: how a program finds its part, and the arithmetic of a step.

A complex state is a pair of columns, its real part and its imaginary part, which exp(delta A) turns and shrinks. B and
C are pairs as well, C such that a plain sum over columns is the real part of a product.

A program holds a tile (BLOCK_D, N), some channels with all their states, in the registers of its warps. It walks over a
chunk of time in groups of U steps, whose loads are under way while the group before is worked on; what does not
fill a group at the end of a chunk is walked over a step at a time, and the sweeps of the backward, whose registers are
full, take one step at a time throughout. Strides are compile-time constants, so that an
address is a base and an offset in the instruction: they are a model's widths, never its lengths.
"""

import triton
import triton.language as tl

from .triton_math import LN2, LN2_TURNS, expm1_over, rotation, softplus

# arguments that change with every batch: no kernel is compiled anew for their values
LENGTHS = ("l", "rows", "per_sequence")


@triton.jit
def step_size(raw, bias, SOFTPLUS: tl.constexpr):
    delta = raw.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return delta


@triton.jit
def load_A(ptr, channels, states, exists, d, n, COMPLEX: tl.constexpr, EVEN: tl.constexpr):
    """A log2(e) (BLOCK_D, N); of a complex one the real part (BLOCK_D, N / 2), and the imaginary part, else 0."""
    if COMPLEX:
        pairs = tl.arange(0, states.shape[0] // 2)
        real = load_tile(ptr, channels, pairs, exists, d, n // 2, EVEN)
        return real, load_tile(ptr + (n // 2) * d, channels, pairs, exists, d, n // 2, EVEN)
    else:  # noqa: RET505
        return load_tile(ptr, channels, states, exists, d, n, EVEN), 0.0


@triton.jit
def _pairs(first, second):
    """Tiles (BLOCK_D, N / 2) as columns that alternate (BLOCK_D, N)."""
    both = tl.join(first, second)
    return tl.reshape(both, (both.shape[0], both.shape[1] * 2))


@triton.jit
def swapped(x):
    """x (BLOCK_D, N) with the columns of every pair exchanged."""
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return _pairs(second, first)


@triton.jit
def hold(delta, A2, W2, ZOH: tl.constexpr, COMPLEX: tl.constexpr):
    """The decay over a step (BLOCK_D, N) and the gain of B u, (BLOCK_D, N) or (BLOCK_D, 1); A2 is A log2(e).

    Of a complex A2 + i W2 the decay is what multiplies a state, and the turn what multiplies the other of its pair.
    """
    x2 = delta[:, None] * A2
    decay = tl.exp2(x2)
    gain = delta[:, None]
    turn = 0.0
    if COMPLEX:
        cosine, sine = rotation((delta * LN2_TURNS)[:, None] * W2)
        turn = _pairs(decay * -sine, decay * sine)
        decay = _pairs(decay * cosine, decay * cosine)
    if ZOH:
        gain = gain * expm1_over(x2 * LN2, decay)
    return decay, turn, gain


@triton.jit
def ahead(h, decay, turn, COMPLEX: tl.constexpr):
    """The state a step on, exp(delta A) h."""
    return decay * h + turn * swapped(h) if COMPLEX else decay * h


@triton.jit
def back(G, decay, turn, COMPLEX: tl.constexpr):
    """The gradient a step before, by the transpose of what takes states ahead."""
    return decay * G - turn * swapped(G) if COMPLEX else decay * G


@triton.jit
def times_A(x, A2, W2, COMPLEX: tl.constexpr):
    """A log2(e) x"""
    return _pairs(A2, A2) * x + _pairs(-W2, W2) * swapped(x) if COMPLEX else A2 * x


@triton.jit
def times_A_back(G, A2, W2, COMPLEX: tl.constexpr):
    """The same, transposed: <times_A(x), G> = <x, times_A_back(G)>."""
    return _pairs(A2, A2) * G - _pairs(-W2, W2) * swapped(G) if COMPLEX else A2 * G


@triton.jit
def gain_by_A(delta, A2, decay):
    """The derivative by A of the exact hold's gain, delta^2 phi'(delta A) with phi(x) = (exp(x) - 1) / x."""
    x = delta[:, None] * A2 * LN2
    series = 0.5 + x * (0.33333333 + x * (0.125 + x * (0.033333333 + x * (0.0069444444 + x * 0.0011904762))))
    safe = tl.where(x == 0.0, 1.0, x)
    slope = tl.where(tl.abs(x) < 0.25, series, (decay - (decay - 1.0) / safe) / safe)
    return delta[:, None] * delta[:, None] * slope


@triton.jit
def place(i, table_ptr, l, length, per_sequence, VARLEN: tl.constexpr, REVERSE: tl.constexpr):
    """Chunk i: its batch row, the time of its first step in the order of the scan, and its number of steps."""
    if VARLEN:
        batch = 0
        first = tl.load(table_ptr + i * 2)
        steps = tl.load(table_ptr + i * 2 + 1)
    else:
        batch = i // per_sequence
        first = (i % per_sequence) * length
        steps = tl.minimum(length, l - first)
        if REVERSE:
            first = l - 1 - first
    return batch.to(tl.int64), first.to(tl.int64), steps


@triton.jit
def block(j, blocks, size, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr):
    """Block j of the channels: its group, its channels, and which of them exist."""
    group = j // blocks
    own = (j % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    # the hint gives a lane VECTOR neighbouring channels and, of each, all states
    return group, tl.max_contiguous(group * size + own, VECTOR), own < size


@triton.jit
def load_tile(ptr, channels, states, exists, d, n, EVEN: tl.constexpr):
    """A tile (BLOCK_D, N) of a matrix (n, d)."""
    where = ptr + channels[:, None] + states[None, :] * d
    if EVEN:
        return tl.load(where)
    return tl.load(where, mask=exists[:, None] & (states < n)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, channels, states, exists, d, n, EVEN: tl.constexpr):
    where = ptr + channels[:, None] + states[None, :] * d
    if EVEN:
        tl.store(where, value)
    else:
        tl.store(where, value, mask=exists[:, None] & (states < n)[None, :])


@triton.jit
def load_row(ptr, exists, EVEN: tl.constexpr):
    """What the channels hold at a step (BLOCK_D,), as it is in memory."""
    if EVEN:
        return tl.load(ptr)
    return tl.load(ptr, mask=exists, other=0.0)


@triton.jit
def store_row(ptr, value, exists, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_states(ptr, states, n, EVEN: tl.constexpr):
    """B or C (N,) at a step."""
    if EVEN:
        return tl.load(ptr + states)
    return tl.load(ptr + states, mask=states < n, other=0.0)


@triton.jit
def load_rows(ptr, STRIDE: tl.constexpr, exists, U: tl.constexpr, WANTED: tl.constexpr, EVEN: tl.constexpr):
    """The rows of U steps; zeros, which cost nothing, where they are not wanted."""
    rows = ()
    for k in tl.static_range(U):
        rows = rows + ((load_row(ptr + k * STRIDE, exists, EVEN) if WANTED else 0.0),)  # noqa: RUF005
    return rows


@triton.jit
def load_matrix(
    ptr, STRIDE: tl.constexpr, states, n, U: tl.constexpr, WANTED: tl.constexpr, EVEN: tl.constexpr
):
    """B or C (N,) at U steps."""
    rows = ()
    for k in tl.static_range(U):
        rows = rows + ((load_states(ptr + k * STRIDE, states, n, EVEN) if WANTED else 0.0),)  # noqa: RUF005
    return rows
