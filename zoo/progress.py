"""What a run shows while it runs: a bar in a terminal, a line at each validation elsewhere."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StepProgress(ProgressBar):
    """A rich bar over optimiser steps, with the metrics logged for it (Lightning's counts the batches of epochs)."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        # what a module prints goes through here only if it asks and is told so
        return self._enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.console.print(*args, markup=False, highlight=False)
        elif self._enabled:
            print(*args, flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._open("training", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(
                self._tasks["training"], completed=trainer.global_step, metrics=self._metrics(trainer)
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("validating", sum(self._counts(trainer)), 0)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.advance(self._tasks["validating"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop("validating"))
        elif self._enabled and trainer.state.fn == "fit":
            done = trainer.global_step - self._first_step
            left = (
                (time.monotonic() - self._started) / max(1, done) * (trainer.max_steps - trainer.global_step)
            )
            print(
                f"step {trainer.global_step}/{trainer.max_steps}  {self._metrics(trainer)}  {left:.0f} s left",
                flush=True,
            )
        if trainer.state.fn != "fit":
            self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _counts(self, trainer: L.Trainer) -> list[int]:
        counts = trainer.num_val_batches
        return [int(count) for count in (counts if isinstance(counts, list) else [counts])]

    def _metrics(self, trainer: L.Trainer) -> str:
        values = {
            name: float(value) for name, value in trainer.progress_bar_metrics.items() if name != "v_num"
        }
        return "  ".join(
            f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.3f}"
            for name, value in values.items()
        )

    def _open(self, name: str, total: int, completed: int) -> None:
        console = Console()
        if not self._enabled or not console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=console,
            )
            self._bar.start()
        self._tasks[name] = self._bar.add_task(name, total=total, completed=completed, metrics="")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._tasks = None, {}
