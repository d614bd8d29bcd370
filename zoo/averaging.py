"""A running average of the weights: steadier than the weights of any one step, and often better."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .norms import statistics
from .sharding import share


class Average(L.Callback):
    """Keep an exponential moving average of the weights; validate it, and make it what a checkpoint's reader gets.

    After step t the average is w * average + (1 - w) * weights with w = min(decay, (1 + t) / (10 + t)), so that the
    first steps are soon forgotten.

    Args:
        decay: null leaves the callback out; 0.999 averages over about the last thousand steps.
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"callbacks.average.decay: must be null or between 0 and 1, not {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        # the weights that training goes on from, in a checkpoint that is being read
        self._trained: dict[str, Tensor] = {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.average:
            weights = checkpoint["state_dict"]
            checkpoint["trained"] = {name: weights[name] for name in self.average}
            # names that share a weight share its average
            own: dict[str, Tensor] = dict(pl_module.named_buffers(remove_duplicate=False))
            own.update(pl_module.named_parameters(remove_duplicate=False))
            shared = {own[name]: value for name, value in self.average.items()}
            checkpoint["state_dict"] = {
                name: shared.get(own.get(name, value), value) for name, value in weights.items()
            }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._trained = checkpoint.get("trained", {})

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.decay is None:
            return
        weights = self._weights(pl_module)
        # a checkpoint's weights are the average
        self.average = {name: p.detach().clone() for name, p in weights.items()}
        for name, value in self._trained.items():
            weights[name].copy_(share(value, weights[name]))
        self._trained = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.decay is None or trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        weights = self._weights(pl_module)
        for kind in (True, False):
            names = [name for name in self.average if isinstance(weights[name], torch.nn.Parameter) == kind]
            if names:
                averages = [self.average[name] for name in names]
                torch._foreach_lerp_(averages, [weights[name] for name in names], share)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(pl_module)
        self.average = {}

    @torch.no_grad()
    def _swap(self, model: L.LightningModule) -> None:
        weights = self._weights(model)
        for name, value in self.average.items():
            kept = weights[name].clone()
            weights[name].copy_(value)
            value.copy_(kept)

    def _weights(self, model: L.LightningModule) -> dict[str, Tensor]:
        """What is averaged: what is trained, and what norms found usual of it."""
        if isinstance(model, FSDPModule):
            # what no block holds stays gathered after a forward pass without a backward one
            model.reshard()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {**trained, **statistics(model)}
