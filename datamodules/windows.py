"""Windows of genomes: at random places for training, end to end for held-out data."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .alphabet import reverse_complement
from .cache import TokenFile
from .genome import Genome
from .intervals import Interval
from .order import mix


class Stretches:
    """Parts of one genome in its order, by their places in its file: starts and ends (k,)."""

    def __init__(self, genome: Genome, intervals: list[Interval]) -> None:
        self.sequence: TokenFile = genome.sequence
        places = sorted(genome.place(interval) for interval in intervals)
        self.starts, self.ends = np.array(places, dtype=np.int64).reshape(-1, 2).T

    @property
    def sizes(self) -> NDArray[np.int64]:
        return self.ends - self.starts


class RandomWindows:
    """Windows of `length` bases at places drawn anew on every pass; see base.Samples.

    A pass draws one window from each of n equal shares of the training bases, n windows having as many bases as
    there are, so that all of the genome is seen about equally often; any window within a stretch is as likely as
    any other. A stretch shorter than the window is read whole, as often as if it were one window long. With
    weights, one for each genome, these say what part of the windows comes from which.

    Args:
        flip: read every other window, by lot, on the opposite strand.
    """

    def __init__(
        self, parts: list[Stretches], length: int, weights: list[float] | None, seed: int, *, flip: bool
    ) -> None:
        self.parts, self.length, self.seed, self.flip = parts, length, seed, flip
        self.bounds = [np.cumsum([0, *np.maximum(part.sizes, length)]) for part in parts]
        counts = [int(bounds[-1]) // length for bounds in self.bounds]
        if weights is not None:
            total, whole = sum(counts), sum(weights)
            counts = [round(total * weight / whole) for weight in weights]
        # a genome without a stretch has no window, any other at least one
        counts = [max(1, count) if len(part.starts) else 0 for count, part in zip(counts, parts, strict=True)]
        self.first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self.first[-1])

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The stored bytes of a window (up to length,), its genome, and a number that no other window draws."""
        genome = int(np.searchsorted(self.first, index, side="right")) - 1
        part, bounds = self.parts[genome], self.bounds[genome]
        share, shares = index - int(self.first[genome]), int(self.first[genome + 1] - self.first[genome])
        low, high = (k * int(bounds[-1]) // shares for k in (share, share + 1))
        draw = mix(self.seed, self.length, pass_, index)
        place = low + draw % max(1, high - low)
        i = int(np.searchsorted(bounds, place, side="right")) - 1
        start, end, width = int(part.starts[i]), int(part.ends[i]), int(bounds[i + 1] - bounds[i])
        # each place in the stretch stands for one of the starts that leave the window inside it
        start += (place - int(bounds[i])) * max(1, end - start - self.length + 1) // width
        sequence = part.sequence.array[start : min(start + self.length, end)]
        if self.flip and mix(draw, 1) & 1:
            sequence = reverse_complement(sequence)
        return {"sequence": np.asarray(sequence), "genome": genome, "draw": mix(draw, 2)}


class HeldOutWindows:
    """Windows that cover each stretch from its start, none twice; the last of a stretch may be shorter."""

    def __init__(self, parts: list[Stretches], length: int) -> None:
        self.parts, self.length = parts, length
        self.first = [np.cumsum([0, *(-(-part.sizes // length))]) for part in parts]
        self.genomes = np.cumsum([0, *(first[-1] for first in self.first)])

    def __len__(self) -> int:
        return int(self.genomes[-1])

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The stored bytes of a window (up to length,), its genome, and a number that no other window draws."""
        genome = int(np.searchsorted(self.genomes, index, side="right")) - 1
        part, first, k = self.parts[genome], self.first[genome], index - int(self.genomes[genome])
        i = int(np.searchsorted(first, k, side="right")) - 1
        start = int(part.starts[i]) + (k - int(first[i])) * self.length
        sequence = part.sequence.array[start : min(start + self.length, int(part.ends[i]))]
        return {"sequence": np.asarray(sequence), "genome": genome, "draw": mix(index)}
