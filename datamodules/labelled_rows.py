"""Labelled rows of bytes for classifiers: made once, whether drawn or read, and memory-mapped ever after."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from .base import DataModule, Ordered
from .cache import TokenFile, build_folder, cache_root
from .classes import count_classes
from .genomics import pad
from .order import EndlessBatches, SimilarBatches

log = logging.getLogger(__name__)

# the arrays of a split on disk
_ARRAYS = {"tokens": "uint8", "ends": "int64", "labels": "int64"}
# a change of the format on disk changes every key
_FORMAT = 1
# tokens that the length of a batch is a multiple of, so that its shape is one of a few, of which graphs are recorded
_MULTIPLE = 128


class Rows(NamedTuple):
    """Several rows: their tokens end to end (k,), and the length and the class of each (n,)."""

    tokens: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]


class LabelledRows:
    """The rows of a split; see base.Samples."""

    def __init__(self, folder: Path, split: str) -> None:
        files = {name: TokenFile(folder / f"{split}.{name}", dtype) for name, dtype in _ARRAYS.items()}
        self.tokens, self.ends, self.labels = files["tokens"], files["ends"], files["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def length(self, index: int) -> int:
        """How many tokens a row has."""
        return int(self.ends.array[index]) - (int(self.ends.array[index - 1]) if index else 0)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """A row's tokens (l,), and its class."""
        end = int(self.ends.array[index])
        return {
            "tokens": self.tokens.array[end - self.length(index) : end],
            "label": int(self.labels.array[index]),
        }


class LabelledRowsDataModule(DataModule):
    """Rows of up to `length` tokens below 256, each of one of `classes`.

    A batch has `inputs` (b, l), padded at the end to a multiple of 128, `labels` (b,) and `lengths` (b,); in training,
    of rows of about one length (order.SimilarBatches). A subclass says what decides the rows (`digest`) and makes them
    (`make_rows`). After `setup`, `majority` is the share of the commonest class.

    Args:
        classes: the name of each.
        vocab_size: how many tokens there are; None where inputs are numbers.
        padding: the token behind the end of a row.
        length: tokens of the longest row.
        batch_size, num_workers, seed: see DataModule.
    """

    PROVIDES = ("vocab_size", "num_classes", "classes")

    def __init__(
        self,
        classes: list[str],
        vocab_size: int | None,
        padding: int,
        length: int,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.classes, self.num_classes, self.vocab_size = classes, len(classes), vocab_size
        self.padding, self.length = padding, length
        self.majority: dict[str, float] = {}

    def digest(self) -> str:
        """A digest of all that decides the rows."""
        raise NotImplementedError

    def make_rows(self) -> Iterator[tuple[str, Rows]]:
        """All rows, some at a time, with the split they are of: "train", "val" or "test"."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        build_folder(self._folder(), self._write)

    def setup(self, stage: str) -> None:
        if self.samples:
            return
        folder = self._folder()
        self.fingerprint = folder.name
        for split in json.loads((folder / "splits.json").read_text()):
            rows = LabelledRows(folder, split)
            self.samples[split] = rows
            _, self.majority[split], balance = count_classes(rows.labels.array, self.classes)
            log.info("%s: %d rows (%s)", split, len(rows), balance)

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield "the commonest class, accuracy", self.majority["val"]

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = self._world()
        rows = self.samples["train"]
        assert isinstance(rows, LabelledRows)
        ordered = Ordered(rows, self.seed)
        batches = SimilarBatches(
            EndlessBatches(self.position, self.batch_size, rank, world),
            lambda number: rows.length(ordered.place(number)[0]),
            self.seed,
        )
        return self._loader(ordered, batches)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        # of 16 bits, for a byte and a padding that is none
        inputs = pad([row["tokens"].astype(np.int16) for row in rows], self.padding, _MULTIPLE)
        return {
            "inputs": torch.from_numpy(inputs),
            "labels": torch.tensor([row["label"] for row in rows]),
            "lengths": torch.tensor([len(row["tokens"]) for row in rows]),
        }

    def _folder(self) -> Path:
        name = hashlib.sha256(f"{_FORMAT} {self.digest()}".encode()).hexdigest()
        return cache_root() / "rows" / name[:32]

    def _write(self, folder: Path) -> None:
        log.info("making the rows, once; they are kept in %s", cache_root())
        files: dict[str, dict[str, Any]] = {}
        for split, rows in self.make_rows():
            if split not in files:
                files[split] = {name: (folder / f"{split}.{name}").open("wb") for name in _ARRAYS}
            own = files[split]
            ends = own["tokens"].tell() + rows.lengths.cumsum()
            for name, array in (("tokens", rows.tokens), ("ends", ends), ("labels", rows.labels)):
                own[name].write(array.astype(_ARRAYS[name]).tobytes())
        for file in (file for own in files.values() for file in own.values()):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for split, key in (("train", "there is nothing to train on"), ("val", "there is nothing held out")):
            if split not in files:
                raise ValueError(f"data.valid: {key}; give more, or another fraction")
        (folder / "splits.json").write_text(json.dumps(sorted(files)))


def one_row(tokens: NDArray[np.uint8], label: int) -> Rows:
    """A row by itself."""
    return Rows(tokens, np.array([len(tokens)]), np.array([label]))


def lot(content: bytes) -> float:
    """A number from 0 to 1 that a row draws by its content, so that equal ones are on one side of a split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64


def check_fraction(valid: float) -> None:
    """Raise ValueError for what is no share of the training rows to hold out."""
    if not 0 < valid < 1:
        raise ValueError(f"data.valid: a fraction must be between 0 and 1, not {valid}")
