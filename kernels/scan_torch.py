"""The selective scan in PyTorch operations, fast on a CPU: only the recurrence walks over time in Python.

    h_t = decay_t h_{t-1} + gain_t B_t u_t,   y_t = C_t . h_t        (Mamba, equations 2 and 4)

A tile is a stretch of time of a few sequences, laid out (t, rows, g, n, e) with d = g * e. Time comes first, so that
one step of the recurrence is one fused multiply-add on contiguous memory; channels come last, so that delta,
u and y broadcast over states. The state is kept only where a tile starts. The backward recomputes a tile from
there and runs the adjoint down the same tile:

    G_t = C_t dy_t + decay_{t+1} G_{t+1}

Memory is O(b l d) and a few tiles that fit the cache; (b, l, d, n) never exists. Packed sequences whose
starts allow it are folded into rows of equal length: many short walks side by side are over sooner than a long one.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact_hold import gain_gradients, phi
from .sequences import boundaries

# elements of one tile and of one of its steps: large against the cost of a call, small against the cache
_TILE = {"cpu": 1 << 20, "cuda": 1 << 26}
_STEP = {"cpu": 1 << 16, "cuda": 1 << 23}
# the state is kept once a tile: over 16 steps or more, that takes no more memory than u at n = 16
_SHORTEST, _LONGEST = 16, 256


def scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    B_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    discretization: str,
    *,
    return_final_state: bool = True,
    start: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (b, l, d), the last states (b or s, d, n) and, for scan_bwd, the states where tiles start.

    The last states cost nothing and are there also when nobody asks. `start` gives the initial state once it is known
    what becomes of zero (scan_part.py), by a scan of its own.
    """
    if start is not None:
        flags = (delta_softplus, reverse, discretization)
        _, end, _ = scan_fwd(u, delta, A, B, C, None, None, delta_bias, B_bias, None, None, *flags)
        scan = _Scan(u, delta, A, B, C, delta_bias, B_bias, None, None, *flags)
        initial_state = start(end, scan.batch_first(scan.delta).sum(1))
    scan = _Scan(
        u,
        delta,
        A,
        B,
        C,
        delta_bias,
        B_bias,
        initial_state,
        cu_seqlens,
        delta_softplus,
        reverse,
        discretization,
    )
    y = torch.empty_like(scan.u)
    final = scan.initial.clone()
    kept = empty_starts(u, A, None if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    starts = scan.starts(kept)
    starts[0] = 0 if scan.packed else scan.initial
    buffers = scan.buffers(2)
    for k, time, rows in scan.tiles():
        decay, h = scan.cut(buffers, time, rows)
        scan.run(time, rows, starts[k, rows], decay, h)
        y[time, rows] = _read(scan.C[time, rows], h)
        if k + 1 < scan.count:
            starts[k + 1, rows] = h[-1]
        elif not scan.packed:
            final[rows] = h[-1]
        for i, t, row in scan.ending(time, rows):
            final[i] = h[t, row]
    out = scan.batch_first(y)
    if D is not None:
        out.addcmul_(u.to(scan.dtype), D.to(scan.dtype))
    if z is not None:
        out.mul_(F.silu(z.to(scan.dtype)))
    return out.to(u.dtype).contiguous(), scan.channels_first(scan.in_order(final)), kept


def scan_bwd(
    dy: Tensor | None,
    d_final: Tensor | None,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    B_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    discretization: str,
    end_gradient: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state; None for what is absent.

    Gradients of complex tensors follow PyTorch's convention. `end_gradient` gives d_final once it is known what y alone
    asks of the initial state (scan_part.py), by a backward of its own.
    """
    if end_gradient is not None:
        *_, asked = scan_bwd(
            dy, None, kept, u, delta, A, B, C, D, z, delta_bias, B_bias, initial_state, cu_seqlens,
            delta_softplus, reverse, discretization,
        )  # fmt: skip
        assert asked is not None
        d_final = end_gradient(asked)
    scan = _Scan(
        u,
        delta,
        A,
        B,
        C,
        delta_bias,
        B_bias,
        initial_state,
        cu_seqlens,
        delta_softplus,
        reverse,
        discretization,
    )
    dy = torch.zeros_like(u, dtype=scan.dtype) if dy is None else dy.to(scan.dtype)
    ungated = dy if z is None else dy * F.silu(z.to(scan.dtype))
    # with complex A, y is twice the real part
    dy_scan = scan.time_first(2 * ungated if A.is_complex() else ungated)
    y, du, d_delta = (torch.empty_like(scan.u) for _ in range(3))
    dA, dB, dC = torch.zeros_like(scan.A), scan.matrix_sum(B), scan.matrix_sum(C)
    d_B_bias = None if B_bias is None else torch.zeros_like(scan.A)
    starts = scan.starts(kept)
    # a sequence's entry holds the gradient of its last state until the walk back reaches its start
    d_initial = torch.zeros_like(scan.initial)
    if d_final is not None:
        d_initial += scan.states_first(scan.in_order(d_final))
    after = torch.zeros_like(starts[0]) if scan.packed else d_initial
    buffers = scan.buffers(3)
    for k, time, rows in scan.tiles(backward=True):
        decay, h, G = scan.cut(buffers, time, rows)
        scan.run(time, rows, starts[k, rows], decay, h)
        delta_tile, u_tile, dy_tile = scan.delta[time, rows], scan.u[time, rows], dy_scan[time, rows]
        B_tile, C_tile = scan.B[time, rows], scan.C[time, rows]
        if z is not None:
            y[time, rows] = _read(C_tile, h)
        scan.add(dC, time, rows, h.conj(), dy_tile)

        torch.mul(C_tile.conj(), dy_tile, out=G)
        for i, t, row in scan.ending(time, rows):
            G[t, row] += d_initial[i]
        G[-1] += after[rows]
        factors = decay.conj()
        for now, later, factor in _backwards(G, factors):
            now.addcmul_(factor, later)

        if scan.zoh:
            gain, gain_delta, gain_A = gain_gradients(delta_tile, scan.A)
            d_input = G * gain.conj()
            scan.add(dB, time, rows, d_input, u_tile)
            if d_B_bias is not None:
                scan.add(d_B_bias, time, rows, d_input, u_tile)
            B_tile = scan.biased(B_tile)
            du[time, rows] = _real(_sum_states(B_tile.conj(), d_input))
            d_gain = G * B_tile.conj() * u_tile
            d_delta[time, rows] = _real(d_gain * gain_delta.conj()).sum(3, keepdim=True)
            dA += (d_gain * gain_A.conj()).sum((0, 1))
        else:
            scan.add(dB, time, rows, G, delta_tile * u_tile)
            d_input = _real(_sum_states(B_tile.conj(), G))
            if scan.B_bias is not None and d_B_bias is not None:
                scan.add(d_B_bias, time, rows, G, delta_tile * u_tile)
                d_input += _real(_sum_states(scan.B_bias.conj().expand_as(G), G))
            du[time, rows] = d_input * delta_tile
            d_delta[time, rows] = d_input * u_tile

        # the gradient of delta A, conj(decay_t h_{t-1}) G_t, takes the place of the decays
        flow = torch.mul(factors, G, out=decay)
        after[rows] = flow[0]
        flow[0] *= starts[k, rows].conj()
        flow[1:] *= h[:-1].conj()
        for i, t, row in scan.starting(time, rows):
            d_initial[i] = torch.exp(delta_tile[t, row] * scan.A).conj() * G[t, row]
            flow[t, row] = d_initial[i] * scan.initial[i].conj()
        dA += torch.mul(flow, delta_tile, out=G).sum((0, 1))
        d_delta[time, rows] += _real(torch.mul(flow, scan.A.conj(), out=G)).sum(3, keepdim=True)

    du, d_raw, out = scan.batch_first(du), scan.batch_first(d_delta), scan.batch_first(y)
    dD = dz = None
    if delta_softplus:
        raw = scan.raw_delta.expand_as(d_raw)
        torch.ops.aten.softplus_backward.grad_input(d_raw, raw, 1, 20, grad_input=d_raw)
    if D is not None:
        dD = (ungated * u).sum((0, 1))
        du.addcmul_(ungated, D.to(scan.dtype))
        out.addcmul_(u.to(scan.dtype), D.to(scan.dtype))
    if z is not None:
        dz = torch.ops.aten.silu_backward.grad_input(out.mul_(dy), z.to(scan.dtype), grad_input=out)
    return (
        du,
        d_raw if delta.ndim == 3 else d_raw.sum((0, 1)),
        scan.channels_first(dA),
        scan.unmatrix(dB, B),
        scan.unmatrix(dC, C),
        dD,
        dz,
        None if delta_bias is None else d_raw.sum((0, 1)),
        None if d_B_bias is None else scan.channels_first(d_B_bias),
        None if initial_state is None else scan.channels_first(scan.in_order(d_initial)),
    )


def empty_starts(u: Tensor, A: Tensor, sequences: int | None) -> Tensor:
    """Room (k, d, n) for what scan_fwd keeps for scan_bwd, which no value of cu_seqlens changes."""
    b, l, _ = u.shape
    # folded rows are _SHORTEST long or longer, so that no more than every other tile is a shorter one
    tiles = _tiling(b, l, u, A)[2] * b if sequences is None else -(-l // _SHORTEST) * 2
    dtype = torch.promote_types(A.dtype, torch.promote_types(u.dtype, torch.float32))
    return u.new_empty(tiles, *A.shape, dtype=dtype)


def _tiling(b: int, l: int, u: Tensor, A: Tensor) -> tuple[int, int, int]:
    """Rows and time steps of a tile, and how many tiles cover the time."""
    device, size = u.device.type, A.shape[0] * A.shape[1]
    rows = max(1, min(b, _STEP[device] // size))
    time = max(_SHORTEST, min(_LONGEST, _TILE[device] // (rows * size)))
    return rows, time, -(-l // time)


def _fold(bounds: list[int], l: int) -> int:
    """The most rows of equal length, _SHORTEST or longer, that packed sequences can be folded into: none spans two."""
    known = set(bounds)
    for length in bounds:
        if length >= _SHORTEST and l % length == 0 and known.issuperset(range(length, l, length)):
            return l // length
    return 1


class _Scan:
    """One scan as its tiles see it: forward in time, at least fp32, every tensor shaped to broadcast over a tile."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        B_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        discretization: str,
    ) -> None:
        b, l, _ = self.shape = u.shape
        self.n = A.shape[1]
        self.g = max(matrix.shape[2] if matrix.ndim == 4 else 1 for matrix in (B, C))
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.state_dtype = torch.promote_types(A.dtype, self.dtype)
        self.reverse, self.packed, self.zoh = reverse, cu_seqlens is not None, discretization == "zoh"

        bounds = [0, l] if cu_seqlens is None else boundaries(cu_seqlens, l)
        if reverse:
            bounds = [l - t for t in reversed(bounds)]
        # rows of l steps: the batch, or what one packed row is folded into
        self.b = _fold(bounds, l) if self.packed else b
        self.l = b * l // self.b
        self.sequences = list(pairwise(bounds)) if self.packed else []
        self.rows, self.time, self.count = _tiling(self.b, self.l, u, A)

        self.raw_delta = delta.to(self.dtype) if delta_bias is None else delta.to(self.dtype) + delta_bias
        step = F.softplus(self.raw_delta) if delta_softplus else self.raw_delta
        self.u, self.delta = self.time_first(u), self.time_first(step.expand_as(u))
        self.A, self.B, self.C = self.states_first(A), self.matrix(B), self.matrix(C)
        self.B_bias = None if B_bias is None else self.states_first(B_bias)
        if initial_state is None:
            self.initial = self.A.new_zeros(len(self.sequences) if self.packed else b, *self.A.shape)
        else:
            self.initial = self.states_first(self.in_order(initial_state))

    def in_order(self, state: Tensor) -> Tensor:
        """Put the states of packed sequences in the order in which the scan meets them, or back."""
        return state.flip(0) if self.reverse and self.packed else state

    def rows_of(self, x: Tensor) -> Tensor:
        """(b, l, ...) as given -> (l, b, ...) as scanned: forward, folded, time first"""
        x = x.flip(1) if self.reverse else x
        return x.reshape(self.b, self.l, *x.shape[2:]).transpose(0, 1)

    def given(self, x: Tensor) -> Tensor:
        """The inverse of `rows_of`."""
        x = x.transpose(0, 1).reshape(*self.shape[:2], *x.shape[2:])
        return x.flip(1) if self.reverse else x

    def time_first(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (l, b, g, 1, e)"""
        return self.rows_of(x.to(self.dtype)).unflatten(2, (self.g, 1, -1))

    def batch_first(self, x: Tensor) -> Tensor:
        """(l, b, g, 1, e) -> (b, l, d)"""
        return self.given(x.flatten(2))

    def states_first(self, x: Tensor) -> Tensor:
        """(..., d, n) -> (..., g, n, e)"""
        return x.to(self.state_dtype).unflatten(-2, (self.g, -1)).transpose(-1, -2).contiguous()

    def channels_first(self, x: Tensor) -> Tensor:
        """(..., g, n, e) -> (..., d, n)"""
        return x.transpose(-1, -2).flatten(-3, -2)

    def matrix(self, x: Tensor) -> Tensor:
        """Constant (d, n) -> (l, b, g, n, e);  selective (b, l, n) or (b, l, g, n) -> (l, b, g, n, 1)"""
        if x.ndim == 2:
            return self.states_first(x).expand(self.l, self.b, -1, -1, -1)
        x = self.rows_of((x if x.ndim == 4 else x.unsqueeze(2)).to(self.state_dtype))
        return x.expand(-1, -1, self.g, -1).unsqueeze(4)

    def matrix_sum(self, x: Tensor) -> Tensor:
        """Zeros to add the gradient of B or C in: constant (g, n, e), selective (l, b, g, n, 1)"""
        return (
            torch.zeros_like(self.A) if x.ndim == 2 else self.A.new_zeros(self.l, self.b, self.g, self.n, 1)
        )

    def add(self, total: Tensor, time: slice, rows: slice, wide: Tensor, narrow: Tensor) -> None:
        """Add wide (t, rows, g, n, e) * narrow (t, rows, g, 1, e), summed over what the matrix is constant along."""
        if total.ndim == 3:
            total += (wide * narrow).sum((0, 1))
        else:
            total[time, rows] = wide @ narrow.to(wide.dtype).transpose(-1, -2)

    def unmatrix(self, total: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`, for a gradient."""
        if like.ndim == 2:
            return self.channels_first(total)
        total = self.given(total.squeeze(4))
        if like.ndim == 3:
            return total.sum(2)
        return total if like.shape[2] == self.g else total.sum(2, keepdim=True)

    def tiles(self, *, backward: bool = False) -> Iterator[tuple[int, slice, slice]]:
        """Walk the tiles in the order of the recurrence: the number of the tile in time, its time, its rows."""
        for row in range(0, self.b, self.rows):
            for k in reversed(range(self.count)) if backward else range(self.count):
                time = slice(k * self.time, min(self.l, (k + 1) * self.time))
                yield k, time, slice(row, min(self.b, row + self.rows))

    def buffers(self, number: int) -> list[Tensor]:
        return [self.A.new_empty(min(self.time, self.l) * self.rows * self.A.numel()) for _ in range(number)]

    def cut(self, buffers: list[Tensor], time: slice, rows: slice) -> list[Tensor]:
        """Shape buffers as one tile."""
        shape = (time.stop - time.start, rows.stop - rows.start, *self.A.shape)
        size = shape[0] * shape[1] * self.A.numel()
        return [buffer[:size].view(shape) for buffer in buffers]

    def starts(self, kept: Tensor) -> Tensor:
        """What scan_fwd keeps, (k, d, n), as the states where tiles start (tile, b, g, n, e)."""
        return kept[: self.count * self.b].view(self.count, self.b, *self.A.shape)

    def starting(self, time: slice, rows: slice) -> Iterator[tuple[int, int, int]]:
        """The packed sequences that start in a tile: their number, and at what time and row of the tile."""
        for i, (start, end) in enumerate(self.sequences):
            row, t = divmod(start, self.l)
            if start < end and time.start <= t < time.stop and rows.start <= row < rows.stop:
                yield i, t - time.start, row - rows.start

    def ending(self, time: slice, rows: slice) -> Iterator[tuple[int, int, int]]:
        """The packed sequences whose last step is in a tile: their number, and its time and row in the tile."""
        for i, (start, end) in enumerate(self.sequences):
            row, t = divmod(end - 1, self.l)
            if start < end and time.start <= t < time.stop and rows.start <= row < rows.stop:
                yield i, t - time.start, row - rows.start

    def biased(self, B: Tensor) -> Tensor:
        """B of a tile with what is added to it in every channel."""
        return B if self.B_bias is None else B + self.B_bias

    def run(self, time: slice, rows: slice, before: Tensor, decay: Tensor, h: Tensor) -> None:
        """Fill a tile with the decays and the states that follow `before`; where a sequence starts, the decay is 0."""
        delta, u, B = self.delta[time, rows], self.u[time, rows], self.B[time, rows]
        torch.mul(delta, self.A, out=decay)
        if self.zoh:
            torch.mul(delta * phi(decay), u * self.biased(B), out=h)
        else:
            torch.mul(delta * u, B, out=h)
            if self.B_bias is not None:
                h.addcmul_((delta * u).to(h.dtype), self.B_bias)
        decay.exp_()
        for i, t, row in self.starting(time, rows):
            h[t, row].addcmul_(decay[t, row], self.initial[i])
            decay[t, row] = 0
        h[0].addcmul_(decay[0], before)
        for now, earlier, factor in zip(h[1:].unbind(), h.unbind(), decay[1:].unbind(), strict=False):
            now.addcmul_(factor, earlier)


def _backwards(G: Tensor, factors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(G_t, G_{t+1}, factor_{t+1}) from the last pair of a tile to the first."""
    rows = G.unbind()
    return zip(rows[-2::-1], rows[:0:-1], factors.unbind()[:0:-1], strict=True)


def _sum_states(matrix: Tensor, h: Tensor) -> Tensor:
    """Sum matrix (t, rows, g, n, 1 or e) * h (t, rows, g, n, e) over the states."""
    if matrix.shape[-1] == 1:
        return matrix.transpose(-1, -2) @ h
    return (matrix * h).sum(3, keepdim=True)


def _read(C: Tensor, h: Tensor) -> Tensor:
    y = _sum_states(C, h)
    return 2 * y.real if y.is_complex() else y


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
