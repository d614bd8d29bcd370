"""Stretches of genomes, and BED files of them: how training, validation and test data are kept apart."""

import gzip
import logging
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .bgzip import is_packed
from .genome import Genome

log = logging.getLogger(__name__)

# a BED file has these among its lines, which name no interval
_REMARKS = ("#", "track", "browser")
_FROM_ONE = " (BED counts from 0 and leaves its end out; is this counted from 1?)"


class Interval(NamedTuple):
    """Bases `start` to `end`, not included, of a record, counted from 0."""

    record: str
    start: int
    end: int


@dataclass(frozen=True)
class BedLine:
    """A line of a BED file: its number, the interval, and the columns after the first three."""

    number: int
    interval: Interval
    fields: list[str]


def read_bed(path: Path) -> list[BedLine]:
    """The intervals of a BED file (plain or .gz; columns record, start, end, and more), in its order.

    Where neighbours leave out one base between them they are warned of, for they seem to be counted from 1; of an
    interval that lies alone that cannot be told.

    Raises:
        ValueError: with file and line, for what is no interval, and where such neighbours start at 1.
    """
    found: list[BedLine] = []
    for number, text in read_lines(path):
        if text.startswith(_REMARKS):
            continue
        fields = text.split("\t") if "\t" in text else text.split()
        if len(fields) < 3 or not (fields[0] and is_count(fields[1]) and is_count(fields[2])):
            raise ValueError(
                f"{path}, line {number}: is not a line of BED, which has a record, a start and an end"
            )
        record, start, end = fields[0], int(fields[1]), int(fields[2])
        if start >= end:
            hint = _FROM_ONE if start == end else ""
            raise ValueError(f"{path}, line {number}: the start {start} is not below the end {end}{hint}")
        found.append(BedLine(number, Interval(record, start, end), fields[3:]))
    if not found:
        raise ValueError(f"{path}: there is no interval in it")
    _notice_one_based(path, found)
    return found


def locate(path: Path, lines: list[BedLine], genomes: list[Genome]) -> list[int]:
    """Which of the genomes each line of a BED file is in.

    Raises:
        ValueError: with file and line, for an interval that is not in exactly one, or reaches beyond its record.
    """
    owners: dict[str, list[int]] = {}
    for i, genome in enumerate(genomes):
        for name in genome.names:
            owners.setdefault(name, []).append(i)
    found = []
    for line in lines:
        record, _, end = line.interval
        where, having = f"{path}, line {line.number}", owners.get(record, [])
        if not having:
            raise ValueError(
                f"{where}: there is no record {record!r} in {', '.join(g.name for g in genomes)}"
            )
        if len(having) > 1:
            names = ", ".join(genomes[i].name for i in having)
            raise ValueError(
                f"{where}: there is a record {record!r} in each of {names}; give them names of their own"
            )
        length = genomes[having[0]].length(record)
        if end > length:
            hint = _FROM_ONE if end == length + 1 else ""
            raise ValueError(f"{where}: {record} has {length} bases, and the interval ends at {end}{hint}")
        found.append(having[0])
    return found


def is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


def is_reverse(path: Path, line: BedLine) -> bool:
    """Whether the sixth column of a line of BED, where there is one, names the opposite strand.

    Raises:
        ValueError: with file and line, for what is no strand.
    """
    strand = "".join(line.fields[2:3])
    if strand not in ("", "+", "-", "."):
        raise ValueError(
            f"{path}, line {line.number}: the strand {strand!r} is none of + - . (column 6; . is read as +)"
        )
    return strand == "-"


def _notice_one_based(path: Path, lines: list[BedLine]) -> None:
    """Neighbours that leave out one base may be counted from 1: surely if one starts there, never if any is at 0."""
    if any(line.interval.start == 0 for line in lines):
        return
    numbers = {line.interval: line.number for line in reversed(lines)}
    pairs = [(a, b) for a, b in pairwise(sorted(numbers)) if a.record == b.record]
    apart = [(a, b) for a, b in pairs if b.start == a.end + 1]
    for a, b in apart:
        if a.start == 1:
            raise ValueError(
                f"{path}, line {numbers[b]}: intervals that start at 1 and leave out a base between them are counted "
                "from 1; BED counts from 0 and leaves its end out: take 1 from every start"
            )
    if 2 * len(apart) > len(pairs):
        log.warning(
            "%s, line %d: like most neighbours (%d of %d), these leave out one base between them, as if counted from "
            "1; BED counts from 0 and leaves its end out: unless yours do too, take 1 from every start",
            path, min(numbers[b] for _, b in apart), len(apart), len(pairs),
        )  # fmt: skip


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain, gzip or bgzip, with their numbers; line ends and blank lines are left out.

    Raises:
        ValueError: with file and line, where it is not text or ends before its end.
    """
    number = 0
    with path.open("rb") as raw:
        packed = is_packed(path, raw)
        try:
            for line in gzip.GzipFile(fileobj=raw) if packed else raw:
                number += 1
                text = line.decode().removeprefix("\ufeff").rstrip("\r\n")
                if "\0" in text or "\r" in text:
                    raise ValueError
                if text.strip():
                    yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}, line {number + 1}: cannot be read ({error}); is the file whole?"
            ) from None
        except ValueError:
            raise ValueError(f"{path}, line {number}: is not text in UTF-8 with LF or CRLF") from None


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same bases in as few intervals as can be, sorted by record and start."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        last = merged[-1] if merged else None
        if last is not None and last.record == interval.record and interval.start <= last.end:
            merged[-1] = Interval(last.record, last.start, max(last.end, interval.end))
        else:
            merged.append(interval)
    return merged


def subtract(intervals: Iterable[Interval], taken: Iterable[Interval]) -> list[Interval]:
    """What of `intervals` is not in `taken`, merged."""
    holes = merge(taken)
    left = []
    for record, start, end in merge(intervals):
        # of disjoint holes in order, the ends are in order too
        first = bisect_left(holes, (record, start), key=lambda hole: (hole.record, hole.end))
        for hole in map(holes.__getitem__, range(first, len(holes))):
            if hole.record != record or hole.start >= end:
                break
            if start < hole.start:
                left.append(Interval(record, start, hole.start))
            start = max(start, hole.end)
        if start < end:
            left.append(Interval(record, start, end))
    return left
