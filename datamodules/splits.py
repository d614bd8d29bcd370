"""Training, validation and test parts of genomes, by the names of records, by BED files, or by a fraction.

Held-out data are whole records or long stretches, never random windows: genomes repeat themselves, and a window whose
neighbours, duplicates or other strand were trained on measures memory, not prediction. For the same reason hold out
whole chromosomes where there are several; of close relatives hold out the same chromosome in each, by its name.
"""

import difflib
from pathlib import Path

from .genome import Genome
from .intervals import Interval, locate, merge, read_bed, subtract

# a fraction of each record, records by their names, or a BED file; or several of the latter two
Selection = float | str | list[str]
BED = (".bed", ".bed.gz")
# the intervals of each genome
Parts = list[list[Interval]]


def split_genomes(
    genomes: list[Genome], train: str | list[str] | None, valid: Selection, test: Selection | None
) -> dict[str, Parts]:
    """The intervals of "train", "val" and, if asked for, "test"; no base is in two of them.

    Without `train`, all that is not held out is trained on. A fraction is the last part of each record, test after
    validation; what another selection names is left out of it.

    Raises:
        ValueError: for a record that there is not, a BED file as read_bed and locate say, and bases selected twice.
    """
    chosen = {"train": train, "val": valid, "test": test}
    named = {
        split: select(genomes, given, _KEYS[split])
        for split, given in chosen.items()
        if isinstance(given, str | list)
    }
    splits = list(named)
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            _refuse_overlap(genomes, named, one, other)
    held = {split: parts for split, parts in named.items() if split != "train"}
    fractions = {split: given for split, given in chosen.items() if isinstance(given, float | int)}
    taken = [[interval for parts in held.values() for interval in parts[i]] for i in range(len(genomes))]
    end = 0.0
    # the test part is the very end
    for split in ("test", "val"):
        if split in fractions:
            start = end + fractions[split]
            ends = [_ends(genome, start, end) for genome in genomes]
            held[split] = [subtract(part, names) for part, names in zip(ends, taken, strict=True)]
            end = start
    wholes = named.get("train") or [
        [Interval(name, 0, genome.length(name)) for name in genome.names] for genome in genomes
    ]
    rest = [
        subtract(whole, [interval for parts in held.values() for interval in parts[i]])
        for i, whole in enumerate(wholes)
    ]
    return {"train": rest, **{split: held[split] for split in ("val", "test") if split in held}}


_KEYS = {"train": "data.train", "val": "data.valid", "test": "data.test"}


def select(genomes: list[Genome], given: str | list[str], key: str) -> Parts:
    """The intervals of each genome that names of records or BED files, which `key` gave, stand for.

    Raises:
        ValueError: for a record that there is not, and a BED file as read_bed and locate say.
    """
    parts: Parts = [[] for _ in genomes]
    for item in [given] if isinstance(given, str) else given:
        if item.endswith(BED):
            path = Path(item).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"{key}: there is no file {item}")
            lines = read_bed(path)
            for line, i in zip(lines, locate(path, lines, genomes), strict=True):
                parts[i].append(line.interval)
            continue
        having = [i for i, genome in enumerate(genomes) if item in genome.index]
        if not having:
            near = difflib.get_close_matches(item, [name for genome in genomes for name in genome.names], 1)
            hint = f"; is it {near[0]}?" if near else ""
            raise ValueError(f"{key}: there is no record {item!r}{hint}")
        for i in having:
            parts[i].append(Interval(item, 0, genomes[i].length(item)))
    return [merge(part) for part in parts]


def _ends(genome: Genome, start: float, end: float) -> list[Interval]:
    """The part of each record between two fractions, counted from its end."""
    found = []
    for name in genome.names:
        length = genome.length(name)
        low, high = length - round(length * start), length - round(length * end)
        if low < high:
            found.append(Interval(name, low, high))
    return found


def _refuse_overlap(genomes: list[Genome], named: dict[str, Parts], one: str, other: str) -> None:
    for genome, a, b in zip(genomes, named[one], named[other], strict=True):
        shared = subtract(a, subtract(a, b))
        if shared:
            record, start, end = shared[0]
            raise ValueError(
                f"{_KEYS[other]}: bases {start} to {end} of {record} of {genome.name} are in {_KEYS[one]} too"
            )
