"""Labelled stretches of DNA for classifiers: tables of sequences, or BED files of intervals of a genome."""

import csv
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .alphabet import COMPLEMENT, FOREIGN, PAD, SIZE, Nucleotides, reverse_complement, stored, tokens_of
from .base import DataModule
from .baselines import kmer_accuracy, length_accuracy
from .classes import count_classes, sort_classes
from .genome import Genome, find_genomes
from .genomics import pad
from .intervals import BedLine, is_reverse, locate, read_bed, read_lines
from .order import mix
from .splits import BED, Selection

log = logging.getLogger(__name__)

# bases a word of the regressions to compare with
WORDS = (3, 4, 5)
TABLES = (".csv", ".tsv", ".txt")


class Example(NamedTuple):
    """A labelled sequence: where its stored bytes are (which array, from, to, on which strand), and its names."""

    source: int
    start: int
    end: int
    reverse: bool
    name: str
    record: str
    label: str


@dataclass(frozen=True)
class Table:
    """The rows of a table in memory: all sequences as stored bytes, where each starts (rows + 1,), and what it is."""

    sequence: NDArray[np.uint8]
    starts: list[int]
    # file and line, or the file that it has for itself
    names: list[str]
    labels: list[str]
    # empty where the table names none
    records: list[str]


def read_table(path: Path, label: str = "label") -> Table:
    """A table (CSV, or TSV if its first line has a tab; plain or .gz) with the columns "sequence" and `label`.

    A column "chrom" says which record a sequence is from.

    Raises:
        ValueError: with file and line, for a missing column, a row of another width, an empty label or sequence, and
            letters that are no DNA.
    """
    lines = read_lines(path)
    number, text = next(lines, (1, ""))
    tabs = "\t" in text
    header = _cells(path, number, text, tabs)
    for column in ("sequence", label):
        if column not in header:
            raise ValueError(
                f"{path}, line {number}: there is no column {column!r} among {', '.join(header)}"
            )
    at, of = header.index("sequence"), header.index(label)
    chrom = header.index("chrom") if "chrom" in header else None
    pieces, starts, names, labels, records = [], [0], [], [], []
    for number, text in lines:
        cells = _cells(path, number, text, tabs)
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: has {len(cells)} columns, and the header {len(header)}")
        if not cells[of].strip():
            raise ValueError(f"{path}, line {number}: the label is empty")
        piece = _stored(cells[at].encode("utf-8"), f"{path}, line {number}")
        pieces.append(piece)
        starts.append(starts[-1] + len(piece))
        names.append(f"{path}:{number}")
        labels.append(cells[of].strip())
        records.append("" if chrom is None else cells[chrom].strip())
    if not labels:
        raise ValueError(f"{path}: there is no row in it")
    return Table(np.frombuffer(b"".join(pieces), dtype=np.uint8), starts, names, labels, records)


def read_classes(folder: Path) -> Table:
    """A folder with a folder for each class, in which every .txt file is a sequence (the layout of Genomic Benchmarks).

    Raises:
        ValueError: with the file, where one is empty or holds letters that are no DNA.
    """
    pieces, starts, names, labels = [], [0], [], []
    for path in sorted(folder.glob(_IN_CLASSES)):
        pieces.append(_stored(path.read_bytes(), str(path)))
        starts.append(starts[-1] + len(pieces[-1]))
        names.append(str(path))
        labels.append(path.parent.name)
    return Table(np.frombuffer(b"".join(pieces), dtype=np.uint8), starts, names, labels, [""] * len(labels))


def _stored(letters: bytes, where: str) -> bytes:
    """A sequence as stored bytes; `where` it is, is named if it is none."""
    piece = stored(letters)
    if piece and FOREIGN not in piece:
        return piece
    text = letters.decode("utf-8", errors="replace")
    letter = next((letter for letter in text if FOREIGN in stored(letter.encode())), "")
    problem = f"{letter!r} is no letter of DNA" if letter else "the sequence is empty"
    raise ValueError(f"{where}: {problem}")


def _cells(path: Path, number: int, text: str, tabs: bool) -> list[str]:
    if tabs:
        return text.split("\t")
    if '"' not in text:
        return text.split(",")
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: is no line of CSV ({error})") from None


class LabelledSequences:
    """Labelled sequences as samples, cut to `length` round their middle; see base.Samples."""

    def __init__(
        self,
        sources: list[Any],
        examples: list[Example],
        classes: list[str],
        length: int,
        seed: int,
        *,
        flip: bool,
    ) -> None:
        self.sources, self.length, self.seed, self.flip = sources, length, seed, flip
        numbers = {label: i for i, label in enumerate(classes)}
        self.names = [example.name for example in examples]
        self.labels = np.array([numbers[example.label] for example in examples])
        self.places = np.array([example[:4] for example in examples], dtype=np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int, pass_: int) -> dict[str, Any]:
        """The stored bytes of a sequence (up to length,), and the number of its class."""
        source, start, end, reverse = self.places[index].tolist()
        start += max(0, end - start - self.length) // 2
        sequence = _array(self.sources[source])[start : min(end, start + self.length)]
        # every other sequence, by lot, is seen from the other side
        if reverse ^ (self.flip and mix(self.seed, pass_, index) & 1):
            sequence = reverse_complement(sequence)
        return {"sequence": np.asarray(sequence), "label": int(self.labels[index])}


class LabelledSequenceDataModule(DataModule):
    """Labelled sequences, from tables or from BED files and a genome, for a classifier.

    A batch has `inputs` (b, l), padded at the end, `labels` (b,) and `lengths` (b,). After `setup`, `counts` has for
    each split the number of sequences of each of `classes`, and `majority` the share of the commonest: what a model
    that has learnt nothing reaches.

    Args:
        paths: tables with a header (.csv, .tsv, .txt, plain or .gz; columns sequence and label, and chrom if there is
            one); folders with a folder of .txt files for each class, a sequence each; or .bed files whose fourth
            column is the label and whose sixth, if any, is the strand.
        valid, test: what to hold out: files of the same kinds; names of chromosomes (column chrom, or the first of
            BED); or a fraction, drawn by content, so that equal sequences and opposite strands are on one side.
            Sequences that overlap can still be on both, so rather hold out chromosomes.
        genome: for .bed, the FASTA or GenBank files that they speak of.
        label: the column of tables that is the label.
        length: bases a sequence; of longer ones the middle is read, and how many there are is logged.
        fill: pad every row to `length`, not to the longest beside it: how much of a row is padding then tells how long
            its own sequence is (model.pooling=mean sees that), and batches have one shape.
        reverse_complement: read every other training sequence, by lot, on the opposite strand.
        batch_size, num_workers, seed: see DataModule.
    """

    PROVIDES = ("vocab_size", "complement", "num_classes", "classes")
    vocab_size = SIZE
    complement = COMPLEMENT

    def __init__(
        self,
        paths: str | list[str],
        valid: Selection = 0.1,
        test: Selection | None = None,
        genome: str | list[str] | None = None,
        label: str = "label",
        length: int = 1024,
        fill: bool = False,
        batch_size: int = 32,
        reverse_complement: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if length < 1:
            raise ValueError(f"data.length: must be 1 or more, not {length}")
        for key, given in (("valid", valid), ("test", test)):
            if isinstance(given, float | int) and not 0 < given < 1:
                raise ValueError(f"data.{key}: a fraction must be between 0 and 1, not {given}")
        self.length, self.fill, self.reverse_complement = length, fill, reverse_complement
        self.selections = {"val": valid} if test is None else {"val": valid, "test": test}
        self.files: dict[str, list[Path]] = {"train": _find(paths, "data.paths")}
        for split, given in self.selections.items():
            if _are_files(given):
                self.files[split] = _find(given, f"data.{_KEYS[split]}")  # type: ignore[arg-type]
        self.content: dict[Path, Table | list[BedLine]] = {
            path: read_bed(path)
            if path.name.endswith(BED)
            else read_classes(path)
            if path.is_dir()
            else read_table(path, label)
            for path in (path for paths in self.files.values() for path in paths)
        }
        self.classes = sort_classes(label for _, labels in self._labels() for label in labels)
        self.num_classes = len(self.classes)
        needed = any(isinstance(content, list) for content in self.content.values())
        if needed and genome is None:
            raise ValueError("data.genome: must be given, for a BED file has no sequence; give its FASTA")
        genomes = [genome] if isinstance(genome, str) else genome or []
        self.genome_files = find_genomes(genomes, "data.genome")
        self.counts: dict[str, list[int]] = {}
        self.majority: dict[str, float] = {}

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        return Nucleotides().to_dict()

    def describe(self) -> str:
        count = sum(len(labels) for _, labels in self._labels())
        return f"{count} sequences of {self.num_classes} classes, batches of {self.batch_size} x {self.length} bases"

    def prepare_data(self) -> None:
        for files in self.genome_files:
            files.build()

    def setup(self, stage: str) -> None:
        if self.samples:
            return
        genomes = [files.open() for files in self.genome_files]
        sources: list[Any] = [genome.sequence for genome in genomes]
        found = {split: self._examples(split, genomes, sources) for split in self.files}
        splits = self._split(found, sources)
        for split, examples in splits.items():
            if not examples:
                raise ValueError(f"data.{_KEYS[split]}: there is not a sequence in it")
            flip = self.reverse_complement and split == "train"
            samples = LabelledSequences(sources, examples, self.classes, self.length, self.seed, flip=flip)
            self.samples[split] = samples
            self.counts[split], self.majority[split], balance = count_classes(samples.labels, self.classes)
            longer = sum(example.end - example.start > self.length for example in examples)
            log.info(
                "%s: %d sequences (%s); of %d longer than %d the middle is read",
                split, len(examples), balance, longer, self.length,
            )  # fmt: skip
        self._warn_of_leaks(splits, sources)

    def names(self) -> list[str]:
        samples = self.samples[self.tested]
        assert isinstance(samples, LabelledSequences)
        return samples.names

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield "the commonest class, accuracy", self.majority["val"]
        train, held_out = (self._sequences(split) for split in ("train", "val"))
        lengths = [
            (np.array([len(sequence) for sequence in sequences]), labels)
            for sequences, labels in (train, held_out)
        ]
        yield "the length alone, accuracy", length_accuracy(lengths[0], lengths[1], self.num_classes)
        for k in WORDS:
            yield f"{k}-mer regression, accuracy", kmer_accuracy(train, held_out, self.num_classes, k)

    def _sequences(self, split: str) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        samples = self.samples[split]
        assert isinstance(samples, LabelledSequences)
        # on the strand and of the length that are in the file
        places = ((_array(samples.sources[source]), start, end) for source, start, end, _ in samples.places)
        return [tokens_of(sequence[start:end]) for sequence, start, end in places], samples.labels

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [tokens_of(row["sequence"]) for row in rows]
        return {
            "inputs": torch.from_numpy(pad(sequences, PAD, self.length if self.fill else 1)),
            "labels": torch.tensor([row["label"] for row in rows]),
            "lengths": torch.tensor([len(sequence) for sequence in sequences]),
        }

    def _labels(self) -> list[tuple[Path, list[str]]]:
        found = []
        for path, content in self.content.items():
            if isinstance(content, Table):
                found.append((path, content.labels))
                continue
            for line in content:
                if not line.fields or not line.fields[0].strip():
                    raise ValueError(f"{path}, line {line.number}: the fourth column, the label, is missing")
            found.append((path, [line.fields[0].strip() for line in content]))
        return found

    def _examples(self, split: str, genomes: list[Genome], sources: list[Any]) -> list[Example]:
        examples = []
        for path in self.files[split]:
            content = self.content[path]
            if isinstance(content, Table):
                names, records, labels = content.names, content.records, content.labels
                rows = zip(content.starts, content.starts[1:], names, records, labels, strict=False)
                examples += [Example(len(sources), a, b, False, *row) for a, b, *row in rows]
                sources.append(content.sequence)
                continue
            for line, i in zip(content, locate(path, content, genomes), strict=True):
                start, end = genomes[i].place(line.interval)
                reverse, label = is_reverse(path, line), line.fields[0].strip()
                place = line.interval
                name = f"{place.record}:{place.start}-{place.end}{'(-)' * reverse}"
                examples.append(Example(i, start, end, reverse, name, place.record, label))
        return examples

    def _split(self, found: dict[str, list[Example]], sources: list[Any]) -> dict[str, list[Example]]:
        """Take what is held out by name, then by lot, from the training examples."""
        splits, rest = dict(found), found["train"]
        for split, given in self.selections.items():
            if isinstance(given, float | int) or split in splits:
                continue
            names = {given} if isinstance(given, str) else set(given)
            missing = names - {example.record for example in rest}
            if missing:
                known = sorted({example.record for example in found["train"]} - {""})
                raise ValueError(
                    f"data.{_KEYS[split]}: no sequence is from {', '.join(sorted(missing))}; "
                    + (f"there are {', '.join(known[:8])}" if known else "there is no column chrom")
                )
            splits[split] = [example for example in rest if example.record in names]
            rest = [example for example in rest if example.record not in names]
        fractions = {
            split: given for split, given in self.selections.items() if isinstance(given, float | int)
        }
        if fractions:
            lots = [_lot(_letters(example, sources)) for example in rest]
            low = 0.0
            for split, fraction in fractions.items():
                splits[split] = [e for e, lot in zip(rest, lots, strict=True) if low <= lot < low + fraction]
                low += fraction
            rest = [example for example, lot in zip(rest, lots, strict=True) if lot >= low]
        return {**splits, "train": rest}

    def _warn_of_leaks(self, splits: dict[str, list[Example]], sources: list[Any]) -> None:
        seen = {_lot(_letters(example, sources)) for example in splits["train"]}
        for split in set(splits) - {"train"}:
            twice = sum(_lot(_letters(example, sources)) in seen for example in splits[split])
            if twice:
                log.warning("%d sequences of %s are trained on too: hold out other ones", twice, _KEYS[split])


# the files of a folder that are sequences, each in a folder named by its class
_IN_CLASSES = "*/*.txt"
_KEYS = {"train": "paths", "val": "valid", "test": "test"}


def _array(source: Any) -> NDArray[np.uint8]:
    return source if isinstance(source, np.ndarray) else source.array


def _letters(example: Example, sources: list[Any]) -> NDArray[np.uint8]:
    return _array(sources[example.source])[example.start : example.end]


def _lot(sequence: NDArray[np.uint8]) -> float:
    """A number from 0 to 1 that a sequence and its reverse complement draw by their content."""
    strands = tokens_of(sequence).tobytes(), tokens_of(reverse_complement(sequence)).tobytes()
    return int.from_bytes(hashlib.blake2b(min(strands), digest_size=8).digest(), "big") / 2**64


def _are_files(given: Selection) -> bool:
    names = [given] if isinstance(given, str) else given
    return isinstance(names, list) and any(_is_readable(Path(name).expanduser()) for name in names)


def _is_readable(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((*TABLES, ".bed")) or any(path.glob(_IN_CLASSES))


def _find(given: str | list[str], key: str) -> list[Path]:
    paths = [Path(path).expanduser() for path in ([given] if isinstance(given, str) else given)]
    if not paths:
        raise ValueError(f"{key}: names nothing; give a .csv, .tsv or .bed file, or a folder")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{key}: there is no file or folder {path}")
        if not _is_readable(path):
            raise ValueError(
                f"{key}: {path} is not a kind of file that is read: {' '.join(TABLES)} .bed, plain or .gz, "
                "or a folder of CLASS/NAME.txt"
            )
    return paths
