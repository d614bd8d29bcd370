"""How sequences lie in memory: (b, l, d) with channels side by side, a row each or packed into one row."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .backend import is_transformed


def boundaries(cu_seqlens: Tensor, l: int) -> list[int]:
    """Where packed sequences begin and end, (s + 1,), as numbers; on a GPU this waits for what is under way.

    Raises:
        ValueError: when they do not rise from 0 to l.
    """
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != l or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to l = {l}, not {bounds if len(bounds) < 20 else bounds[:20]}"
        )
    return bounds


def chunk_table(cu_seqlens: Tensor, length: int, chunks: int, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The chunks of packed sequences, (first time, steps), and where each sequence's begin; nothing synchronises.

    Args:
        cu_seqlens: int32 (s + 1,).
        length: the steps of a chunk, of which a sequence's last has what is left.
        chunks: as many as there may be; those that there are not have no steps.
        reverse: go through every sequence from its last time to its first.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = torch.zeros_like(cu_seqlens)
    counts[1:] = ((ends - starts + length - 1) // length).cumsum(0)
    i = torch.arange(chunks, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(counts[1:], i, right=True).clamp(max=len(starts) - 1)
    done = (i - counts[sequence]) * length
    steps = (ends[sequence] - starts[sequence] - done).clamp(0, length)
    first = ends[sequence] - 1 - done if reverse else starts[sequence] + done
    return torch.stack([first, steps], dim=1).to(torch.int32), counts


def by_rows(x: Tensor) -> Tensor:
    """(..., d) with neighbouring channels side by side, in place where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_boundaries(cu_seqlens: Tensor, l: int) -> None:
    """Refuse what `boundaries` refuses: each tensor is read once, however many layers it goes through.

    While a graph is compiled or captured there are no values to read. What inference mode made does not count its
    changes, and is read every time.
    """
    if _without_values(cu_seqlens):
        return
    seen = _seen(cu_seqlens, l)
    if seen is None or getattr(cu_seqlens, "_boundaries_seen", None) != seen:
        boundaries(cu_seqlens, l)
        _mark_seen(cu_seqlens, l)


def mirrored(cu_seqlens: Tensor, l: int) -> Tensor:
    """The boundaries of the same sequences in the row (b, l, ...) read from its end, its flip along l."""
    check_boundaries(cu_seqlens, l)
    mirror = l - cu_seqlens.flip(0)
    # what is right stays right, and is not looked at again
    _mark_seen(mirror, l)
    return mirror


def joined(first: Tensor, second: Tensor, l: int) -> Tensor:
    """The boundaries of a row of length l and of another, of the same length, put behind it."""
    for bounds in (first, second):
        check_boundaries(bounds, l)
    both = torch.cat([first, l + second[1:]])
    _mark_seen(both, 2 * l)
    return both


def check_lengths(lengths: Tensor, b: int, l: int) -> None:
    """Refuse lengths that are not those of b sequences in rows of l; a GPU's are looked at for their number alone."""
    wrong = lengths.shape != (b,)
    if not wrong and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = bool(((lengths < 0) | (lengths > l)).any())
    if wrong:
        raise ValueError(f"lengths must be ({b},), each from 0 to {l}, not {lengths.tolist()}")


def reverse(x: Tensor, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Reverse every sequence of x (b, l, ...) where it lies: rows, the first lengths (b,) of them, or packed ones."""
    if lengths is None and cu_seqlens is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    if lengths is not None:
        # what is longer than its row must not reach into the next
        lengths = lengths.clamp(max=x.shape[1])
        order = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)
        rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        return _rearrange(x, (rows + order).flatten())
    assert cu_seqlens is not None
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds, t, right=True) - 1
    return _rearrange(x, bounds[sequence] + bounds[sequence + 1] - 1 - t)


def _rearrange(x: Tensor, order: Tensor) -> Tensor:
    """Positions of x (b, l, ...) in another order (b l,), which leads back when it is taken twice."""
    if is_transformed():
        return x.flatten(0, 1).index_select(0, order).view(x.shape)
    y: Tensor = _Rearrange.apply(x, order)  # type: ignore[no-untyped-call]
    return y


class _Rearrange(torch.autograd.Function):
    """So that gradients are read in order, as values are, where PyTorch would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.flatten(0, 1).index_select(0, order).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _rearrange(dy, order), None


def _without_values(cu_seqlens: Tensor) -> bool:
    # a compiler cannot trace what asks for a capture
    if torch.compiler.is_compiling() or cu_seqlens.is_meta:
        return True
    return cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()


def _mark_seen(cu_seqlens: Tensor, l: int) -> None:
    if not _without_values(cu_seqlens):
        cu_seqlens._boundaries_seen = _seen(cu_seqlens, l)  # type: ignore[attr-defined]


def _seen(cu_seqlens: Tensor, l: int) -> tuple[int, int] | None:
    return None if cu_seqlens.is_inference() else (cu_seqlens._version, l)
