"""One sequence in parts, a part on each rank of a group: what a mixer needs of the parts before its own.

The recurrence is linear: a part maps the state h that it starts from to P h + e, where e is the state that it ends in
from zero and P = exp(A sum_t delta_t) its decay (Mamba, equation 2, multiplied out). All parts find their e and sum of
delta at once, one exchange hands them to all ranks, and each folds up those before it to where its part truly starts.
What the outputs ask of the states goes back the same way, folded from the last part to the first.

The exchange is b d (n + 1) numbers a rank and layer forward and b d n backward, however long the parts; that of the
convolution is b d (k - 1) either way.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """The ranks that share a sequence, in its order, and which of them this is."""

    group: Any
    rank: int
    size: int

    def inputs_before(self, x: Tensor, count: int) -> Tensor:
        """The last `count` steps (b, count, d) of the part before x (b, l, d), all as long; zeros before the first."""
        return _shift(x[:, x.shape[1] - count :], self)

    def others(self, A: Tensor) -> "Others":
        """The parts of one scan that are on the other ranks, for `selective_scan_part`."""
        return Others(self, A.detach())

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape."""
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        return gathered


@dataclass
class Others:
    """The parts of one scan on other ranks; see kernels/scan_part.py."""

    parts: Parts
    A: Tensor
    totals: list[Tensor] = field(default_factory=list)

    def start(self, end: Tensor, total: Tensor) -> Tensor:
        told = self.parts.gather(torch.cat([total.flatten(), _numbers(end)]))
        self.totals = [numbers[: total.numel()].view_as(total) for numbers in told]
        start = torch.zeros_like(end)
        for rank in range(self.parts.rank):
            start = self._decay(rank) * start + _states(told[rank][total.numel() :], end)
        return start

    def end_gradient(self, d_start: Tensor) -> Tensor:
        asked = self.parts.gather(_numbers(d_start))
        d_end = torch.zeros_like(d_start)
        for rank in range(self.parts.size - 1, self.parts.rank, -1):
            d_end = self._decay(rank).conj() * d_end + _states(asked[rank], d_start)
        return d_end

    def _decay(self, rank: int) -> Tensor:
        """What a part leaves of a state, (b, d, n)."""
        return torch.exp(self.totals[rank].unsqueeze(-1) * self.A)


class _Shift(torch.autograd.Function):
    """Hand a tensor on to the next rank, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        gathered = parts.gather(x)
        return gathered[parts.rank - 1] if parts.rank else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts: Parts = ctx.parts
        gathered = parts.gather(gradient)
        return gathered[parts.rank + 1] if parts.rank + 1 < parts.size else torch.zeros_like(gradient), None


_shift: Any = _Shift.apply


def _numbers(state: Tensor) -> Tensor:
    """A state as a row of real numbers."""
    return (torch.view_as_real(state) if state.is_complex() else state).flatten()


def _states(numbers: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_numbers`."""
    return torch.view_as_complex(numbers.view(*like.shape, 2)) if like.is_complex() else numbers.view_as(like)
