"""Labelled texts as bytes, as in Long Range Arena's Text task: is a review of IMDB good (2011.04006, 2.2)?"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .baselines import regression_accuracy
from .cache import digest_of_files
from .class_folders import Labelled, find_in_classes
from .classes import sort_classes
from .documents import read_json_lines
from .labelled_rows import LabelledRows, LabelledRowsDataModule, Rows, check_fraction, lot, one_row
from .vocab import Bytes

_LABEL = "label"
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.xz")


class LabelledTextDataModule(LabelledRowsDataModule):
    """Documents, each with a class; a token is a byte, and those behind the first `length` are not read.

    Args:
        path: a folder of train/CLASS/NAME.txt and, for a test, test/CLASS/NAME.txt, as aclImdb is (its train/unsup,
            which has no labels, is left out); or a .jsonl file, plain, .gz or .xz, of objects with a text and a label.
        test: a .jsonl file to test on.
        length: bytes of a document that are read.
        valid: which part of the documents to train on is held out; equal ones are on one side.
        batch_size, num_workers, seed: see DataModule.
    """

    def __init__(
        self,
        path: str,
        test: str | None = None,
        length: int = 4096,
        valid: float = 0.1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_fraction(valid)
        if length < 1:
            raise ValueError(f"data.length: must be 1 or more, not {length}")
        self.path, self.valid = Path(path).expanduser(), valid
        self.files: dict[str, list[Labelled]] = {}
        # files of many documents, by split
        self.lines: dict[str, Path] = {}
        if self.path.is_dir():
            self.files = _find(self.path)
        else:
            self.lines["train"] = _find_lines(self.path, "data.path")
        if test is not None:
            self.lines["test"] = _find_lines(Path(test).expanduser(), "data.test")
        super().__init__(self._classes(), Bytes.size, Bytes.eos, length, batch_size, num_workers, seed)

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        return Bytes().to_dict()

    def describe(self) -> str:
        return (
            f"texts of {self.num_classes} classes, batches of {self.batch_size} x up to {self.length} bytes"
        )

    def digest(self) -> str:
        paths = [*(file.path for files in self.files.values() for file in files), *self.lines.values()]
        names = [path.relative_to(self.path).as_posix() for path in paths if path.is_relative_to(self.path)]
        return digest_of_files(f"texts 1 {self.length} {self.valid} {sorted(self.lines)} {names}", paths)

    def make_rows(self) -> Iterator[tuple[str, Rows]]:
        for split in ("train", "test"):
            for text, label in self._read(split):
                held_out = split == "train" and lot(text) < self.valid
                tokens = np.frombuffer(text[: self.length], np.uint8)
                if not len(tokens):
                    raise ValueError("data.path: there is an empty text in it; leave it out")
                yield "val" if held_out else split, one_row(tokens, self.classes.index(label))

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield from super().baselines()
        train, held_out = (self._bags(split) for split in ("train", "val"))
        yield (
            "regression on which words there are, accuracy",
            regression_accuracy(train, held_out, self.num_classes),
        )

    def _classes(self) -> list[str]:
        if self.files:
            return sort_classes(file.label for files in self.files.values() for file in files)
        return sort_classes(
            label for path in self.lines.values() for _, label in read_json_lines(path, _LABEL)
        )

    def _read(self, split: str) -> Iterator[tuple[bytes, str]]:
        """The documents of a split, and the class of each."""
        for path, label in self.files.get(split, ()):
            yield path.read_bytes(), label
        if split in self.lines:
            yield from read_json_lines(self.lines[split], _LABEL)

    def _bags(self, split: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Which words, told apart by a hash of 11 bits, are in each document (n, 2048), and its class."""
        rows = self.samples[split]
        assert isinstance(rows, LabelledRows)
        bags = np.zeros((len(rows), 1 << 11), np.float32)
        for bag, i in zip(bags, range(len(rows)), strict=True):
            words = set(re.findall(rb"\w+", rows.read(i, 0)["tokens"].tobytes().lower()))
            bag[[zlib.crc32(word) % len(bag) for word in words]] = 1
        return bags, np.array(rows.labels.array)


def _find(folder: Path) -> dict[str, list[Labelled]]:
    files = find_in_classes(folder, ".txt")
    if "train" not in files:
        raise ValueError(
            f"data.path: {folder} has no train/CLASS/NAME.txt; give a folder like aclImdb, or a .jsonl file"
        )
    return files


def _find_lines(path: Path, key: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file or folder {path}")
    if not path.name.endswith(_LINES):
        raise ValueError(f"{key}: {path} is not a kind of file that is read: {' '.join(_LINES)}")
    return path
