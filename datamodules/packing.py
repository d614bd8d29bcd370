"""Windows of a token stream, and how rows of them become a batch that keeps documents apart."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .corpus import Split
from .order import mix

IGNORE = -100


class Windows:
    """Windows of `length` inputs and their targets over a split, each pass from another offset; see base.Samples."""

    def __init__(self, split: Split, length: int, seed: int = 0, *, shifted: bool) -> None:
        self.split, self.length, self.seed, self.shifted = split, length, seed, shifted
        targets = len(split.tokens) - 1
        # shifted windows leave room to move; held-out ones cover everything, the last of them is shorter
        self.count = max(1, (targets - length + 1) // length) if shifted else -(-targets // length)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, pass_: int) -> dict[str, NDArray[Any]]:
        """The tokens of one window (up to length + 1,) and where documents start among its inputs."""
        start = index * self.length
        if self.shifted:
            room = len(self.split.tokens) - self.count * self.length
            start += mix(self.seed, pass_) % min(self.length, room)
        tokens = self.split.tokens.array[start : start + self.length + 1].astype(np.int64)
        starts = self.split.starts.array
        low, high = np.searchsorted(starts, (start, start + len(tokens) - 1))
        return {"tokens": tokens, "starts": np.asarray(starts[low:high] - start)}


def pack(rows: list[dict[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """Lay rows end to end, (1, b l), with a boundary wherever a row or a document starts."""
    tokens = [row["tokens"] for row in rows]
    begins = np.cumsum([0, *(len(row) - 1 for row in tokens)])
    inside = [row["starts"] + begin for row, begin in zip(rows, begins, strict=False)]
    bounds = np.unique(np.concatenate([begins, *inside]))
    return {
        "inputs": torch.from_numpy(np.concatenate([row[:-1] for row in tokens]))[None],
        "targets": torch.from_numpy(np.concatenate([row[1:] for row in tokens]))[None],
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
    }


def stack(rows: list[dict[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """Put rows under each other, (b, l); shorter ones are filled with what is neither seen nor predicted."""
    length = max(len(row["tokens"]) for row in rows) - 1
    inputs = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens = row["tokens"]
        inputs[i, : len(tokens) - 1], targets[i, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
