"""How fast a run trains, in tokens (or samples, or bases) a second, and what it waits for and takes."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from torch import nn

from .backbone import Backbone
from .tokens import TokenModel

# what a card's matrix units can do in bfloat16 without sparsity, in operations a second, by a part of its name
PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100": 312e12}


class Throughput(L.Callback):
    """Log the tokens a second that all ranks train on, as the clock on the wall sees it, validation left out.

    Beside it the share of the time in which the first rank waited for data, where its loader counts that; the most
    memory it has held, in GiB, on the GPU or in the process; and on a known GPU in bfloat16, for a model that is known
    (`operations`), the share of the matrix units' operations (MFU).
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._counted, self._since, self._waited = 0, time.monotonic(), 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens + self._counted,
            "seconds": self.seconds + time.monotonic() - self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counted, self._since, self._waited = 0, time.monotonic(), _waited(trainer)
        self._operations, self._peak = operations(pl_module), _peak(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counted += batch["inputs"].shape[:2].numel() * trainer.world_size
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and not trainer.fit_loop._should_accumulate():
            tokens, seconds = self._close()
            seconds, waited = max(seconds, 1e-9), _waited(trainer)
            pl_module.log("train/tokens_per_second", tokens / seconds, prog_bar=True)
            pl_module.log("train/data_wait", (waited - self._waited) / seconds)
            pl_module.log("train/memory_gib", _memory(trainer.strategy.root_device))
            self._waited = waited
            if self._operations and self._peak:
                done = tokens * self._operations / seconds
                pl_module.log("train/mfu", done / (trainer.world_size * self._peak))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since += time.monotonic() - self._pause

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def _close(self) -> tuple[int, float]:
        """End the stretch that is being measured; return its tokens and seconds."""
        now = time.monotonic()
        tokens, seconds = self._counted, now - self._since
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self._counted, self._since = 0, now
        return tokens, seconds


def operations(model: nn.Module) -> int | None:
    """What matrix products take of a token, forward and backward; None where it is not six a weight of a Linear.

    Scan, convolution and norms, which do not run on matrix units, are not counted.
    """
    if not isinstance(model, TokenModel) or not isinstance(model.backbone, Backbone):
        return None
    config = model.backbone.config
    if not config.causal or set(config.mixers) != {"mamba"}:
        return None
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    return 6 * sum(weight.numel() for weight in [*weights, model.head.weight])


def _waited(trainer: L.Trainer) -> float:
    """The seconds for which training has waited for its loader, 0 where that does not count them."""
    return float(getattr(trainer.train_dataloader, "waited", 0.0))


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # in KiB, but on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _peak(trainer: L.Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda" or not str(trainer.precision).startswith("bf16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
