"""Low-rank adapters: fine-tune a small difference to each weight instead of the weight (LoRA, 2106.09685).

    weight + alpha / rank * up @ down        up (rows, rank), down (rank, columns)

An adapter is a parametrisation of its module's weight: whoever reads that weight, the module itself, a fused kernel
or a head that shares it, gets the adapted one. So every matrix of a model can have one, whatever path its weight takes.
"""

import math
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# how PyTorch names what a parametrised weight is made of, in a state dict
_PART = re.compile(r"(?P<module>.+)\.parametrizations\.(?P<weight>\w+)\.(?:original|0\.(?P<part>\w+))")
# of one adapter: up and down, or whole, and scale
Parts = dict[str, Tensor]


class LowRank(nn.Module):
    """The difference to a weight (rows, ...), of which the later dimensions are taken as one.

    It starts at zero. Where factors would have no fewer numbers than the weight, as for the four of a depthwise
    convolution's channel, the difference is a parameter itself, `whole`.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        if rank * (rows + columns) < rows * columns:
            self.down = nn.Parameter(weight.new_empty(rank, columns))
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            self.up = nn.Parameter(weight.new_zeros(rows, rank))
        else:
            self.whole = nn.Parameter(weight.new_zeros(rows, columns))
        # in the state dict, so that it says all that merging needs
        self.register_buffer("scale", torch.tensor(alpha / rank, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        # the sum is the weight that all else sees: it has the weight's precision, whatever autocast wants
        with torch.autocast(weight.device.type, enabled=False):
            return adapted(weight, {**dict(self.named_parameters()), "scale": self.scale})


def adapted(weight: Tensor, parts: Parts) -> Tensor:
    """A weight plus the difference that the parts of an adapter make."""
    difference = parts["whole"] if "whole" in parts else parts["scale"] * (parts["up"] @ parts["down"])
    return weight + difference.view_as(weight).to(weight.dtype)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose weight an adapter can be put on, by name: projections, convolutions, embeddings, heads."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, LowRank):
            yield name, module


def attach(model: nn.Module, rank: int, alpha: float, only: Iterable[str] | None = None) -> None:
    """Put an adapter on the weight of every matrix of a model, or of the modules named in `only`.

    Modules that share a weight share its adapter.
    """
    wanted = None if only is None else set(only)
    adapters: dict[nn.Parameter, LowRank] = {}
    for name, module in list(matrices(model)):
        weight = module.weight
        if (wanted is None or name in wanted) and isinstance(weight, nn.Parameter):
            if weight not in adapters:
                adapters[weight] = LowRank(weight, rank, alpha)
            # unsafe leaves out a trial of what is known to keep shape and type
            parametrize.register_parametrization(module, "weight", adapters[weight], unsafe=True)


def size(model: nn.Module) -> int:
    """The number of a model's parameters, without its adapters, which merging takes away."""
    return sum(p.numel() for name, p in model.named_parameters() if not _part_of_adapter(name))


def _part_of_adapter(name: str) -> bool:
    match = _PART.fullmatch(name)
    return match is not None and match["part"] is not None


def split(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """Of a state dict, what it would be without adapters, and the parts of each adapter by the name of its weight."""
    plain: dict[str, Tensor] = {}
    adapters: dict[str, Parts] = {}
    for name, value in weights.items():
        match = _PART.fullmatch(name)
        if match is None:
            plain[name] = value
        elif match["part"] is None:
            plain[f"{match['module']}.{match['weight']}"] = value
        else:
            adapters.setdefault(f"{match['module']}.{match['weight']}", {})[match["part"]] = value
    return plain, adapters


def merge(plain: dict[str, Tensor], adapters: dict[str, Parts]) -> dict[str, Tensor]:
    """Weights with every adapter added to its own.

    Raises:
        ValueError: when an adapter is none, or is of another shape than its weight.
    """
    for name, parts in adapters.items():
        if name in plain and not _fits(plain[name], parts):
            shapes = ", ".join(f"{part} {tuple(value.shape)}" for part, value in parts.items())
            raise ValueError(f"{name} is {tuple(plain[name].shape)}, and its adapter is of another: {shapes}")
    return {
        name: adapted(value, adapters[name]) if name in adapters else value for name, value in plain.items()
    }


def _fits(weight: Tensor, parts: Parts) -> bool:
    """Whether the parts are those of an adapter of this weight."""
    wanted = weight.flatten(1).shape if weight.ndim > 1 else None
    if "whole" in parts:
        return parts["whole"].shape == wanted
    if not parts.keys() >= {"up", "down", "scale"} or not parts["up"].ndim == parts["down"].ndim == 2:
        return False
    (rows, rank), (other, columns) = parts["up"].shape, parts["down"].shape
    return rank == other and (rows, columns) == wanted and parts["scale"].numel() == 1
