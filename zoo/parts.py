"""One sequence in parts, a part on each rank of a group: what a mixer needs of the parts before its own.

The recurrence is linear: a part maps the state h that it starts from to P h + e, where e is the state that it ends in
from zero and P = exp(A sum_t delta_t) its decay (Mamba, equation 2, multiplied out). Every part finds its own e and sum
of delta at once, one exchange hands all of them to all ranks, and each folds up those before it and scans its part from
where it truly starts. Gradients of the states go the same way back, folded from the last part to the first.

The exchange is b d (n + 1) numbers a rank and layer forward, b d n backward, however long the parts; the convolution's
is b d (k - 1) either way. The first part starts from zero, so that its one scan is both, and of the last part's end
nobody asks: of two parts each is scanned once, the second one after the first. Parts between them are scanned twice. To
add C_t exp(A sum delta) h to every y instead is a second scan as well, of as many exponentials; and a first scan of
which only the end is asked for can leave y out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.scan import selective_scan


@dataclass(frozen=True)
class Parts:
    """The ranks that share a sequence, in its order, and which of them this is."""

    group: Any
    rank: int
    size: int

    def inputs_before(self, x: Tensor, count: int) -> Tensor:
        """The last `count` steps (b, count, d) of the part before x (b, l, d), all as long; zeros before the first."""
        return _shift(x[:, x.shape[1] - count :], self)

    def scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
        delta_bias: Tensor, discretization: str,
    ) -> Tensor:  # fmt: skip
        """`selective_scan` of the whole sequence, this part of it, with a softplus of delta."""
        values: dict[str, Any] = {
            "delta_bias": delta_bias, "delta_softplus": True, "discretization": discretization
        }  # fmt: skip
        wide = torch.promote_types(A.real.dtype, u.dtype)
        total = F.softplus(delta.to(wide) + delta_bias.to(wide))
        total = total.sum(1) if delta.ndim == 3 else (total * u.shape[1]).expand(len(u), -1)
        if self.rank == 0:
            y, end = selective_scan(u, delta, A, B, C, D, z, return_final_state=True, **values)
            y, _ = _hand_off(y, total, A, end, self)
            return y
        end = torch.zeros(len(u), *A.shape, dtype=A.dtype, device=A.device)
        if self.rank < self.size - 1:
            _, end = selective_scan(u, delta, A, B, C, return_final_state=True, **values)
        _, start = _hand_off(None, total, A, end, self)
        y, _ = selective_scan(u, delta, A, B, C, D, z, initial_state=start, **values)
        return y

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor of this shape."""
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        return gathered


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


class _HandOff(torch.autograd.Function):
    """From the states that all parts end in to that where this one starts; y passes, so that every rank takes part."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor | None, total: Tensor, A: Tensor, end: Tensor, parts: Parts
    ) -> tuple[Tensor | None, Tensor]:
        told = torch.cat([total.flatten(), _numbers(end)])
        gathered = [told.split([total.numel(), told.numel() - total.numel()]) for told in parts.gather(told)]
        totals = torch.stack([total_.view_as(total) for total_, _ in gathered])
        start = torch.zeros_like(end)
        for (_, end_), total_ in zip(gathered[: parts.rank], totals, strict=False):
            start = torch.exp(total_.unsqueeze(-1) * A) * start + _states(end_, end)
        ctx.parts = parts
        ctx.save_for_backward(totals, A, start)
        return None if y is None else y.view_as(y), start

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_start: Tensor) -> tuple[Any, ...]:
        parts: Parts = ctx.parts
        totals, A, start = ctx.saved_tensors
        gathered = parts.gather(_numbers(d_start))
        # what the parts behind this one ask of the state that it ends in
        d_end = torch.zeros_like(start)
        for rank in range(parts.size - 1, parts.rank, -1):
            decay = torch.exp(totals[rank].unsqueeze(-1) * A)
            d_end = decay.conj() * d_end + _states(gathered[rank], start)
        total = totals[parts.rank].unsqueeze(-1)
        d_exponent = (torch.exp(total * A) * start).conj() * d_end
        d_total = (A.conj() * d_exponent).sum(-1)
        return dy, d_total.real, (total * d_exponent).sum(0), d_end, None


_shift: Any = _Shift.apply
_hand_off: Any = _HandOff.apply


def _numbers(state: Tensor) -> Tensor:
    """A state as a row of real numbers."""
    return (torch.view_as_real(state) if state.is_complex() else state).flatten()


def _states(numbers: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_numbers`."""
    return torch.view_as_complex(numbers.view(*like.shape, 2)) if like.is_complex() else numbers.view_as(like)
