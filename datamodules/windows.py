"""Windows of long sequences: at random places for training, end to end for held-out data."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .cache import TokenFile
from .order import mix


class Stretches:
    """Parts of one sequence in its order, by their places in its file: starts and ends (k,)."""

    def __init__(self, sequence: TokenFile, places: list[tuple[int, int]]) -> None:
        self.sequence = sequence
        self.starts, self.ends = np.array(sorted(places), dtype=np.int64).reshape(-1, 2).T

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.ends - self.starts


class Window(NamedTuple):
    """Where a window lies: of which sequence, in which of its stretches, from where to where in the file; and a lot."""

    part: int
    stretch: int
    start: int
    end: int
    # a number that no other window draws
    draw: int


class Windows(Protocol):
    """Windows that can be found in any order, and differently on every pass."""

    parts: list[Stretches]

    def __len__(self) -> int: ...

    def place(self, index: int, pass_: int) -> Window: ...


class RandomWindows:
    """Windows of `length` at places drawn anew on every pass.

    A pass draws one window from each of n equal shares of the sequences, n windows having as many elements as there
    are, so that all is seen about equally often; any window within a stretch is as likely as any other. A stretch
    shorter than the window is read whole, as often as if it were one window long. With weights, one for each of
    `parts`, these say what part of the windows comes from which.
    """

    def __init__(self, parts: list[Stretches], length: int, weights: list[float] | None, seed: int) -> None:
        self.parts, self.length, self.seed = parts, length, seed
        self.bounds = [np.cumsum([0, *np.maximum(part.sizes, length)]) for part in parts]
        counts = [int(bounds[-1]) // length for bounds in self.bounds]
        if weights is not None:
            total, whole = sum(counts), sum(weights)
            counts = [round(total * weight / whole) for weight in weights]
        # a sequence without a stretch has no window, any other at least one
        counts = [max(1, count) if len(part.starts) else 0 for count, part in zip(counts, parts, strict=True)]
        self.first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, index: int, pass_: int) -> Window:
        i = int(np.searchsorted(self.first, index, side="right")) - 1
        part, bounds = self.parts[i], self.bounds[i]
        share, shares = index - int(self.first[i]), int(self.first[i + 1] - self.first[i])
        low, high = (k * int(bounds[-1]) // shares for k in (share, share + 1))
        draw = mix(self.seed, self.length, pass_, index)
        place = low + draw % max(1, high - low)
        j = int(np.searchsorted(bounds, place, side="right")) - 1
        start, end, width = int(part.starts[j]), int(part.ends[j]), int(bounds[j + 1] - bounds[j])
        # each place in the stretch stands for one of the starts that leave the window inside it
        start += (place - int(bounds[j])) * max(1, end - start - self.length + 1) // width
        return Window(i, j, start, min(start + self.length, end), draw)


class HeldOutWindows:
    """Windows that cover each stretch from its start, none twice; the last of a stretch may be shorter."""

    def __init__(self, parts: list[Stretches], length: int) -> None:
        self.parts, self.length = parts, length
        self.first = [np.cumsum([0, *(-(-part.sizes // length))]) for part in parts]
        self.counts = np.cumsum([0, *(first[-1] for first in self.first)])

    def __len__(self) -> int:
        return int(self.counts[-1])

    def place(self, index: int, pass_: int) -> Window:
        i = int(np.searchsorted(self.counts, index, side="right")) - 1
        part, first, k = self.parts[i], self.first[i], index - int(self.counts[i])
        j = int(np.searchsorted(first, k, side="right")) - 1
        start = int(part.starts[j]) + (k - int(first[j])) * self.length
        return Window(i, j, start, min(start + self.length, int(part.ends[j])), mix(index))
