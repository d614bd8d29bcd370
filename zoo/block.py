"""One layer: normalise the residual stream, mix along time, add; then, where there is one, the same with an MLP."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, BidirectionalAttention
from .bidirectional import Bidirectional
from .config import BackboneConfig
from .lstm import LSTM
from .mamba import Mamba
from .mixer import Mixer
from .norms import build_norm
from .s4d import S4D


def build_mixer(name: str, config: BackboneConfig) -> Mixer:
    """The mixer that a backbone's pattern calls `name`."""
    if config.bidirectional is None:
        return _build_one(name, config)
    if name == "attention":
        return BidirectionalAttention(config.d_model, config.attention)
    tied = config.bidirectional == "tied"
    return Bidirectional(_build_one(name, config), _build_one(name, config), tied=tied)


def _build_one(name: str, config: BackboneConfig) -> Mixer:
    builders: dict[str, Callable[[], Mixer]] = {
        "mamba": lambda: Mamba(config.d_model, config.mamba),
        "s4d": lambda: S4D(config.d_model, config.s4d),
        "attention": lambda: Attention(config.d_model, config.attention),
        "lstm": lambda: LSTM(config.d_model, config.lstm),
    }
    return builders[name]()


class MLP(nn.Module):
    """The gated MLP, silu(x W1) * (x W2) projected back (Shazeer, 2002.05202)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """A layer. What the layer before it adds comes apart from the stream, so that adding and norming fuse.

    Where norms come after layers, the stream comes as one, without a residual apart.
    """

    def __init__(self, mixer: str, config: BackboneConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = build_mixer(mixer, config)
        self.prenorm, self.dropout = config.prenorm, config.dropout
        self.scale = _build_scale(config)
        if width := config.mlp_width(mixer):
            self.norm2 = build_norm(config)
            self.mlp = MLP(config.d_model, width)
            self.scale2 = _build_scale(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """x (b, l, d_model) is to be added to the residual stream; return the same pair one layer on, and the state."""
        x, residual = self._enter(self.norm, x, residual)
        # where a row ends matters to what sees both sides alone
        ends = {} if lengths is None else {"lengths": lengths}
        x, state = self.mixer(x, state=state, cu_seqlens=cu_seqlens, **ends)
        x, residual = self._leave(self.norm, self.scale, x, residual)
        x, residual = self._feed_forward(x, residual)
        return x, residual, state

    def step(self, x: Tensor, residual: Tensor | None, state: Any) -> tuple[Tensor, Tensor | None, Any]:
        """The same for one token x (b, d_model)."""
        x, residual = self._enter(self.norm, x, residual)
        x, state = self.mixer.step(x, state)
        x, residual = self._leave(self.norm, self.scale, x, residual)
        x, residual = self._feed_forward(x, residual)
        return x, residual, state

    def _feed_forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "mlp"):
            x, residual = self._enter(self.norm2, x, residual)
            x, residual = self._leave(self.norm2, self.scale2, self.mlp(x), residual)
        return x, residual

    def _enter(self, norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a layer reads, and the stream that it adds to."""
        return norm(x, residual) if self.prenorm else (x, x)

    def _leave(
        self, norm: nn.Module, scale: Tensor | None, x: Tensor, stream: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What a layer adds, and the stream; or their sum, normed, and nothing apart from it."""
        x = x if scale is None else x * scale.to(x.dtype)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return (x, stream) if self.prenorm else (norm(x.to(stream.dtype), stream)[0], None)


def _build_scale(config: BackboneConfig) -> nn.Parameter | None:
    """What each channel counts of what a mixer or MLP adds, (d_model,); None is all of it."""
    if config.layer_scale is None:
        return None
    return nn.Parameter(torch.full((config.d_model,), config.layer_scale))
