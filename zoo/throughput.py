"""How fast a run trains, in tokens (or samples, or bases) a second."""

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Log the tokens a second that all ranks train on, as the clock on the wall sees it, validation left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._counted, self._since = 0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens + self._counted,
            "seconds": self.seconds + time.monotonic() - self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._counted, self._since = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counted += batch["inputs"].shape[:2].numel() * trainer.world_size
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and not trainer.fit_loop._should_accumulate():
            tokens, seconds = self._close()
            pl_module.log("train/tokens_per_second", tokens / max(seconds, 1e-9), prog_bar=True)

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
