"""Packed sequences as a few padded rectangles, for mixers that work on rows.

Sequences whose lengths have as many bits are the rows of one, so that half of it is full at least, and there are as
many as bits: a mixer is called a dozen times, and not once for each of some hundred sequences.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.backend import is_transformed
from ..kernels.sequences import boundaries


class _Order(NamedTuple):
    """Where positions come from and go to, on the device of what is moved."""

    take: Tensor  # (p,), the place in the row of every position in the rectangles, one behind the other
    padding: Tensor  # (p, 1), those that have none
    put: Tensor  # (l,), of every place in the row its position in the rectangles


class Groups:
    """The rectangles that hold the packed sequences of a row (l,).

    Args:
        cu_seqlens: where sequences begin and end, (s + 1,).
        l: the length of the row.
        device: of what is moved.
        longest: of a sequence that is not alone in its rectangle; None is any.

    Attributes:
        lengths: of each rectangle, the lengths (g,) of the sequences that are its rows.
    """

    lengths: list[Tensor]

    def __init__(
        self, cu_seqlens: Tensor, l: int, device: torch.device | None = None, longest: int | None = None
    ) -> None:
        kinds: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for start, end in pairwise(boundaries(cu_seqlens, l)):
            alone = longest is not None and end - start > longest
            if start < end:
                kind = ((end - start).bit_length(), start if alone else -1)
                kinds.setdefault(kind, []).append((start, end - start))
        take, padding = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.bool)]
        self._shapes: list[tuple[int, int]] = []
        self.lengths = []
        for _, sequences in sorted(kinds.items()):
            starts, lengths = torch.tensor(sequences).unbind(1)
            t = torch.arange(int(lengths.max()))
            inside = t < lengths[:, None]
            take.append(torch.where(inside, starts[:, None] + t, 0).flatten())
            padding.append(~inside.flatten())
            self._shapes.append((len(starts), len(t)))
            self.lengths.append(lengths.to(device))
        taken, none = torch.cat(take), torch.cat(padding)
        put = torch.empty(l, dtype=torch.long)
        put[taken[~none]] = torch.arange(len(taken))[~none]
        self._order = _Order(*(x.to(device) for x in (taken, none[:, None], put)))

    def split(self, x: Tensor) -> list[Tensor]:
        """The rectangles (..., g, m, d) of a row (..., l, d), zero where they are padded."""
        parts = _apart(x, self._order).split([g * m for g, m in self._shapes], -2)
        return [part.unflatten(-2, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The row (..., l, d) of which these are the rectangles (..., g, m, d); what padding holds is left out."""
        return _together(torch.cat([part.flatten(-3, -2) for part in parts], -2), self._order)


# of boundaries that were asked for, what they were when they were, and their rectangles
_kept = WeakTensorKeyDictionary()


def grouped(cu_seqlens: Tensor, x: Tensor, longest: int | None = None) -> Groups:
    """The rectangles of the sequences of x (..., l, d), made once for all layers that ask.

    What inference mode made does not count its changes, and is read every time.
    """
    l = x.shape[-2]
    if cu_seqlens.is_inference() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Groups(cu_seqlens, l, x.device, longest)
    asked = cu_seqlens._version, l, x.device, longest
    known, groups = _kept.get(cu_seqlens, (None, None))
    if known != asked:
        groups = Groups(cu_seqlens, l, x.device, longest)
        _kept[cu_seqlens] = asked, groups
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
