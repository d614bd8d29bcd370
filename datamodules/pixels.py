"""Grey pictures read pixel after pixel, row after row: what the data modules of pictures share."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .baselines import regression_accuracy
from .labelled_rows import LabelledRows, LabelledRowsDataModule

LEVELS = 256
ENCODINGS = ("float", "tokens")
# pictures that a regression is fitted on
_FITTED = 20_000


class PixelsDataModule(LabelledRowsDataModule):
    """Labelled pictures of `length` pixels: `inputs` (b, length, 1) or (b, length), and `labels` (b,).

    Args:
        classes, length, batch_size, num_workers, seed: see LabelledRowsDataModule.
        encoding: float, a number from -1 (black) to 1 for each pixel, as models since S4 have it; or tokens, one of 256
            for each, as Long Range Arena's own have.
    """

    def __init__(
        self, classes: list[str], encoding: str, length: int, batch_size: int, num_workers: int, seed: int
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"data.encoding: must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
        side_of(length)
        vocab_size = LEVELS if encoding == "tokens" else None
        super().__init__(classes, vocab_size, 0, length, batch_size, num_workers, seed)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = torch.from_numpy(np.stack([row["tokens"] for row in rows]))
        return {
            "inputs": inputs[..., None] / 127.5 - 1 if self.vocab_size is None else inputs,
            "labels": torch.tensor([row["label"] for row in rows]),
        }

    def pixel_accuracy(self) -> float:
        """What a regression on the pixels reaches, fitted on the first training pictures."""
        parts = []
        for split in ("train", "val"):
            rows = self.samples[split]
            assert isinstance(rows, LabelledRows)
            count = min(len(rows), _FITTED)
            pixels = np.asarray(rows.tokens.array[: count * self.length]).reshape(count, -1)
            parts.append((pixels.astype(np.float32), np.array(rows.labels.array[:count])))
        return regression_accuracy(parts[0], parts[1], self.num_classes)


def side_of(length: int) -> int:
    """The side of a square picture of `length` pixels.

    Raises:
        ValueError: when there is none.
    """
    side = math.isqrt(max(0, length))
    if side < 1 or side * side != length:
        raise ValueError(
            f"data.length: must be the pixels of a square picture, as 1024 are of 32 x 32, not {length}"
        )
    return side
