"""How parameters are updated: which of them decay, which stay in float32, and the learning rate over the steps."""

import math

import torch
from torch import Tensor, nn

from .config import OptimizerConfig

# of the state space itself: no decay pulls them to zero, and low precision would change what is remembered
STATE_SPACE = ("A_log", "A_imag", "D", "dt_bias", "dt_proj.bias")


def is_state_space(name: str) -> bool:
    """Whether a parameter, by its name, belongs to the state space and stays in float32."""
    return any(name == own or name.endswith(f".{own}") for own in STATE_SPACE)


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices and convolutions decay; biases, norms and the state space do not."""
    return parameter.ndim >= 2 and not is_state_space(name)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split what is trained into the group that decays and the one that does not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then constant or a cosine down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / left)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the groups, and its schedule, to be stepped once an optimiser step."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
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
