"""Genomes: FASTA and GenBank files to batches of next-base or masked-base prediction."""

import logging
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .alphabet import (
    BASES,
    COMPLEMENT,
    EOS,
    IGNORE,
    MASK,
    PAD,
    SIZE,
    SOFT_BIT,
    N,
    Nucleotides,
    reverse_complement,
    targets_of,
    tokens_of,
)
from .base import DataModule, Ordered
from .baselines import markov_bits
from .genome import Genome, find_genomes
from .intervals import Interval, subtract
from .order import EndlessBatches, GrowingBatches, mix
from .sequences import BLOCK
from .splits import Selection, select, split_genomes
from .windows import HeldOutWindows, RandomWindows, Stretches, Windows

log = logging.getLogger(__name__)

# of 65,536 bases: how many are predicted (15 %), and from which of these on the model sees a random base, or the base
# itself; below it sees MASK (80, 10 and 10 % of them: Devlin et al. 2019, section 3.1)
CHOSEN, RANDOM, SHOWN = 9840, 7872, 8856


# of the simple models to compare with
MARKOV_ORDERS = (0, 2, 3, 6, 9, 11)


class GenomeDataModule(DataModule):
    """Windows of genomes, which are read once into memory-mapped files.

    Held out are records, BED intervals or the last part of every record, never random windows (homologous and
    neighbouring sequence would leak; see datamodules/splits.py). Validation and test windows lie end to end.

    Args:
        paths: FASTA or GenBank files, plain, gzip or bgzip. Each path is a genome: a file, or all the files of a
            folder or glob.
        train: what to train on: names of records, or .bed files. Without it, all that is not held out.
        valid, test: what to hold out: a fraction of each record (its end), names of records, or .bed files. A record
            of that name is held out in every genome that has one.
        hide: what training reads as N: .bed files, or names of records. So the intervals of a benchmark stay
            unseen, and windows reach across them.
        weights: what part of the windows comes from each of `paths`; without them, each gives as many as it has.
        objective: "next" predicts each base from those before it, and a window starts with the token eos; "masked"
            predicts 15 % of the bases from all others; "genome" labels a window with the index of its path.
        length: bases a window. A stretch that is shorter is padded, and how many there are is logged.
        batch_size: windows of `length` a device and step.
        length_warmup: numbers of tokens, counted over all ranks, at which the length doubles: k of them start with
            length / 2^k, and as many more windows a batch.
        reverse_complement: read every other training window, by lot, on the opposite strand.
        soft_mask_weight: what a base in small letters (a repeat) counts in the loss.
        num_workers, seed: see DataModule.
    """

    PROVIDES = ("vocab_size", "complement", "num_classes", "classes")
    vocab_size = SIZE
    # the token of each token's opposite: what a model of both strands must know
    complement = COMPLEMENT

    def __init__(
        self,
        paths: str | list[str],
        train: str | list[str] | None = None,
        valid: Selection = 0.05,
        test: Selection | None = None,
        hide: str | list[str] | None = None,
        weights: list[float] | None = None,
        objective: Literal["next", "masked", "genome"] = "next",
        length: int = 1024,
        batch_size: int = 8,
        length_warmup: list[int] | None = None,
        reverse_complement: bool = True,
        soft_mask_weight: float = 1.0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        paths = [paths] if isinstance(paths, str) else paths
        self.length_warmup = length_warmup or []
        _check(paths, valid, test, weights, objective, length, self.length_warmup, soft_mask_weight)
        self.train, self.valid, self.test, self.hide = train, valid, test, hide
        self.weights = weights
        self.objective, self.length = objective, length
        self.reverse_complement, self.soft_mask_weight = reverse_complement, soft_mask_weight
        self.files = find_genomes(paths)
        self.num_classes = len(paths)
        names = [files.name for files in self.files]
        self.classes = names if len(set(names)) == len(names) else paths
        self.genomes: list[Genome] = []

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        # of masked bases even a causal model learns, and nobody could tell it by its shape
        learnt = {"objective": "masked"} if self.objective == "masked" else {}
        return Nucleotides().to_dict() | learnt

    def describe(self) -> str:
        size = sum(files.size() for files in self.files)
        files = f"{len(self.files)} genome{'s' * (len(self.files) > 1)} of {size / 1e6:.1f} MB"
        return f"{files}, {self.objective}, batches of {self.batch_size} x {self.length} bases"

    def prepare_data(self) -> None:
        for files in self.files:
            files.build()

    def setup(self, stage: str) -> None:
        if self.genomes:
            return
        self.genomes = [files.open() for files in self.files]
        self.fingerprint = " ".join(genome.digest for genome in self.genomes)
        splits = split_genomes(self.genomes, self.train, self.valid, self.test)
        self.parts = {split: self._places(parts) for split, parts in splits.items()}
        hidden = select(self.genomes, self.hide or [], "data.hide")
        self.hidden = self._places(hidden) if self.hide else None
        for split, parts in self.parts.items():
            key = {"train": "train", "val": "valid", "test": "test"}[split]
            sizes = np.concatenate([part.sizes for part in parts])
            log.info(
                "%s: %d bases in %d stretches, %d of them shorter than %d and padded",
                split, sizes.sum(), len(sizes), (sizes < self.length).sum(), self.length,
            )  # fmt: skip
            if not len(sizes):
                raise ValueError(
                    f"data.{key}: there is not a base in it; hold out less, or give more genomes"
                )
            if not any(map(_has_bases, parts)):
                paths = [str(path) for files in self.files for path in files.files]
                more = ", ..." * (len(paths) > 3)
                raise ValueError(
                    f"data.{key}: there is no A, C, G or T in it, only N and the like: {', '.join(paths[:3])}{more}"
                )
        # what there is to learn from
        self.seen = self._places(list(map(subtract, splits["train"], hidden)))
        if not any(map(_has_bases, self.seen)):
            raise ValueError(
                "data.hide: there is no A, C, G or T outside of it to train on; hide less, or give more genomes"
            )
        for genome in self.genomes:
            log.info(
                "%s: %d bases in %d records, %s",
                genome.name,
                len(genome),
                len(genome.names),
                genome.digest[:16],
            )
        if self.weights is not None:
            for path, part, weight in zip(self.files, self.seen, self.weights, strict=True):
                if weight and not len(part.starts):
                    raise ValueError(f"data.weights: nothing of {path.name} is left to train on; give it 0")
        self.samples = {
            "train": self._windows(self.length),
            **{
                split: GenomeWindows(HeldOutWindows(part, self.length))
                for split, part in self.parts.items()
                if split != "train"
            },
        }

    def _places(self, parts: list[list[Interval]]) -> list[Stretches]:
        """Where intervals of each genome lie."""
        return [
            Stretches(genome.sequence, [genome.place(interval) for interval in part])
            for genome, part in zip(self.genomes, parts, strict=True)
        ]

    def baselines(self) -> Iterator[tuple[str, float]]:
        if self.objective == "genome":
            return
        for order in MARKOV_ORDERS:
            bits = markov_bits(_read(self.seen), _read(self.parts["val"]), BASES, order)
            yield f"Markov model of order {order}, bits per base", bits

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.length_warmup:
            return super().train_dataloader()
        world, rank = self._world()
        batches = EndlessBatches(self.position, self.batch_size, rank, world)
        stages = [
            Ordered(self._windows(self.length >> halved), self.seed)
            for halved in range(len(self.length_warmup) + 1)
        ]
        return self._loader(_Stages(stages), GrowingBatches(batches, self.length, self.length_warmup))

    def _windows(self, length: int) -> "GenomeWindows":
        windows = RandomWindows(self.parts["train"], length, self.weights, self.seed)
        return GenomeWindows(windows, flip=self.reverse_complement, hidden=self.hidden)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [row["sequence"] for row in rows]
        tokens = pad([tokens_of(sequence) for sequence in sequences], PAD)
        batch = {"inputs": torch.from_numpy(tokens)}
        if self.objective == "genome":
            batch["labels"] = torch.tensor([row["genome"] for row in rows])
            batch["lengths"] = torch.tensor([len(sequence) for sequence in sequences])
            return batch
        targets = pad([targets_of(sequence) for sequence in sequences], IGNORE)
        batch["targets"] = torch.from_numpy(targets)
        if self.objective == "next":
            # what is seen is a base behind what is predicted
            tokens[:, 1:] = tokens[:, :-1]
            tokens[:, 0] = EOS
        else:
            for row, seen, predicted in zip(rows, tokens, targets, strict=True):
                hide(seen, predicted, row["draw"])
        if self.soft_mask_weight != 1:
            counts = np.array([1.0, self.soft_mask_weight], dtype=np.float32)
            batch["weights"] = torch.from_numpy(counts.take(pad(sequences, 0) >> SOFT_BIT))
        return batch


class GenomeWindows:
    """Windows of genomes as samples; see base.Samples.

    Args:
        flip: read every other window, by lot, on the opposite strand.
        hidden: stretches of each genome, none of which overlap, that are read as N.
    """

    def __init__(
        self, windows: Windows, *, flip: bool = False, hidden: list[Stretches] | None = None
    ) -> None:
        self.windows, self.flip, self.hidden = windows, flip, hidden

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The stored bytes of a window (up to length,), its genome, and a number that no other window draws."""
        window = self.windows.place(index, pass_)
        sequence = self.windows.parts[window.part].sequence.array[window.start : window.end]
        if self.hidden is not None:
            sequence = self._hide(sequence, window.start, self.hidden[window.part])
        if self.flip and mix(window.draw, 1) & 1:
            sequence = reverse_complement(sequence)
        return {"sequence": np.asarray(sequence), "genome": window.part, "draw": mix(window.draw, 2)}

    def _hide(self, sequence: NDArray[np.uint8], start: int, hidden: Stretches) -> NDArray[np.uint8]:
        low = int(np.searchsorted(hidden.ends, start, side="right"))
        high = int(np.searchsorted(hidden.starts, start + len(sequence)))
        if low < high:
            sequence = sequence.copy()
        for i in range(low, high):
            sequence[max(0, int(hidden.starts[i]) - start) : int(hidden.ends[i]) - start] = N
        return sequence


class _Stages(Dataset[Any]):
    """Training windows by (how often their length is halved, their number in the order of that length)."""

    def __init__(self, stages: list[Ordered]) -> None:
        self.stages = stages

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        halved, number = item
        return self.stages[halved][number]

    def place(self, item: tuple[int, int]) -> tuple[int, int]:
        """The index of a window among those of its length, and in which pass it is read."""
        halved, number = item
        return self.stages[halved].place(number)


def _read(parts: list[Stretches]) -> Iterator[NDArray[np.uint8]]:
    """The tokens of each stretch."""
    for part in parts:
        for start, end in zip(part.starts, part.ends, strict=True):
            yield tokens_of(part.sequence.array[start:end])


def _has_bases(part: Stretches) -> bool:
    """Whether there is an A, C, G or T in stretches."""
    return any(
        (tokens_of(part.sequence.array[at : min(at + BLOCK, end)]) < BASES).any()
        for start, end in zip(part.starts, part.ends, strict=True)
        for at in range(start, end, BLOCK)
    )


def pad(rows: list[NDArray[Any]], value: int, multiple: int = 1) -> NDArray[Any]:
    """Put rows under each other, (b, l) with l a multiple of so many, the shorter ones filled with `value`."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    padded = np.full((len(rows), length), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def hide(inputs: NDArray[np.uint8], targets: NDArray[np.int8], seed: int) -> None:
    """Choose 15 % of the known bases (l,) as targets and hide most of them from the inputs, both in place."""
    # one draw of 16 bits decides whether a base is a target and what is seen in its place
    lots = np.random.SFC64(seed).random_raw(-(-len(inputs) // 4)).view(np.uint16)[: len(inputs)]
    chosen = np.flatnonzero(lots < CHOSEN)
    chosen = chosen[targets[chosen] != IGNORE]
    kept, lots = targets[chosen], lots[chosen]
    targets[:] = IGNORE
    targets[chosen] = kept
    inputs[chosen[lots < RANDOM]] = MASK
    other = (lots >= RANDOM) & (lots < SHOWN)
    # as many lots lead here for each base
    inputs[chosen[other]] = lots[other] % BASES


def _check(
    paths: list[str],
    valid: Selection,
    test: Selection | None,
    weights: list[float] | None,
    objective: str,
    length: int,
    length_warmup: list[int],
    soft_mask_weight: float,
) -> None:
    if not paths:
        raise ValueError("data.paths: names nothing; give FASTA or GenBank files, folders or globs")
    fractions = {"valid": valid, "test": test}
    for key, given in fractions.items():
        if isinstance(given, float | int) and not 0 < given < 1:
            raise ValueError(f"data.{key}: a fraction must be between 0 and 1, not {given}")
    if isinstance(valid, float) and isinstance(test, float) and valid + test >= 1:
        raise ValueError(f"data.valid: {valid} and data.test: {test} leave nothing to train on")
    if weights is not None and (
        len(weights) != len(paths) or sum(weights) <= 0 or any(not 0 <= w < math.inf for w in weights)
    ):
        raise ValueError(f"data.weights: give {len(paths)} numbers, one for each of data.paths, 0 or more")
    if objective not in ("next", "masked", "genome"):
        raise ValueError(f"data.objective: must be next, masked or genome, not {objective!r}")
    if objective == "genome" and len(paths) < 2:
        raise ValueError(
            "data.paths: to tell genomes apart there must be two or more, each a path of its own"
        )
    if length < 1:
        raise ValueError(f"data.length: must be 1 or more, not {length}")
    if length_warmup != sorted(set(length_warmup)) or any(tokens < 1 for tokens in length_warmup):
        raise ValueError("data.length_warmup: give numbers of tokens, each greater than the one before")
    if length % (1 << len(length_warmup)):
        raise ValueError(
            f"data.length_warmup: a length of {length} cannot be halved {len(length_warmup)} times; give fewer"
        )
    if not 0 <= soft_mask_weight < math.inf:
        raise ValueError(f"data.soft_mask_weight: must be 0 or more, not {soft_mask_weight}")
