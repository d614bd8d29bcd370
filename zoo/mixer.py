"""The one face of everything that mixes along time."""

from collections.abc import Callable
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def refuse_a_state() -> NoReturn:
    """What a mixer that sees both sides does when it is asked for a state, or for a step from one."""
    raise ValueError("a bidirectional mixer sees the future and has no state: give it whole sequences")


class Mixer(nn.Module):
    """Mix x (b, l, d_model) along l, causally. `step` repeated over l equals `forward`."""

    in_proj: nn.Module
    out_proj: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[list[tuple[int, int]], Any] | None = None

    def forward(
        self, x: Tensor, *, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return y (b, l, d_model) and, if a state came in, the state after the last step, else None.

        With cu_seqlens, int32 (s + 1,) beside b = 1, x holds s sequences that do not see each other, and so do states.
        """
        raise NotImplementedError

    def mix(
        self, projected: Tensor, *, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """What `forward` does between in_proj and out_proj, which two directions may share."""
        raise NotImplementedError

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Mix one token x (b, d_model); the state is moved on in place."""
        raise NotImplementedError

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token of `batch` sequences."""
        raise NotImplementedError

    def keep(self, weights: list[Tensor], compute: Callable[[], T]) -> T:
        """What `compute` makes of weights: a token's step has time for little else, so it is kept while they stay."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, compute())
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        # training may change weights where no version counts it, in a captured graph
        self._kept = None
        return super().train(mode)
