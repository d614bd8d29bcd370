"""The one face of everything that mixes along time."""

from typing import Any

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    """Mix x (b, l, d_model) along l, causally. `step` repeated over l equals `forward`."""

    in_proj: nn.Linear
    out_proj: nn.Linear

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
