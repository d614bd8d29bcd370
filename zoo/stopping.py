"""Stopping when asked to: a signal ends the run after the step it is in, with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import lightning as L

from .ranks import most_over_ranks

_ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """Validation was left because a signal asked to stop."""


class GracefulStop(L.Callback):
    """On SIGTERM (preemption) or Ctrl-C, finish the step, let `Checkpoints` save, stop without validating.

    `received` then names the signal, so that the command can leave with 128 + its number, as shells expect. A
    second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's own, which it installs between here and the start of training, would have the ranks talk to each
        # other wherever the signal finds them
        trainer._signal_connector._sigterm_notifier_fn = self._handle  # type: ignore[assignment, method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning puts the handlers of before back when the run ends
        for number in _ASKED_TO_STOP:
            signal.signal(number, self._handle)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        # every rank stops at the same step, whichever of them was told
        number = most_over_ranks(self.received or 0)
        if number:
            self.received = signal.Signals(number)
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        # the checkpoint before this validation is on disk, and a resumed run validates anew
        if number := most_over_ranks(self.received or 0):
            self.received = signal.Signals(number)
            raise StoppedError

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: stopping after this step, with a checkpoint", flush=True)
