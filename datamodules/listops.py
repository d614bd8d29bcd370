"""ListOps: the value of nested lists of digits (Nangia and Bowman, 1804.06028; Long Range Arena, 2011.04006, 2.2).

MAX, MIN, MED (the median; of two middle ones, their mean rounded down) and SM (the sum modulo 10) of two or more
arguments, digits or lists. A short row and its label; every symbol is one token:

    inputs    [MAX  2  7  [MIN  4  7  ]  0  [SM  6  8  5  ]  ]
    label     9

The trees are distributed as the arena's: an argument is an operation with probability 1/4 and otherwise a digit, all
operations and all digits being alike; an operation has 2 to 10 arguments; on the tenth level all are digits; and only
rows of more than 500 and fewer than 2,000 tokens are kept, none twice. The rows are drawn anew, since the arena's
have no seed. The parentheses in which the arena's files put an operation and its arguments, and which its tokenizer
drops, are left out from the start; they count for no length here or there.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .labelled_rows import LabelledRows, LabelledRowsDataModule, Rows, one_row
from .order import mix

SYMBOLS = (*map(str, range(10)), "[MAX", "[MIN", "[MED", "[SM", "]")
MAX, MIN, MED, SM, CLOSE, PADDING = range(10, 16)
# of an argument, to be an operation
NESTED = 0.25
# trees that are drawn at a time; another number gives other rows
_BLOCK = 1 << 12
# blocks without anything new, after which there is nothing new
_PATIENCE = 20

Integers = NDArray[np.int64]


class ListOpsDataModule(LabelledRowsDataModule):
    """Rows of ListOps, as drawn above; the defaults are those of Long Range Arena. No row comes twice.

    Args:
        length, shortest: tokens that a row has fewer and more than.
        depth: levels of a tree; on the last one there are digits alone.
        arguments: of an operation, at most.
        rows: how many there are to train on.
        held_out_rows: how many to validate on, and to test on.
        draw_seed: of the rows; `seed` is that of their order alone.
        batch_size, num_workers, seed: see DataModule.
    """

    def __init__(
        self,
        length: int = 2000,
        shortest: int = 500,
        depth: int = 10,
        arguments: int = 10,
        rows: int = 96_000,
        held_out_rows: int = 2000,
        draw_seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            [str(i) for i in range(10)], len(SYMBOLS) + 1, PADDING, length, batch_size, num_workers, seed
        )
        if arguments < 2:
            raise ValueError(f"data.arguments: must be 2 or more, not {arguments}")
        if depth < 2:
            raise ValueError(f"data.depth: must be 2 or more, not {depth}")
        if not 3 <= shortest < length - 1:
            raise ValueError(
                f"data.shortest: must be from 3 to data.length - 2, {length - 2}, not {shortest}"
            )
        if rows < 1 or held_out_rows < 1:
            raise ValueError(
                f"data.rows, data.held_out_rows: must be 1 or more, not {rows} and {held_out_rows}"
            )
        self.trees = Trees(depth, arguments, shortest, length)
        self.counts = {"train": rows, "val": held_out_rows, "test": held_out_rows}
        self.draw_seed = draw_seed

    def describe(self) -> str:
        return (
            f"{sum(self.counts.values())} rows of ListOps, batches of {self.batch_size} x up to {self.length}"
        )

    def digest(self) -> str:
        values = [self.trees.depth, self.trees.arguments, self.trees.shortest, self.trees.longest]
        return f"listops 1 {json.dumps([*values, self.counts, self.draw_seed])}"

    def make_rows(self) -> Iterator[tuple[str, Rows]]:
        wanted = [split for split, count in self.counts.items() for _ in range(count)]
        seen: set[bytes] = set()
        block, idle = 0, 0
        while idle < _PATIENCE:
            random = np.random.Generator(np.random.SFC64(mix(self.draw_seed, block)))
            rows, before = self.trees.draw(random, _BLOCK), len(seen)
            pieces = np.split(rows.tokens, rows.lengths.cumsum()[:-1])
            for tokens, label in zip(pieces, rows.labels.tolist(), strict=False):
                key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
                if key in seen:
                    continue
                yield wanted[len(seen)], one_row(tokens, label)
                seen.add(key)
                if len(seen) == len(wanted):
                    return
            block, idle = block + 1, 0 if len(seen) > before else idle + 1
        raise ValueError(
            f"data.rows: {len(seen)} different rows of this kind were found; ask for fewer, or for longer ones"
        )

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield from super().baselines()
        train, held_out = (self._outermost(split) for split in ("train", "val"))
        counts = np.zeros((len(SYMBOLS), self.num_classes), dtype=np.int64)
        np.add.at(counts, train, 1)
        guesses = counts.argmax(1)[held_out[0]]
        yield (
            "the commonest class of each outermost operation, accuracy",
            float((guesses == held_out[1]).mean()),
        )

    def _outermost(self, split: str) -> tuple[Integers, Integers]:
        """The first token of every row, and its class."""
        rows = self.samples[split]
        assert isinstance(rows, LabelledRows)
        starts = np.concatenate([[0], rows.ends.array[:-1]])
        return rows.tokens.array[starts].astype(np.int64), np.asarray(rows.labels.array)


class Level(NamedTuple):
    """The nodes of many trees at one depth, those of one parent side by side."""

    # a digit or an operation (n,)
    tokens: Integers
    # which node of the level above each is an argument of, and of which tree (n,)
    parents: Integers
    trees: Integers


@dataclass(frozen=True)
class Trees:
    """Expressions of one kind: how deep and wide they are, and between which lengths they lie, both exclusive."""

    depth: int
    arguments: int
    shortest: int
    longest: int

    def draw(self, random: np.random.Generator, count: int) -> Rows:
        """Those among `count` trees that are neither too short nor too long, with their values as labels."""
        levels, lengths = self._grow(random, count)
        kept = (lengths > self.shortest) & (lengths < self.longest)
        if not kept.any():
            return Rows(np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.int64))
        levels = _select(levels, kept)
        values, sizes = _evaluate(levels)
        return Rows(_write(levels, sizes), sizes[0], values[0])

    def _grow(self, random: np.random.Generator, count: int) -> tuple[list[Level], Integers]:
        """Trees from the root down, and the length of each; one that is too long is grown no further."""
        # a root that is a digit would be too short
        tokens, parents, trees = (
            random.integers(MAX, CLOSE, count),
            np.zeros(count, np.int64),
            np.arange(count),
        )
        levels, lengths = [], np.zeros(count, np.int64)
        for depth in range(2, self.depth + 1):
            levels.append(Level(tokens, parents, trees))
            opened = tokens >= MAX
            lengths += np.bincount(trees, 1 + opened, count).astype(np.int64)
            growing = np.flatnonzero(opened & (lengths < self.longest)[trees])
            parents = growing.repeat(random.integers(2, self.arguments + 1, len(growing)))
            trees = trees[parents]
            tokens = random.integers(0, MAX, len(parents))
            if depth < self.depth:
                nested = random.random(len(parents)) < NESTED
                tokens[nested] = random.integers(MAX, CLOSE, nested.sum())
        levels.append(Level(tokens, parents, trees))
        return levels, lengths + np.bincount(trees, minlength=count)


def _select(levels: list[Level], kept: NDArray[np.bool_]) -> list[Level]:
    """The levels of some of the trees alone."""
    found, numbers = [], np.zeros(len(kept), np.int64)
    for level in levels:
        own = kept[level.trees]
        found.append(Level(level.tokens[own], numbers[level.parents[own]], level.trees[own]))
        numbers = own.cumsum() - 1
    return [level for level in found if len(level.tokens)]


def _evaluate(levels: list[Level]) -> tuple[list[Integers], list[Integers]]:
    """From the leaves up, the value of every node and how many tokens it has."""
    values = [level.tokens.copy() for level in levels]
    sizes = [np.ones(len(level.tokens), np.int64) for level in levels]
    for i in reversed(range(len(levels) - 1)):
        starts, operations = _groups(levels[i + 1].parents)
        values[i][operations] = _apply(levels[i].tokens[operations], values[i + 1], starts)
        sizes[i][operations] = 2 + np.add.reduceat(sizes[i + 1], starts)
    return values, sizes


def _groups(parents: Integers) -> tuple[Integers, Integers]:
    """Where the arguments of each parent start, and the parents."""
    starts = np.flatnonzero(np.diff(parents, prepend=-1))
    return starts, parents[starts]


def _apply(operations: Integers, arguments: Integers, starts: Integers) -> Integers:
    """The value of each operation on the arguments from its start to the next one's."""
    counts = np.diff(starts, append=len(arguments))
    groups = np.arange(len(starts)).repeat(counts)
    # sorted within their group, which the tens keep apart
    ordered = np.sort(10 * groups + arguments) % 10
    lower, upper = ordered[starts + (counts - 1) // 2], ordered[starts + counts // 2]
    results = {
        MAX: ordered[starts + counts - 1],
        MIN: ordered[starts],
        MED: (lower + upper) // 2,
        SM: np.add.reduceat(arguments, starts) % 10,
    }
    return np.select([operations == operation for operation in results], list(results.values()))


def _write(levels: list[Level], sizes: list[Integers]) -> NDArray[np.uint8]:
    """From the roots down, the tokens of all trees, one after the other."""
    written = np.empty(sizes[0].sum(), np.uint8)
    places = sizes[0].cumsum() - sizes[0]
    for i, level in enumerate(levels):
        if i:
            # behind the operation, and behind the arguments before it
            before = sizes[i].cumsum() - sizes[i]
            starts, _ = _groups(level.parents)
            first = before[starts].repeat(np.diff(starts, append=len(before)))
            places = places[level.parents] + 1 + before - first
        written[places] = level.tokens
        opened = level.tokens >= MAX
        written[(places + sizes[i])[opened] - 1] = CLOSE
    return written
