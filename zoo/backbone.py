"""The backbone every task shares: blocks in a row, between a frontend that makes vectors and a head that reads them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.sequences import check_lengths
from .block import Block
from .config import BackboneConfig
from .norms import build_norm
from .strands import join_strands, split_strands


class Blocks(nn.Module):
    """Blocks in a row on one residual stream; what the last of them adds comes apart from the stream."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(mixer, config) for mixer in config.mixers)
        self._scale_residual_projections()

    @torch.no_grad()
    def _scale_residual_projections(self) -> None:
        """Shrink what is added to the stream by the square root of how often that happens (GPT-2, section 2.3)."""
        additions = sum(2 if self.config.mlp_width(mixer) else 1 for mixer in self.config.mixers)
        for name, weight in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                weight.div_(math.sqrt(additions))

    @property
    def blocks(self) -> Iterator[Block]:
        return iter(self.layers)  # type: ignore[arg-type]

    def stream(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Any] | None]:
        """Add x (b, l, d_model) to the stream; return the same pair after the blocks and, if one came in, the state."""
        states = []
        for i, layer in enumerate(self.blocks):
            before = None if state is None else state[i]
            if self.config.checkpoint_activations and self.training and torch.is_grad_enabled():
                given = (x, residual, before, cu_seqlens, lengths)
                x, residual, after = checkpoint(layer, *given, use_reentrant=False)
            else:
                x, residual, after = layer(x, residual, before, cu_seqlens, lengths)
            states.append(after)
        return x, residual, None if state is None else states

    def stream_step(
        self, x: Tensor, residual: Tensor | None, state: list[Any]
    ) -> tuple[Tensor, Tensor | None, list[Any]]:
        """The same for one token x (b, d_model); the state is moved on in place."""
        for i, layer in enumerate(self.blocks):
            x, residual, state[i] = layer.step(x, residual, state[i])
        return x, residual, state

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[Any]:
        """The state before the first token of `batch` sequences."""
        return [layer.mixer.init_state(batch, device, dtype) for layer in self.blocks]


class Backbone(Blocks):
    """Map x (b, l, d_model) to y (b, l, d_model), causally; the state is a list, a layer's state each.

    A bidirectional one sees both sides and has no state. With reverse_complement x and y are (b, l, 2 d_model), the two
    strands side by side (strands.py), and the reverse complement of x is mapped to that of y.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        if config.prenorm:
            self.norm_f = build_norm(config)

    def forward(
        self,
        x: Tensor,
        *,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, list[Any] | None]:
        """Return y and, if a state came in, the state after the last step.

        With cu_seqlens, int32 (s + 1,) beside b = 1, x holds s sequences that do not see each other, and so do states.
        With lengths (b,) the first so many positions of a row are its sequence, and do not see what pads it.
        """
        if state is not None:
            self._require_a_state()
        if lengths is not None:
            check_lengths(lengths, *x.shape[:2])
        strands, packed, own = self.config.reverse_complement, cu_seqlens is not None, lengths
        if strands:
            x, cu_seqlens, lengths = split_strands(x, cu_seqlens, lengths)
        if self.config.bidirectional is None:
            # who reads ahead alone does not see what is behind
            lengths = None
        x, residual, state = self.stream(x, state=state, cu_seqlens=cu_seqlens, lengths=lengths)
        y = self._leave(x, residual)
        if strands:
            y = join_strands(y, own, packed=packed)
        return y, state

    def step(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Map one token x (b, d_model); the state is moved on in place."""
        self._require_a_state()
        x, residual, state = self.stream_step(x, None, state)
        return self._leave(x, residual), state

    def _leave(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The stream as it is read; the last block has normed it where norms come after layers."""
        return self.norm_f(x, residual)[0] if self.config.prenorm else x

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[Any]:
        self._require_a_state()
        return super().init_state(batch, device, dtype)

    def _require_a_state(self) -> None:
        if not self.config.causal:
            raise ValueError(
                "a backbone that is bidirectional or reads both strands (reverse_complement) has no state and takes "
                "no steps: give it whole sequences, or build it without both"
            )
