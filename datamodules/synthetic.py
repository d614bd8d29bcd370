"""Tasks that are drawn, not read: no file, no end, and no row twice.

Row g of training comes from random numbers that (seed, g) alone decide, so that it is the same in whatever process, and
after whatever stop, it is drawn; held-out rows have streams of their own.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from .base import DataModule, InOrder
from .order import OrderedBatches, mix

IGNORE = -100

Integers = NDArray[np.int64]
# from random numbers and a length, a row: inputs (l,) and targets (l,)
Draw = Callable[[np.random.Generator, int], tuple[Integers, Integers]]


class SyntheticDataModule(DataModule):
    """Rows that `draw` makes up, in batches of one length.

    Args:
        draw: makes a row; of what it needs beside a length it is made before.
        vocab_size: how many tokens there are, those with a meaning of their own included.
        answers: from how many tokens a target is chosen; an even guess is right in one of so many.
        length: of training rows, as `draw` takes it.
        valid_lengths, test_lengths: of held-out rows; those of one length come together.
        held_out_rows: how many of each length there are.
        batch_size, num_workers, seed: see DataModule; seed also decides the rows.
    """

    PROVIDES = ("vocab_size",)

    def __init__(
        self,
        draw: Draw,
        vocab_size: int,
        answers: int,
        length: int,
        valid_lengths: list[int] | None,
        test_lengths: list[int] | None,
        held_out_rows: int,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if held_out_rows < 1:
            raise ValueError(f"data.held_out_rows: must be 1 or more, not {held_out_rows}")
        self.draw, self.vocab_size, self.answers = draw, vocab_size, answers
        self.length, self.held_out_rows = length, held_out_rows
        self.lengths = {"val": valid_lengths or [length], "test": test_lengths or valid_lengths or [length]}
        # what cannot be drawn is said before anything runs
        for one in {length, *self.lengths["val"], *self.lengths["test"]}:
            draw(np.random.default_rng(0), one)

    def describe(self) -> str:
        return f"rows made up as they are read, batches of {self.batch_size} x {self.length}"

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield "an even guess, accuracy", 1 / self.answers

    def setup(self, stage: str) -> None:
        # a pass is as long as a number of 40 bits goes
        self.samples = {"train": Drawn(self.draw, [self.length], 1 << 40, self.seed, 0)}
        for stream, (split, lengths) in enumerate(self.lengths.items(), start=1):
            self.samples[split] = Drawn(self.draw, lengths, self.held_out_rows, self.seed, stream)

    def _held_out(self, split: str) -> DataLoader[Any]:
        world, rank = self._world()
        batches = OrderedBatches(self.held_out_rows, self.batch_size, rank, world)
        each = BatchesOfEach(batches, self.held_out_rows, len(self.lengths[split]))
        return self._loader(InOrder(self.samples[split]), each)


class Drawn:
    """So many rows of each length, made up when they are read; see base.Samples."""

    def __init__(self, draw: Draw, lengths: list[int], rows: int, seed: int, stream: int) -> None:
        self.draw, self.lengths, self.rows, self.seed, self.stream = draw, lengths, rows, seed, stream

    def __len__(self) -> int:
        return self.rows * len(self.lengths)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        random = np.random.Generator(np.random.SFC64(mix(self.seed, self.stream, pass_, index)))
        inputs, targets = self.draw(random, self.lengths[index // self.rows])
        return {"inputs": inputs, "targets": targets}


class BatchesOfEach:
    """The same batches of rows for one length after the other, so that none mixes lengths."""

    def __init__(self, batches: OrderedBatches, rows: int, lengths: int) -> None:
        self.batches, self.rows, self.lengths = batches, rows, lengths

    def __len__(self) -> int:
        return self.lengths * len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.lengths):
            for batch in self.batches:
                yield [i * self.rows + row for row in batch]
