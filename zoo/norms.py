"""What normalises the residual stream before a layer reads it: add to the stream, which stays in float32, then norm.

Every norm maps x (..., d), and the stream that x is to be added to, to y (..., d) in x's dtype and the new stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.norm import rms_norm
from .config import BackboneConfig


def build_norm(config: BackboneConfig) -> nn.Module:
    """The norm over d_model channels that a config names."""
    kinds = {"rms": RMSNorm, "layer": LayerNorm, "batch": BatchNorm}
    return kinds[config.norm](config.d_model, config.norm_eps)


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, fused with the addition (kernels/norm.py)."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.weight, residual=residual, eps=self.eps)


class LayerNorm(nn.Module):
    """Subtract the mean over channels, and divide by the standard deviation (Ba et al., 1607.06450)."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        stream = _add(x, residual)
        weight, bias = self.weight.to(stream.dtype), self.bias.to(stream.dtype)
        return F.layer_norm(stream, weight.shape, weight, bias, self.eps).to(x.dtype), stream


class BatchNorm(nn.Module):
    """Norm every channel by its mean and variance over all positions of a batch (Ioffe and Szegedy, 1502.03167).

    That is while training: padding counts, sequences, packed ones too, see each other's statistics, and every device
    counts its own share of a batch. What was usual then, a running mean, is what evaluation norms by. There it is the
    same map at every position, so that steps equal `forward` and nothing of a sequence depends on another. So it is in
    training too where its weight is frozen, as in fine-tuning a head or adapters.
    """

    # what the newest batch counts in the running statistics
    MOMENTUM = 0.1

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        learning = self.training and self.weight.requires_grad
        if learning and x.ndim < 3:
            raise ValueError(
                "backbone.norm: while training, batch norms by whole batches of sequences and takes no steps; call "
                "model.eval() first"
            )
        if learning and x.numel() == x.shape[-1]:
            raise ValueError(
                "backbone.norm, model.filters: while training, batches are normed, of which one position is none; give "
                "longer rows, or more at once (data.batch_size)"
            )
        stream = _add(x, residual)
        weight, bias = self.weight.to(stream.dtype), self.bias.to(stream.dtype)
        usual = self.running_mean, self.running_var
        mean, variance = (kept.to(stream.dtype, copy=learning) for kept in usual)
        y = F.batch_norm(
            stream.flatten(0, -2), mean, variance, weight, bias, learning, self.MOMENTUM, self.eps
        )
        if learning:
            for kept, new in zip(usual, (mean, variance), strict=True):
                # a batch that is not finite is forgotten, as its step is left out (task.py)
                kept.copy_(torch.where(new.isfinite(), new, kept))
        return y.view(x.shape).to(x.dtype), stream


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """What the batch norms of a model have found usual, by name."""
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm)]
    return {f"{name}.{own}": buffer for name, norm in norms for own, buffer in norm.named_buffers()}


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    """The stream with x added, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
