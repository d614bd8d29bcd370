"""What every LightningModule here has in common: optimiser, guarded gradients, logging, hooks.

A task says what the loss of a batch is (`training_loss`) and what it measures on held-out data (`measure`);
the batch is the dict that datamodules/base.py describes.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import Config, OptimizerConfig
from .optim import build_optimizer
from .ranks import mean_over_ranks

Batch = Mapping[str, Tensor]


class Task(L.LightningModule):
    """Train a model on batches of one kind and measure it."""

    # how many steps in a row may be left out because their gradients are not finite
    MAX_SKIPPED = 2
    # the arguments that are dicts in a recipe and configs in here, for checks before anything is built
    CONFIGS: ClassVar[dict[str, type[Config]]] = {"optimizer": OptimizerConfig}

    def __init__(self, optimizer: dict[str, Any] | None) -> None:
        super().__init__()
        self.optimizer_config = OptimizerConfig.from_dict(optimizer or {}, "model.optimizer")
        self._skipped = 0
        # of the steps not yet looked at: which, the norm of its gradient, and what waits for that
        self._norms: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._losses: list[Tensor] = []

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
        checkpoint["task"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def configure_optimizers(self) -> Any:
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps: give the number of optimiser steps; the schedule ends there")
        optimizer, schedule = build_optimizer(self, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and leave out a step whose gradient is not finite; Lightning calls this before every optimiser step."""
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "trainer.gradient_clip_algorithm: gradients are clipped by their norm; leave it out"
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        if isinstance(norm, DTensor):
            # of parameters that are sharded: every rank needs the norm of them all, and decides alike
            norm = norm.full_tensor()
        loss = mean_over_ranks(torch.stack(self._losses).mean())
        self._losses.clear()
        self._guard(optimizer, norm)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _guard(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        # fused AdamW reads this where it runs and leaves the step out, so that a GPU is never waited for
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        copied = None
        if norm.is_cuda:
            norm, copied = norm.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self._norms.append((self.global_step + 1, norm, copied))
        # the host looks a step later at what a GPU does
        self._judge(1 if copied else 0)

    def _judge(self, later: int) -> None:
        """Count the steps left out, but for the `later` newest, and stop the run where they are too many."""
        while len(self._norms) > later:
            step, norm, copied = self._norms.popleft()
            if copied is not None:
                copied.synchronize()
            if torch.isfinite(norm):
                self._skipped = 0
                continue
            self._skipped += 1
            if self._skipped > self.MAX_SKIPPED:
                raise FloatingPointError(
                    f"the gradient was not finite in {self._skipped} steps in a row, the last of them step {step}: "
                    "lower model.optimizer.lr, or look at the data of these steps; the last checkpoint is whole"
                )
            self.print(f"step {step}: the gradient is not finite ({norm.item()}); the step is left out")

    def on_train_end(self) -> None:
        self._judge(0)
