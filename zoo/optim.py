"""How parameters are updated: which of them decay, which stay in float32, and the learning rate over the steps."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import OptimizerConfig
from .ranks import sum_over_ranks

# of the state space itself: no decay pulls them to zero, and low precision would change what is remembered
STATE_SPACE = ("A_log", "A_imag", "B_bias", "D", "dt_bias", "dt_proj.bias")

# what makes delta and nothing else
_DELTA = re.compile(r"(?:^|\.)(?:delta_proj|dt_proj|dt_bias)(?:\.|$)")
# A, its size and its turn
_A = re.compile(r"(?:^|\.)A_(?:log|imag)$")

# what reads a backbone's output
HEADS = ("head", "classifier")


def is_state_space(name: str) -> bool:
    """Whether a parameter, by its name, belongs to the state space and stays in float32."""
    return any(name == own or name.endswith(f".{own}") for own in STATE_SPACE)


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices and convolutions decay; biases, norms and the state space do not."""
    return parameter.ndim >= 2 and not is_state_space(name)


def depths(model: nn.Module) -> dict[str, int]:
    """How far every parameter is from the input, by its names.

    0 is what makes vectors of inputs, i the i-th layer, and the largest what reads the last one. A parameter that is
    shared counts where it is farthest.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    layers = {name: re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in names}
    top = 1 + max((1 + int(match[1]) for match in layers.values() if match), default=0)
    farthest: dict[nn.Parameter, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        match = layers[name]
        last = name.startswith(HEADS) or ".norm_f." in f".{name}"
        depth = 1 + int(match[1]) if match else top if last else 0
        farthest[parameter] = max(depth, farthest.get(parameter, 0))
    return {name: farthest[p] for name, p in model.named_parameters(remove_duplicate=False)}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    delta_lr: float = 1.0,
    A_lr: float = 1.0,
) -> list[dict[str, object]]:
    """Split what is trained by whether it decays and by its learning rate, where that is not one for all.

    `scale` of a group is what its learning rate is multiplied by: layer_decay for each step down from the output
    (ELECTRA, 2003.10555, section 3.1), delta_lr for what makes the steps of a state space (B2S6, section 6), and A_lr
    for its A.
    """
    depth = depths(model)
    top = max(depth.values(), default=0)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = delta_lr if _DELTA.search(name) else A_lr if _A.search(name) else 1.0
            scale = layer_decay ** (top - depth[name]) * own
            groups.setdefault((scale, decays(name, p)), []).append(p)
    # the largest rate first: it is the one that is logged
    return [
        {"params": groups[scale, decay], "weight_decay": weight_decay if decay else 0.0, "scale": scale}
        for scale, decay in sorted(groups, reverse=True)
    ]


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then constant or a cosine down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / left)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW(torch.optim.AdamW):
    """AdamW, which updates of parameters that are sharded what this rank has of them.

    That is the same update; but the arithmetic of DTensor takes the host longer than a GPU takes for a small model.
    """

    def _init_group(self, group: dict[str, Any], *rows: list[Tensor]) -> bool:
        # parameters, gradients, and the states of these
        is_complex: bool = super()._init_group(group, *rows)  # type: ignore[no-untyped-call]
        for row in rows:
            row[:] = map(_local, row)
        return is_complex


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the groups, and its schedule, to be stepped once an optimiser step."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.delta_lr, config.A_lr)
    for group in groups:
        group["lr"] = config.lr * group.pop("scale")  # type: ignore[operator]
    optimizer = AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, config, total_steps) / config.lr
    )
    return optimizer, schedule


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert a model's weights, in place, but for the state space."""
    for name, parameter in model.named_parameters():
        if not is_state_space(name):
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of `limit`, and return the norm that they had.

    Of those that are sharded over all ranks each scales what it has, as in AdamW above; all have to call it then.
    """
    trained = list(parameters)
    if not any(isinstance(p, DTensor) for p in trained):
        return torch.nn.utils.clip_grad_norm_(trained, limit)
    gradients = [_local(p.grad) for p in trained if p.grad is not None]
    norm = sum_over_ranks(torch.nn.utils.get_total_norm(gradients).square()).sqrt()
    if limit < math.inf:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1))
    return norm


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
