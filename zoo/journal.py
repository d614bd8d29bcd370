"""The log of a run as a table that is only ever appended to: metrics.csv, with columns step, metric, value."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from .saving import write_whole

FILE = "metrics.csv"


class Journal(Logger):
    """Write every logged value as a row. A step is the number of optimiser steps done when it was measured.

    A kill loses no row but the one being written; a resumed run drops the rows later than its checkpoint. What is
    logged of a training step twice, before its checkpoint and after it, is one row.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / FILE
        self._step, self._written = 0, set[str]()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder keeps the recipe itself."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Lightning counts from the step before
        step = (step or 0) + 1
        if step != self._step:
            self._step, self._written = step, set()
        rows = [
            (step, name, repr(float(value)))
            for name, value in metrics.items()
            if name != "epoch" and name not in self._written
        ]
        self._written |= {name for name in metrics if name.startswith("train/")}
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", "metric", "value"])
            writer.writerows(rows)


def read_journal(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric's values with their steps; a row that was cut short is passed over."""
    series: dict[str, list[tuple[int, float]]] = {}
    path = folder / FILE
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                try:
                    series.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
                except (TypeError, ValueError):
                    continue
    return series


def rewind_journal(folder: Path, step: int) -> None:
    """Drop the rows that a run resumed after `step` steps will write again: later ones, and that step's validation."""
    path = folder / FILE
    if not path.exists():
        return
    kept = [
        (at, name, value)
        for name, values in read_journal(folder).items()
        for at, value in values
        if at < step or (at == step and name.startswith("train/"))
    ]
    lines = [
        "step,metric,value",
        *(f"{at},{name},{value!r}" for at, name, value in sorted(kept, key=lambda row: row[0])),
    ]
    write_whole(path, lambda file: file.write("\r\n".join([*lines, ""]).encode()))
