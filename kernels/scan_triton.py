"""The selective scan in Triton: three launches forward, four backward, the state in memory at chunk bounds alone.

    h_t = a_t h_{t-1} + x_t,  a_t = exp(delta_t A),  x_t = gain_t B_t u_t,   y_t = C_t . h_t     (Mamba, equation 2)

A warp holds some channels with all their states in registers, a lane a channel or two, so that sums over states stay
within a lane, and walks over a chunk of time; a program is one warp or a few. Chunks run side by side: a first kernel
finds what each adds to the state, a small one carries the state from chunk to chunk (the decay of a whole chunk is
exp(A sum delta)), a third writes y.

The backward carries gradients from chunk to chunk in the same way, sweeps every chunk forward from the state that
enters it, and then backward from the gradient of the state that leaves it. Sums over channels, dB and dC, leave a
program as partial sums: no atomics, and so the same result to the bit from run to run.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .integers import cdiv, next_power_of_2
from .scan_triton_backward import backward_sweep_kernel, chunk_grads_kernel, forward_sweep_kernel
from .scan_triton_forward import carry_kernel, chunk_states_kernel, matrices_kernel, scan_fwd_kernel
from .sequences import by_rows, chunk_table


class _Tile(NamedTuple):
    """Channels of a warp, registers that a lane may take, and steps whose loads are in flight together."""

    channels: int
    registers: int
    steps: int = 1


# the fastest of those measured on sm_90; other architectures have as many registers. More channels share the loads of B
# and C, more steps hide latency, and both take registers
_TILES = {
    "chunk_states_kernel": _Tile(64, 168, 4),
    "scan_fwd_kernel": _Tile(64, 128, 2),
    "chunk_grads_kernel": _Tile(64, 168, 4),
    "forward_sweep_kernel": _Tile(64, 255),
    "backward_sweep_kernel": _Tile(64, 168),
}
# steps of a chunk: short ones make more programs, long ones fewer states to carry
_LENGTHS = (256, 128, 64)
# programs of one warp that run at once on a multiprocessor, by the registers that they take
_AT_ONCE = (8, 12, 16)
# elements of matrices that a program lays out
_MATRIX = 1024
# states that a program of the carry takes, and chunks whose loads are in flight together
_CARRY_STATES, _CARRY_CHUNKS = 128, 8


class _Plan(NamedTuple):
    """How a scan is cut: steps of a chunk, chunks of a sequence (0 for packed ones), chunks in all."""

    length: int
    per_sequence: int
    chunks: int


@functools.cache
def _names(kernel: Any) -> tuple[str, ...]:
    """What a kernel's arguments are called."""
    return tuple(kernel.arg_names)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many a GPU has; as many as an H100 where there is none to ask."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def _plan(u: Tensor, sequences: int | None) -> _Plan:
    b, l, d = u.shape
    at_once = [programs * _multiprocessors(u.device) for programs in _AT_ONCE]

    def cost(length: int) -> float:
        programs = b * cdiv(l, length) * cdiv(d, 64)
        waves = sum(cdiv(programs, number) for number in at_once)
        # a chunk's state and its gradient, written and read by every kernel, cost about sixteen steps
        return waves * (length + 16)

    length = min(_LENGTHS, key=cost)
    if sequences is not None:
        return _Plan(length, 0, l // length + sequences)
    per_sequence = cdiv(l, length)
    return _Plan(length, per_sequence, b * per_sequence)


def empty_starts(u: Tensor, A: Tensor, sequences: int | None) -> Tensor:
    """Room (k, n, d) for what scan_fwd keeps for scan_bwd, the states that enter chunks; of complex ones both parts."""
    n = A.shape[1] * (1 + A.is_complex())
    return u.new_empty(_plan(u, sequences).chunks, n, u.shape[2], dtype=torch.float32)


class _Scan:
    """One scan as its kernels see it: rows by their strides, float32 matrices with channels last, a plan."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        B_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        discretization: str,
    ) -> None:
        self.complex = A.is_complex()
        if self.complex:
            # real and imaginary parts as columns; A's one after the other
            A = torch.view_as_real(A).mT.flatten(1)
            B, C = _pairs(B), _pairs(2 * C.conj_physical())
            B_bias = None if B_bias is None else _pairs(B_bias)
        (self.b, self.l, self.d), self.n = u.shape, A.shape[1]
        self.groups = max(x.shape[2] if x.ndim == 4 else 1 for x in (B, C))
        self.size = self.d // self.groups
        self.N = max(2, next_power_of_2(self.n))
        # sums over channels go through the matrix units where they need not be more exact than what they end up in
        narrow = all(x.dtype == torch.bfloat16 for x in (u, B, C) if x.ndim > 2)
        self.mma = narrow and self.N == 16 and not self.complex
        self.plain = discretization == "euler" and B_bias is None and all(x.ndim > 2 for x in (delta, B, C))
        # warps of a program read the same B and C from the cache nearest to them
        self.warps = next((w for w in (4, 2) if self.mma and self.size % (64 * w) == 0), 1)
        sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.plan = _plan(u, sequences)
        self.sequences = self.b if sequences is None else sequences
        u, z = by_rows(u), None if z is None else by_rows(z)
        delta = by_rows(delta) if delta.ndim == 3 else delta.contiguous()
        table = counts = u
        if cu_seqlens is not None:
            table, counts = chunk_table(cu_seqlens, self.plan.length, self.plan.chunks, reverse)
        A, B, C = self._matrices(A, B, C)
        own = B if B_bias is None else B_bias.t().contiguous()
        # what kernels are given, each what it takes; a tensor that is absent is never read
        self.arguments: dict[str, Any] = {
            "u_ptr": u,
            "delta_ptr": delta,
            "A_ptr": A,
            "B_ptr": B,
            "B_tile_ptr": own,
            "C_ptr": C,
            "D_ptr": u if D is None else D.contiguous(),
            "z_ptr": u if z is None else z,
            "bias_ptr": u if delta_bias is None else delta_bias.contiguous(),
            "table_ptr": table,
            "counts_ptr": counts,
            "rows": self.b * self.l,
            "l": self.l,
            "d": self.d,
            "n": self.n,
            "size": self.size,
            "length": self.plan.length,
            "per_sequence": self.plan.per_sequence,
            "u_batch": u.stride(0),
            "delta_batch": delta.stride(0) if delta.ndim == 3 else 0,
            "z_batch": 0 if z is None else z.stride(0),
            "U_TIME": u.stride(1),
            "DELTA_TIME": delta.stride(1) if delta.ndim == 3 else 0,
            "Z_TIME": 0 if z is None else z.stride(1),
            "Y_TIME": self.d,
            "MATRIX_TIME": self.groups * self.n,
            "N": self.N,
            "SOFTPLUS": delta_softplus,
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "HAS_BIAS": delta_bias is not None,
            "DELTA_ROWS": delta.ndim == 3,
            "B_ROWS": B.ndim > 2,
            "B_TILE": own.ndim == 2,
            "C_ROWS": C.ndim > 2,
            "ZOH": discretization == "zoh",
            "COMPLEX": self.complex,
            "VARLEN": cu_seqlens is not None,
            "REVERSE": reverse,
            "WARPS": self.warps,
            "MMA": self.mma,
            # the interpreter multiplies no bfloat16
            "OPERAND": tl.bfloat16 if u.is_cuda else tl.float32,
        }

    def _matrices(self, A: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
        """A log2(e) and constant B and C (d, n) -> (n, d);  selective ones -> (b, l, g, n);  float32"""
        given = [x.unsqueeze(2) if x.ndim == 3 else x for x in (B, C)]
        found = [A.new_empty(self.n, self.d)]
        for x in given:
            if x.ndim == 2:
                found.append(x.float().t().contiguous())
            elif x.dtype == torch.float32 and x.shape[2] == self.groups and x.is_contiguous():
                found.append(x)
            else:
                found.append(A.new_empty(self.b, self.l, self.groups, self.n))
        made = [new is not x and x.ndim > 2 for new, x in zip(found[1:], given, strict=True)]
        strides = [x.expand(-1, -1, self.groups, -1).stride() if x.ndim > 2 else (0, 0, 0, 0) for x in given]
        rows, width = self.b * self.l, self.groups * self.n
        blocks = cdiv(self.n * self.d, _MATRIX) + any(made) * cdiv(rows * width, _MATRIX)
        matrices_kernel[(blocks,)](
            A, *given, *found, rows, self.l, self.d, self.n, width, *A.stride(), *strides[0], *strides[1],
            HAS_B=made[0], HAS_C=made[1], BLOCK=_MATRIX, num_warps=4,
        )  # fmt: skip
        return found

    def channels(self, kernel: Any) -> int:
        # of more states than fit the registers of a lane, fewer channels; complex ones take twice as many
        widest = 512 if self.complex else 1024
        return min(_TILES[kernel.__name__].channels, widest // self.N) * self.warps

    def blocks(self, kernel: Any) -> int:
        """Blocks of channels in a group."""
        return cdiv(self.size, self.channels(kernel))

    def launch(self, kernel: Any, *, chunks: int | None = None, **own: Any) -> None:
        """Run a kernel on every chunk and block of channels, with its own arguments beside those that all share."""
        tile, channels, blocks = _TILES[kernel.__name__], self.channels(kernel), self.blocks(kernel)
        chunks = self.plan.chunks if chunks is None else chunks
        if not chunks:
            return
        cut = {
            "blocks": blocks,
            "BLOCK_D": channels,
            "VECTOR": max(1, channels // (32 * self.warps)),
            "U": tile.steps,
            "EVEN": self.size % channels == 0 and self.n == self.N,
        }
        given = self._of(kernel, **cut, **own)
        # the exact hold and tiles of constant matrices need all registers there are; only NVIDIA's compiler is told
        limit = {"maxnreg": tile.registers if self.plain else 255} if torch.version.cuda else {}
        kernel[(chunks * self.groups * blocks,)](**given, **limit, num_warps=self.warps)

    def _of(self, kernel: Any, **own: Any) -> dict[str, Any]:
        """The arguments that a kernel takes, of its own and of those that all share."""
        given = self.arguments | own
        return {name: given[name] for name in _names(kernel)}

    def summarize(self, kernel: Any, *, whole: bool, **own: Any) -> None:
        """Run a kernel that says what each chunk makes of zero; of the last that it comes to only if it is `whole`."""
        if whole or self.arguments["VARLEN"]:
            self.launch(kernel, BUT_ONE=False, **own)
        else:
            self.launch(kernel, chunks=self.plan.chunks - self.sequences, BUT_ONE=True, **own)

    def carry(
        self, states: Tensor, decays: Tensor, first: Tensor | None, *, backward: bool, whole: bool
    ) -> Tensor | None:
        """Replace what chunks make of zero by what enters them, in place; return what leaves the last (s, n, d).

        Not `whole`, nothing is known to leave the last.
        """
        last = states.new_empty(self.sequences, self.n, self.d) if whole else None
        numbers = self.n * self.d // (1 + self.complex)
        own = {
            "states_ptr": states, "first_ptr": states if first is None else first, "HAS_FIRST": first is not None,
            "decays_ptr": decays, "last_ptr": states if last is None else last, "HAS_LAST": last is not None,
            "BLOCK": _CARRY_STATES, "U": _CARRY_CHUNKS, "BACKWARD": backward,
        }  # fmt: skip
        blocks = self.sequences * cdiv(numbers, _CARRY_STATES)
        carry_kernel[(blocks,)](**self._of(carry_kernel, **own), num_warps=1)
        return last

    def partial_sums(self, like: Tensor, kernel: Any, kept: Tensor) -> Tensor:
        """Room for the parts of a gradient: of each chunk (k, n, d), or each block of channels (k, b l, g, n)."""
        if like.ndim == 2:
            return torch.empty_like(kept)
        # sums of what was rounded to 16 bits are not kept in more
        dtype = torch.bfloat16 if self.mma else torch.float32
        parts = self.blocks(kernel) * self.warps
        return kept.new_empty(parts, self.b * self.l, self.groups, self.n, dtype=dtype)

    def unmatrix(self, parts: Tensor, like: Tensor) -> Tensor:
        """A gradient in the shape of B or C, from partial sums (k, n, d) or (k, b l, g, n)."""
        total = parts.sum(0)
        if like.ndim == 2:
            return self.number(total.t())
        total = total.view(self.b, self.l, self.groups, self.n)
        if like.ndim == 3:
            return self.number(total.sum(2) if self.groups > 1 else total[:, :, 0])
        return self.number(total if like.shape[2] == self.groups else total.sum(2, keepdim=True))

    def number(self, x: Tensor) -> Tensor:
        """Columns (..., n) as what they stand for: complex ones (..., n / 2) where they are pairs."""
        return torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) if self.complex else x

    def unstate(self, x: Tensor) -> Tensor:
        """(s, n, d) -> (s, d, n)"""
        return self.number(x.transpose(1, 2))

    def unstep(self, dA: Tensor) -> Tensor:
        """dA (d, n) from sums over chunks (n, d), of complex states of G h' and of G times the other of h'."""
        if not self.complex:
            return dA.t().clone(memory_format=torch.contiguous_format)
        real, imaginary = dA.view(2, self.n // 2, 2, self.d)
        return torch.complex(real.sum(1), imaginary[:, 1] - imaginary[:, 0]).t().contiguous()


def _pairs(x: Tensor) -> Tensor:
    """Complex numbers (..., n) -> their parts (..., 2 n)"""
    return torch.view_as_real(x).flatten(-2)


def _states(x: Tensor | None) -> Tensor | None:
    """(s, d, n) -> (s, n, d), float32"""
    if x is None:
        return None
    return (_pairs(x) if x.is_complex() else x.float()).transpose(1, 2).contiguous()


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y (b, l, d), the last states (b or s, d, n) and, for scan_bwd, those that enter chunks (k, n, d).

    Last states that are not asked for are None. `start` gives the initial state once it is known what becomes of zero
    (scan_part.py).
    """
    scan = _Scan(
        u, delta, A, B, C, D, z, delta_bias, B_bias, cu_seqlens, delta_softplus, reverse, discretization
    )
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    kept = empty_starts(u, A, None if cu_seqlens is None else scan.sequences)
    decays = kept.new_empty(scan.plan.chunks, scan.d)
    whole = return_final_state or start is not None
    scan.summarize(chunk_states_kernel, whole=whole, states_ptr=kept, decays_ptr=decays)
    if start is not None:
        end = scan.carry(kept.clone(), decays, None, backward=False, whole=True)
        assert end is not None
        initial_state = start(scan.unstate(end), decays.view(scan.b, -1, scan.d).sum(1))
    last = scan.carry(kept, decays, _states(initial_state), backward=False, whole=whole)
    scan.launch(scan_fwd_kernel, states_ptr=kept, y_ptr=y)
    return y, None if last is None else scan.unstate(last), kept


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

    `end_gradient` gives d_final once it is known what y alone asks of the initial state (scan_part.py).
    """
    scan = _Scan(
        u, delta, A, B, C, D, z, delta_bias, B_bias, cu_seqlens, delta_softplus, reverse, discretization
    )
    dy = torch.zeros_like(u, memory_format=torch.contiguous_format) if dy is None else by_rows(dy)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    # where delta is constant this is only a place for what one sweep hands to the other
    d_delta = torch.empty_like(du, dtype=delta.dtype if delta.ndim == 3 else u.dtype)
    dz = None if z is None else torch.empty_like(du, dtype=z.dtype)
    terms, rest = du, d_delta
    if 4 in (du.element_size(), d_delta.element_size()):
        terms = rest = du if du.element_size() == 4 else d_delta
    split = terms.element_size() == 2
    shared = {
        "dy_ptr": dy,
        "dy_batch": dy.stride(0),
        "DY_TIME": dy.stride(1),
        "SPLIT": split,
        "terms_ptr": terms.view(torch.uint16) if split else terms,
        "rest_ptr": rest.view(torch.uint16) if split else rest,
    }
    scan.arguments |= shared

    grads, (chunks, n, d) = torch.empty_like(kept), kept.shape
    decays, flows = kept.new_empty(chunks, d), kept.new_empty(chunks, d)
    # of every chunk dD (d,), d bias (d,) and dA (n, d), of complex states two
    sums = kept.new_empty(chunks, 2 + n * (1 + scan.complex), d)
    whole = initial_state is not None
    scan.summarize(
        chunk_grads_kernel, whole=whole or end_gradient is not None, grads_ptr=grads, decays_ptr=decays
    )
    if end_gradient is not None:
        d_start = scan.carry(grads.clone(), decays, None, backward=True, whole=True)
        assert d_start is not None
        d_final = end_gradient(scan.unstate(d_start))
    d_initial = scan.carry(grads, decays, _states(d_final), backward=True, whole=whole)
    parts = scan.partial_sums(C, forward_sweep_kernel, kept)
    scan.launch(
        forward_sweep_kernel, states_ptr=kept, grads_ptr=grads, flows_ptr=flows,
        dz_ptr=du if dz is None else dz, sums_ptr=sums, dC_ptr=parts,
    )  # fmt: skip
    dC = scan.unmatrix(parts, C)
    # room for the next ones
    del parts
    parts = scan.partial_sums(B, backward_sweep_kernel, kept)
    own = parts if B_bias is None else torch.empty_like(kept)
    scan.launch(
        backward_sweep_kernel, grads_ptr=grads, flows_ptr=flows,
        du_ptr=du, d_delta_ptr=d_delta, sums_ptr=sums, dB_ptr=parts, dB_tile_ptr=own,
    )  # fmt: skip
    total = sums.sum(0)
    return (
        du,
        d_delta if delta.ndim == 3 else total[1].clone(),
        scan.unstep(total[2:]),
        scan.unmatrix(parts, B),
        2 * dC.conj_physical() if scan.complex else dC,
        None if D is None else total[0].clone(),
        dz,
        None if delta_bias is None else total[1],
        None if B_bias is None else scan.unmatrix(own, B_bias),
        None if d_initial is None else scan.unstate(d_initial),
    )
