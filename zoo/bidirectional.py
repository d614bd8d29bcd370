"""Mixing from both sides: a mixer of what came before over the sequence, and a second one over its reverse, added.

    y = mix(x) + reverse(mix'(reverse(x)))        (BiMamba; Caduceus, 2403.03234, section 3.1)

A sequence is reversed within its row, and what pads the row stays behind it, where no direction sees it. A row that
packs sequences is reversed as a whole: they come last to first then, each of them from its end, within boundaries that
are mirrored. So the kernels need to know no second direction. Attention needs none of this: it sees both sides at once
(attention.py).
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..kernels.sequences import mirrored, reverse
from .mixer import Mixer, refuse_a_state


class Bidirectional(Mixer):
    """Two mixers, one for each direction. It sees the future, so that there is no state and no step.

    Args:
        left_to_right, right_to_left: the mixers.
        tied: use in_proj and out_proj of the first for both; they are then computed once.
    """

    def __init__(self, left_to_right: Mixer, right_to_left: Mixer, *, tied: bool) -> None:
        super().__init__()
        self.left_to_right, self.right_to_left, self.tied = left_to_right, right_to_left, tied
        if tied:
            del right_to_left.in_proj, right_to_left.out_proj

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if state is not None:
            refuse_a_state()
        bounds = None if cu_seqlens is None else mirrored(cu_seqlens, x.shape[1])
        ahead, back = self.left_to_right, self.right_to_left
        if not self.tied:
            y, _ = ahead(x, cu_seqlens=cu_seqlens)
            other, _ = back(reverse(x, lengths=lengths), cu_seqlens=bounds)
            return y + reverse(other, lengths=lengths), None
        projected = ahead.in_proj(x)
        y, _ = ahead.mix(projected, cu_seqlens=cu_seqlens)
        other, _ = back.mix(reverse(projected, lengths=lengths), cu_seqlens=bounds)
        return ahead.out_proj(y + reverse(other, lengths=lengths)), None

    def step(self, x: Tensor, state: Any) -> NoReturn:
        refuse_a_state()

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        refuse_a_state()
