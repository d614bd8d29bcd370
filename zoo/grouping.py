"""Packed sequences as a few padded rectangles, for mixers that work on rows.

Sequences whose lengths have as many bits are the rows of one, so that half of it is full at least, and there are as
many as bits: a mixer is called a dozen times, and not once for each of some hundred sequences.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backend import is_transformed
from ..kernels.sequences import boundaries


class _Order(NamedTuple):
    """Where positions come from and go to, on the device of what is moved."""

    take: (
        Tensor  # (p,), of every position in the rectangles, one behind the other, its place in the packed row
    )
    padding: Tensor  # (p, 1), those that have none
    put: Tensor  # (l,), of every place in the row its position in the rectangles


class Groups:
    """The rectangles that hold the packed sequences of a row (l,).

    Attributes:
        lengths: of each rectangle, the lengths (g,) of the sequences that are its rows.
    """

    lengths: list[Tensor]

    def __init__(self, cu_seqlens: Tensor, l: int) -> None:
        by_bits: dict[int, list[tuple[int, int]]] = {}
        for start, end in pairwise(boundaries(cu_seqlens, l)):
            if start < end:
                by_bits.setdefault((end - start).bit_length(), []).append((start, end - start))
        take, padding = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
        self._shapes: list[tuple[int, int]] = []
        self.lengths = []
        for _, sequences in sorted(by_bits.items()):
            starts, lengths = torch.tensor(sequences).unbind(1)
            t = torch.arange(int(lengths.max()))
            inside = t < lengths[:, None]
            take.append(torch.where(inside, starts[:, None] + t, 0).flatten())
            padding.append(~inside.flatten())
            self._shapes.append((len(starts), len(t)))
            self.lengths.append(lengths.to(cu_seqlens.device))
        taken, none = torch.cat(take), torch.cat(padding)
        put = torch.empty(l, dtype=torch.long)
        put[taken[~none]] = torch.arange(len(taken))[~none]
        self._order = _Order(*(x.to(cu_seqlens.device) for x in (taken, none[:, None], put)))

    def split(self, x: Tensor) -> list[Tensor]:
        """The rectangles (..., g, m, d) of a row (..., l, d), zero where they are padded."""
        parts = _apart(x, self._order).split([g * m for g, m in self._shapes], -2)
        return [part.unflatten(-2, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The row (..., l, d) of which these are the rectangles (..., g, m, d); what padding holds is left out."""
        return _together(torch.cat([part.flatten(-3, -2) for part in parts], -2), self._order)


def grouped(cu_seqlens: Tensor, l: int) -> Groups:
    """The rectangles of packed sequences, made once however many layers ask."""
    version = None if cu_seqlens.is_inference() else (cu_seqlens._version, l)
    kept = getattr(cu_seqlens, "_groups", None)
    if version is None or kept is None or kept[0] != version:
        kept = cu_seqlens._groups = version, Groups(cu_seqlens, l)  # type: ignore[attr-defined]
    groups: Groups = kept[1]
    return groups


def _apart(x: Tensor, order: _Order) -> Tensor:
    if is_transformed():
        return x.index_select(-2, order.take).masked_fill(order.padding, 0)
    y: Tensor = _Apart.apply(x, order)  # type: ignore[no-untyped-call]
    return y


def _together(x: Tensor, order: _Order) -> Tensor:
    if is_transformed():
        return x.index_select(-2, order.put)
    y: Tensor = _Together.apply(x, order)  # type: ignore[no-untyped-call]
    return y


class _Apart(torch.autograd.Function):
    """Of the two, each is the other's gradient, which reads in order where PyTorch would add up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return x.index_select(-2, order.take).masked_fill_(order.padding, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _together(dy, ctx.order), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: _Order) -> Tensor:
        ctx.order = order
        return x.index_select(-2, order.put)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _apart(dy, ctx.order), None
