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

from .config import Config, OptimizerConfig
from .optim import build_optimizer, clip_gradients
from .ranks import mean_over_ranks

Batch = Mapping[str, Tensor]


class Task(L.LightningModule):
    """Train a model on batches of one kind and measure it."""

    # how many steps in a row may be left out because their gradients are not finite
    MAX_SKIPPED = 2
    # over how many steps the usual norm of the gradient is taken, and after how many it is known
    SETTLING = 50
    # the arguments that are dicts in a recipe and configs in here, for checks before anything is built
    CONFIGS: ClassVar[dict[str, type[Config]]] = {"optimizer": OptimizerConfig}

    def __init__(self, optimizer: dict[str, Any] | None) -> None:
        super().__init__()
        self.optimizer_config = OptimizerConfig.from_dict(optimizer or {}, "model.optimizer")
        self._skipped = 0
        # of the steps not yet looked at: which, the norm of its gradient, its limit, and what waits for these
        self._norms: deque[tuple[int, Tensor, Tensor, torch.cuda.Event | None]] = deque()
        # the running mean of the gradient's norm, and of how many steps, where spikes are watched for
        self._usual: Tensor | None = None
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
        checkpoint["task"] = name_of(self)
        checkpoint["usual_norm"] = self._usual

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._usual = checkpoint.get("usual_norm")

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
        """Clip, and leave out a step whose gradient is not finite or a spike; called before every optimiser step."""
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "trainer.gradient_clip_algorithm: gradients are clipped by their norm; leave it out"
            )
        norm = clip_gradients(self.parameters(), gradient_clip_val or float("inf"))
        loss = mean_over_ranks(torch.stack(self._losses).mean())
        self._losses.clear()
        self._guard(optimizer, norm)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    def _guard(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        limit = self._limit(norm.detach())
        # fused AdamW reads this where it runs and leaves the step out, so that a GPU is never waited for
        optimizer.found_inf = (~(norm <= limit)).float()  # type: ignore[attr-defined]
        copied = None
        if norm.is_cuda:
            norm, limit = (x.to("cpu", non_blocking=True) for x in (norm, limit))
            copied = torch.cuda.Event()
            copied.record()
        self._norms.append((self.global_step + 1, norm, limit, copied))
        # the host looks a step later at what a GPU does
        self._judge(1 if copied else 0)

    def _limit(self, norm: Tensor) -> Tensor:
        """The largest norm with which a step is taken; takes this one into the running mean that it comes from."""
        largest = torch.full_like(norm, torch.finfo(norm.dtype).max)
        if self.optimizer_config.spike is None:
            return largest
        usual = torch.zeros_like(norm).repeat(2) if self._usual is None else self._usual.to(norm)
        mean, count = usual
        limit = torch.where(count < self.SETTLING, largest, self.optimizer_config.spike * mean)
        # a spike counts as what is just allowed, and what is not finite not at all
        taken = torch.where(norm.isfinite(), norm.minimum(limit), mean)
        weight = 1 / (count + 1).clamp(max=self.SETTLING)
        self._usual = torch.stack([mean + weight * (taken - mean), count + 1])
        return limit

    def _judge(self, later: int) -> None:
        """Count the steps left out, but for the `later` newest, and stop the run where they are too many."""
        while len(self._norms) > later:
            step, norm, limit, copied = self._norms.popleft()
            if copied is not None:
                copied.synchronize()
            if norm <= limit:
                self._skipped = 0
                continue
            self._skipped += 1
            what = (
                f"norm is {norm.item():.4g}, more than model.optimizer.spike allows, {limit.item():.4g}"
                if torch.isfinite(norm)
                else f"is not finite ({norm.item()})"
            )
            look = f"mambazoo replay {self.trainer.default_root_dir} --step {step}"
            if self._skipped > self.MAX_SKIPPED:
                raise FloatingPointError(
                    f"{self._skipped} steps in a row were left out, the last of them step {step}, whose gradient "
                    f"{what}: lower model.optimizer.lr, or look at its batch with\n  {look}\n"
                    "the last checkpoint is whole"
                )
            self.print(
                f"step {step}: the gradient {what}; the step is left out; its batch is shown by\n  {look}"
            )
            for logger in self.loggers:
                # loggers here count from the step before
                logger.log_metrics({"train/left_out": 1.0}, step - 1)

    def on_train_end(self) -> None:
        self._judge(0)


def name_of(model: Task) -> str:
    """The class of a model with its module; where parameters are sharded, PyTorch puts one of its own before it."""
    found = next(x for x in type(model).__mro__ if not x.__module__.startswith("torch.distributed."))
    return f"{found.__module__}.{found.__qualname__}"
