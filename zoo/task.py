"""What every LightningModule here has in common: optimiser, guarded gradients, logging, hooks.

A task says what the loss of a batch is (`training_loss`) and what it measures on held-out data (`measure`);
the batch is the dict that datamodules/base.py describes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from .config import OptimizerConfig
from .guard import Guard
from .optim import build_optimizer, clip_gradients
from .ranks import mean_over_ranks
from .values import Config

Batch = Mapping[str, Tensor]


class Task(L.LightningModule):
    """Train a model on batches of one kind and measure it."""

    # the arguments that are dicts in a recipe and configs in here, for checks before anything is built
    CONFIGS: ClassVar[dict[str, type[Config]]] = {"optimizer": OptimizerConfig}

    def __init__(self, optimizer: dict[str, Any] | None) -> None:
        super().__init__()
        self.optimizer_config = OptimizerConfig.from_dict(optimizer or {}, "model.optimizer")
        self._guard = Guard(self.optimizer_config)
        # of the batches of the step that is being made
        self._losses: list[Tensor] = []
        # the samples read before it, where the data count them
        self._read: int | None = None

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of a training batch, a scalar; its mean over the ranks is that of the whole batch."""
        raise NotImplementedError

    def measure(self, batch: Batch, stage: str) -> None:
        """Update and log the metrics of a held-out batch, named `{stage}/...`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        # Lightning does so too, but after a checkpoint has been read, and rounded, into what the module was
        self.trainer.precision_plugin.convert_module(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self._losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.measure(batch, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # with the hyperparameters, all that it takes to build the model again
        checkpoint["task"] = name_of(self)
        # no checkpoint is written after a step that ends the run
        self._judge(0)
        checkpoint["guard"] = self._guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "guard" in checkpoint:
            self._guard.load_state_dict(checkpoint["guard"])

    def on_train_start(self) -> None:
        self._read = self._position()

    def configure_optimizers(self) -> Any:
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps: give the number of optimiser steps; the schedule ends there")
        if str(self.trainer.precision).startswith("16"):
            # its gradients are of a scaled loss, which neither clipping nor the guard knows
            raise ValueError(
                f"trainer.precision: must be bf16-mixed or 32-true, not {self.trainer.precision}"
            )
        warmup, steps = self.optimizer_config.warmup_steps, self.trainer.max_steps
        if warmup >= steps:
            self.print(
                f"model.optimizer.warmup_steps: {warmup} of {steps} steps; the learning rate only rises. A tenth of "
                "trainer.max_steps is usual"
            )
        optimizer, schedule = build_optimizer(self, self.optimizer_config, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and leave out a step that is an anomaly; called before every optimiser step."""
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "trainer.gradient_clip_algorithm: gradients are clipped by their norm; leave it out"
            )
        norm = clip_gradients(self.parameters(), gradient_clip_val or float("inf"))
        loss = mean_over_ranks(torch.stack(self._losses).mean())
        self._losses.clear()
        # fused AdamW reads this where it runs and leaves the step out, so that a GPU is never waited for
        optimizer.found_inf = self._guard.admit(  # type: ignore[attr-defined]
            self.global_step + 1, loss, norm, run=self.trainer.default_root_dir, batch=self._batch()
        )
        # the host looks a step later at what a GPU does
        self._judge(1 if norm.is_cuda else 0)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _batch(self) -> str:
        """Which samples this step reads, by their numbers in the order of the data."""
        first, self._read = self._read, self._position()
        return "" if first is None or self._read is None else f"samples {first} to {self._read - 1}"

    def _position(self) -> int | None:
        """How many samples all ranks have read, where the data count them."""
        return getattr(getattr(self.trainer, "datamodule", None), "position", None)

    def _judge(self, later: int) -> None:
        """Say which steps were left out, but for the `later` newest, or stop the run."""
        for step, what in self._guard.judge(later):
            self.print(what)
            for logger in self.loggers:
                # loggers here count from the step before
                logger.log_metrics({"train/left_out": 1.0}, step - 1)

    def on_train_end(self) -> None:
        self._judge(0)


def name_of(model: Task) -> str:
    """The class of a model with its module; where parameters are sharded, PyTorch puts one of its own before it."""
    found = next(x for x in type(model).__mro__ if not x.__module__.startswith("torch.distributed."))
    return f"{found.__module__}.{found.__qualname__}"
