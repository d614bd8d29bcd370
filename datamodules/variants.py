"""Variants from VCF files (VCF 4.3, section 1), and the windows of a genome round them with either allele.

What is read of a variant is where it is and its alleles. Bases that REF and ALT share at their ends are no part of the
change: however it is written, the same change has the same window.

    REF  CAG     a change of A at the second base to nothing:    ... c [A] g ...   reference
    ALT  CG                                                      ... c  [] g ...   alternative
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .alphabet import BASES, LETTERS, MASK, letters_of, reverse_complement, stored, tokens_of
from .genome import Genome
from .intervals import is_count, read_lines

_COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
_SEQUENCE = re.compile(f"[{LETTERS}{LETTERS.lower()}]+")
# a deletion that spans this place, an allele by its name, and the two ways to write a breakend
_SYMBOLIC = re.compile(
    r"\*|<[^<>\s]+>|[A-Za-z]*[\[\]][^\[\]\s]+[\[\]][A-Za-z]*|\.[A-Za-z]+|[A-Za-z]+\.", re.ASCII
)


class Variant(NamedTuple):
    """A line of a VCF file: its number, the record, the position from 0, the alleles, and its text."""

    line: int
    record: str
    position: int
    id: str
    ref: str
    alts: tuple[str, ...]
    text: str


class VariantFile:
    """A VCF file, plain, gzip or bgzip: the lines of its header, and its variants, read anew by each iteration.

    Raises:
        ValueError: with file and line, from here or from an iteration, for what is no VCF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: list[str] = []
        for number, text in read_lines(path):
            if number == 1 and not text.startswith("##fileformat=VCF"):
                raise ValueError(f"{path}, line 1: is no VCF, which starts with ##fileformat=VCF")
            if not text.startswith("#"):
                raise ValueError(f"{path}, line {number}: there is no header line, #CHROM POS ID ..., before")
            self.header.append(text)
            if not text.startswith("##"):
                if text != _COLUMNS and not text.startswith(_COLUMNS + "\t"):
                    columns = _COLUMNS.replace("\t", " ")
                    raise ValueError(f"{path}, line {number}: the header must be {columns}, parted by tabs")
                self._start, self._tabs = number, text.count("\t")
                return
        raise ValueError(f"{path}: there is no header of VCF in it")

    def __iter__(self) -> Iterator[Variant]:
        for number, text in read_lines(self.path):
            if number > self._start:
                yield self._variant(number, text)

    def _variant(self, number: int, text: str) -> Variant:
        where, tabs = f"{self.path}, line {number}", text.count("\t")
        if tabs != self._tabs:
            raise ValueError(
                f"{where}: has {tabs + 1} columns, parted by tabs, and the header {self._tabs + 1}"
            )
        record, position, id, ref, alt, *rest = text.split("\t", 8)
        if not record or record != record.strip() or not id or not all(rest[:3]):
            raise ValueError(f"{where}: a column is empty; write . for what is missing")
        if not is_count(position):
            raise ValueError(f"{where}: the position {position!r} is no whole number")
        if not _SEQUENCE.fullmatch(ref):
            raise ValueError(f"{where}: REF {ref!r} is not written in bases")
        alts = () if alt == "." else tuple(alt.split(","))
        for other in alts:
            if not _SEQUENCE.fullmatch(other) and not _SYMBOLIC.fullmatch(other):
                raise ValueError(f"{where}: ALT {other!r} is no allele")
        return Variant(number, record, int(position) - 1, id, ref, alts, text)


class Change(NamedTuple):
    """Bases `start` to `end`, not included, that become `alt` (stored bytes; see alphabet.py).

    Places are those in the whole genome; the record goes from `low` to `high`.
    """

    start: int
    end: int
    alt: bytes
    low: int
    high: int


class Skip(NamedTuple):
    """Why an allele is left out: in a word, and in a sentence."""

    status: str
    reason: str


def changes_of(variant: Variant, genome: Genome, longest: int) -> list[Change | Skip]:
    """What each ALT allele of a variant changes in a genome, or why that cannot be said.

    Args:
        longest: of how many bases a changed stretch may be, before and after.
    """
    if variant.record not in genome.index:
        reason = f"{genome.name} has no record {variant.record}; it has {', '.join(genome.names[:3])}"
        return _all(variant, "no_record", reason + ", ..." * (len(genome.names) > 3))
    low, high = genome.place((variant.record, 0, genome.length(variant.record)))
    start = low + variant.position
    if variant.position < 0 or start + len(variant.ref) > high:
        reason = f"REF is not within {variant.record}, which has {high - low} bases"
        return _all(variant, "out_of_range", reason)
    there = letters_of(genome.sequence.array[start : start + len(variant.ref)]).decode()
    if there != variant.ref.upper():
        return _all(variant, "ref_mismatch", f"REF is {_short(variant.ref)}, the genome has {_short(there)}")
    return [_change(variant.ref, alt, start, low, high, longest) for alt in variant.alts]


def _change(ref: str, alt: str, start: int, low: int, high: int, longest: int) -> Change | Skip:
    if not _SEQUENCE.fullmatch(alt):
        return Skip("symbolic", f"{_short(alt)} is not written in bases")
    before, after = stored(ref.upper().encode()), stored(alt.upper().encode())
    shared = _shared(before[::-1], after[::-1])
    before, after = before[: len(before) - shared], after[: len(after) - shared]
    shared = _shared(before, after)
    before, after, start = before[shared:], after[shared:], start + shared
    if not before and not after:
        return Skip("no_change", "REF and ALT are the same")
    if max(before + after) >= BASES:
        return Skip("ambiguous", f"{_short(ref)} or {_short(alt)} has a letter for several bases")
    if max(len(before), len(after)) > longest:
        return Skip("too_long", f"{max(len(before), len(after))} bases are more than the window's {longest}")
    return Change(start, start + len(before), after, low, high)


def _shared(one: bytes, two: bytes) -> int:
    """How many bytes two begin with alike."""
    different = (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return next(different, min(len(one), len(two)))


def _all(variant: Variant, status: str, reason: str) -> list[Change | Skip]:
    return [Skip(status, reason)] * len(variant.alts)


def _short(letters: str) -> str:
    return letters if len(letters) <= 20 else f"{letters[:20]}... ({len(letters)} bases)"


class Pieces(NamedTuple):
    """Sequences of tokens laid end to end (t,), and how long each is (s,)."""

    tokens: NDArray[np.uint8]
    lengths: NDArray[np.int64]


class Windows:
    """The windows of changes: what each changes, with `flank` bases of its record before and behind, where there are.

    A window is parted at the allele: places that several changes share are read once, and so is the reference of each.
    `place` (alleles,) is where each allele stands, and `alleles` (changes, 2) are the numbers of a change's two.
    """

    def __init__(self, genome: Genome, changes: list[Change], flank: int) -> None:
        self.array = genome.sequence.array
        places: dict[tuple[int, int, int, int], int] = {}
        known: dict[tuple[int, bytes], int] = {}
        letters: list[bytes] = []
        place, pairs = [], []
        for change in changes:
            at = places.setdefault((change.start, change.end, change.low, change.high), len(places))
            pair = []
            for allele in (tokens_of(self.array[change.start : change.end]).tobytes(), change.alt):
                number = known.setdefault((at, allele), len(known))
                if number == len(letters):
                    letters.append(allele)
                    place.append(at)
                pair.append(number)
            pairs.append(pair)
        start, end, low, high = np.array(list(places), dtype=np.int64).reshape(-1, 4).T
        self.before = np.maximum(low, start - flank), start
        self.behind = end, np.minimum(high, end + flank)
        self.place, self.alleles = np.array(place), np.array(pairs)
        self.letters = np.frombuffer(b"".join(letters), dtype=np.uint8)
        self.sizes = np.array([len(allele) for allele in letters])

    def parted(self, *, reverse: bool = False) -> tuple[Pieces, Pieces]:
        """What comes before each place, and each allele with what follows it; on the opposite strand if `reverse`."""
        before, behind = (self.behind, self.before) if reverse else (self.before, self.behind)
        prefix = _gather(self.array, *before, reverse=reverse)
        flanks = _gather(self.array, *behind)
        # where an allele and its flank are in one array of them all
        ends, flank_ends = np.cumsum(self.sizes), np.cumsum(flanks.lengths) + len(self.letters)
        pairs = [
            (ends - self.sizes, ends),
            ((flank_ends - flanks.lengths)[self.place], flank_ends[self.place]),
        ]
        starts, stops = (np.stack(sides, axis=1).ravel() for sides in zip(*pairs, strict=True))
        suffix = _gather(np.concatenate([self.letters, flanks.tokens]), starts, stops, reverse=reverse)
        return prefix, Pieces(suffix.tokens, suffix.lengths.reshape(-1, 2).sum(1))

    def masked(self, *, reverse: bool = False) -> tuple[Pieces, NDArray[np.int64]]:
        """Whole windows round single bases, those hidden; and where these are in the row of all windows."""
        pieces = _gather(self.array, self.before[0], self.behind[1], reverse=reverse)
        inside = self.behind[1] - self.behind[0] if reverse else self.before[1] - self.before[0]
        at = np.cumsum(pieces.lengths) - pieces.lengths + inside
        pieces.tokens[at] = MASK
        return pieces, at


def _gather(
    array: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], *, reverse: bool = False
) -> Pieces:
    """The tokens of array[start:end] of each pair; with `reverse`, of the opposite strand of each."""
    lengths = ends - starts
    # on the other strand of a row, what was last comes first
    order = slice(None, None, -1) if reverse else slice(None)
    starts, sizes = starts[order], lengths[order]
    row = array[np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())]
    return Pieces(tokens_of(reverse_complement(row) if reverse else row), lengths)
