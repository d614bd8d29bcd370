"""Genomes on disk: read as their files say, built once and whole, kept apart by records, BED files or fractions."""

import gzip
import io
import logging
import multiprocessing
import os
import pickle
import random
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from mambazoo.datamodules import genome as genome_module
from mambazoo.datamodules import progress
from mambazoo.datamodules.alphabet import letters_of
from mambazoo.datamodules.cache import cache_root
from mambazoo.datamodules.genome import Genome, find_genomes
from mambazoo.datamodules.intervals import Interval, locate, merge, read_bed, subtract
from mambazoo.datamodules.splits import split_genomes


def letters(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGTacgtN", (9, 9, 9, 9, 3, 3, 3, 3, 1), k=length))


def write_fasta(path: Path, **records: int) -> Path:
    """A FASTA file of records of given lengths, in lines of 60."""
    lines = []
    for i, (name, length) in enumerate(records.items()):
        sequence = letters(length, i)
        lines += [f">{name} made up", *(sequence[j : j + 60] for j in range(0, length, 60))]
    path.write_text("\n".join(lines) + "\n")
    return path


def opened(*paths: Path) -> list[Genome]:
    found = find_genomes([str(path) for path in paths])
    for files in found:
        files.build()
    return [files.open() for files in found]


def test_a_genome_reads_as_its_file(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fa", one=1000, two=77, three=500)
    [genome] = opened(path)
    assert genome.names == ["one", "two", "three"]
    for record in SeqIO.parse(path, "fasta"):
        whole = bytes(record.seq.upper())
        assert genome.length(record.id) == len(whole)
        for start, end in ((0, len(whole)), (3, 70), (60, 61), (5, 5)):
            assert letters_of(genome.read(record.id, start, end)) == whole[start:end]
    assert genome.place(("two", 3, 77)) == (1003, 1077)
    with pytest.raises(ValueError, match=r"two of a.fa has bases 0 to 77, not 70 to 78"):
        genome.read("two", 70, 78)
    with pytest.raises(ValueError, match="has no record four"):
        genome.read("four", 0, 1)


def test_real_windows_are_those_that_biopython_reads(data: Path) -> None:
    path = data / "dna" / "human_hg19_chrX_1-45000000.fa.gz"
    [genome] = opened(path)
    assert len(genome) == 45_000_000
    with gzip.open(path, "rt") as file:
        whole = next(SeqIO.parse(file, "fasta"))
    lot = random.Random(0)
    for _ in range(20):
        start = lot.randrange(len(whole) - 5000)
        expected = bytes(whole.seq[start : start + 5000])
        stored = genome.read(whole.id, start, start + 5000)
        assert letters_of(stored) == expected.upper()
        assert np.array_equal(stored >= 128, np.frombuffer(expected, dtype=np.uint8) >= ord("a"))


def test_a_folder_or_a_glob_is_one_genome(tmp_path: Path) -> None:
    write_fasta(tmp_path / "chr2.fa", chr2=100)
    (tmp_path / "chr1.fasta.gz").write_bytes(gzip.compress(write_fasta(tmp_path / "x", chr1=50).read_bytes()))
    (tmp_path / "readme.md").write_text("not a sequence")
    folder, pattern, single = opened(tmp_path, tmp_path / "chr*", tmp_path / "chr2.fa")
    assert folder.names == pattern.names == ["chr1", "chr2"]
    assert single.names == ["chr2"]
    for missing in (tmp_path / "none.fa", tmp_path / "*.none"):
        with pytest.raises(FileNotFoundError, match=r"data\.paths: there is no file at"):
            find_genomes([str(missing)])


def test_names_are_unique_over_files(tmp_path: Path) -> None:
    write_fasta(tmp_path / "a.fa", one=50)
    write_fasta(tmp_path / "b.fa", one=50)
    with pytest.raises(ValueError, match=r"b\.fa: a record is called one as one of .*a\.fa is"):
        opened(tmp_path)


def test_a_genome_is_built_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "cache"))
    path = write_fasta(tmp_path / "a.fa", one=500)
    first = opened(path)[0]
    os.utime(path, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(genome_module, "read_sequences", None)
        assert opened(path)[0].digest == first.digest
    write_fasta(path, one=501)
    assert opened(path)[0].digest != first.digest
    assert len(list((cache_root() / "dna").iterdir())) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.fa").write_text(">a\nACGT\n>b\nMKL\n")
    with pytest.raises(ValueError, match="line 4"):
        opened(tmp_path / "a.fa")
    assert list((cache_root() / "dna").iterdir()) == []


def _build(path: str, cache: str) -> str:
    os.environ["MAMBAZOO_CACHE"] = cache
    return opened(Path(path))[0].digest


def test_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fa", one=200_000)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        digests = pool.starmap(_build, [(str(path), str(tmp_path / "cache"))] * 4)
    assert len(set(digests)) == 1
    assert [folder.name for folder in (tmp_path / "cache" / "dna").iterdir()] == [digests[0][:32]]


def test_a_genome_travels_as_its_path(tmp_path: Path) -> None:
    [genome] = opened(write_fasta(tmp_path / "a.fa", one=100_000))
    genome.read("one", 0, 10)
    assert len(pickle.dumps(genome)) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(genome)).read("one", 5, 9), genome.read("one", 5, 9))


def test_a_genome_is_never_held_whole(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(b">one\n" + b"ACGTACGTAC" * 3_200_000)
    tracemalloc.start()
    [genome] = opened(tmp_path / "a.fa")
    genome.read("one", 31_000_000, 31_100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(genome) == 32_000_000
    assert peak < 10_000_000


def test_progress_is_shown_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", screen := Terminal())
    monkeypatch.setattr(progress, "LARGE", 0)
    [genome] = opened(write_fasta(tmp_path / "a.fa", shown=5001))
    assert len(genome) == 5001
    assert "reading a.fa" in screen.getvalue()


BED = "#remark\ntrack name=x\nbrowser x\none\t0\t100\n\none\t50\t200\tname\t0\t-\r\ntwo 5 10\n"


def test_bed_is_read(tmp_path: Path) -> None:
    for name, content in (("a.bed", BED.encode()), ("b.bed.gz", gzip.compress(BED.encode()))):
        (tmp_path / name).write_bytes(content)
        lines = read_bed(tmp_path / name)
        assert [line.number for line in lines] == [4, 6, 7]
        assert [line.interval for line in lines] == [("one", 0, 100), ("one", 50, 200), ("two", 5, 10)]
        assert lines[1].fields == ["name", "0", "-"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("one 101 200\none 201 300\none 301 400\n", "line 2: .* most neighbours (2 of 2)"),
        # in any order, on both strands, of several records
        ("one 301 400\ntwo 5 9\none 101 200\none 201 300 a 0 +\none 201 300 b 0 -\n", "line 1: .* (2 of 2)"),
        ("one 101 200\none 201 300\none 900 950\none 951 960\n", "line 2: .* (2 of 3)"),
        ("one 101 200\none 201 300\none 900 950\n", ""),
        ("one 100 200\none 200 300\none 300 400\n", ""),
        # what starts at 0 is not counted from 1
        ("two 0 9\none 101 200\none 201 300\n", ""),
        ("two 0 9\none 1 200\none 201 300\n", ""),
        # one alone, and one of each record
        ("one 101 200\n", ""),
        ("one 101 200\ntwo 201 300\n", ""),
    ],
)
def test_bed_that_seems_to_count_from_one_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: str, message: str
) -> None:
    (tmp_path / "a.bed").write_text(rows)
    with caplog.at_level(logging.WARNING, logger="mambazoo"):
        read_bed(tmp_path / "a.bed")
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == bool(message)
    assert all(re.search(re.escape(message).replace(r"\.\*", ".*"), warning) for warning in found)


BAD_BED = [
    ("", "a.bed: there is no interval"),
    ("# nothing\n", "there is no interval"),
    ("one\t0\n", "line 1: is not a line of BED"),
    ("one\t0\t5\none\tx\t5\n", "line 2: is not a line of BED"),
    ("one\t-1\t5\n", "line 1: is not a line of BED"),
    ("one\t5\t5\n", "line 1: the start 5 is not below the end 5 .*counted from 1"),
    ("one\t9\t5\n", "line 1: the start 9 is not below the end 5$"),
    ("one\t1\t10\none\t11\t20\n", "line 2: .* are counted from 1"),
    ("one\t1\t10\none\t11\t20\none\t50\t60\none\t80\t90\n", "line 2: .* are counted from 1"),
    ("one\t0\t1002\n", "line 1: one has 1000 bases, and the interval ends at 1002$"),
    ("one\t0\t1001\n", "line 1: one has 1000 bases, and the interval ends at 1001 .*counted from 1"),
    ("one\t0\t9\nfour\t0\t9\n", "line 2: there is no record 'four' in a.fa"),
    ("one\t0\t9\rone\t9\t20\r", "line 1: is not text in UTF-8 with LF or CRLF"),
    ("one\t0\t9\none\t\0\t20\n", "line 2: is not text"),
]


@pytest.mark.parametrize(("content", "message"), BAD_BED)
def test_bed_that_is_wrong_is_said_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    genomes = opened(write_fasta(tmp_path / "a.fa", one=1000, two=50))
    (tmp_path / "a.bed").write_text(content, newline="")
    with pytest.raises(ValueError, match=message):
        locate(tmp_path / "a.bed", read_bed(tmp_path / "a.bed"), genomes)


def test_a_truncated_bed_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.bed.gz").write_bytes(gzip.compress(BED.encode() * 50)[:-9])
    with pytest.raises(ValueError, match=r"a\.bed\.gz, line [0-9]+: cannot be read"):
        read_bed(tmp_path / "a.bed.gz")


def test_damaged_bed_is_read_as_it_stands_or_refused(tmp_path: Path) -> None:
    genomes, lot, read = opened(write_fasta(tmp_path / "a.fa", one=1000, two=50)), random.Random(4), 0
    path = tmp_path / "a.bed"
    for _ in range(4000):
        content = bytearray(BED.encode())
        for _ in range(lot.randint(1, 3)):
            at = lot.randrange(len(content))
            content[at : at + lot.randrange(3)] = lot.choice(
                [b"\n", b"\t", b"0", b"9", b"-", b"o", b"\xff", b" ", b""]
            )
        path.write_bytes(content)
        try:
            lines = read_bed(path)
            owners = locate(path, lines, genomes)
        except ValueError as error:
            assert str(error).startswith(f"{path}")  # noqa: PT017
            continue
        read += 1
        text = content.decode().split("\n")
        for line, owner in zip(lines, owners, strict=True):
            record, start, end = line.interval
            assert 0 <= start < end <= genomes[owner].length(record)
            words = text[line.number - 1].rstrip("\r").split("\t" if "\t" in text[line.number - 1] else None)
            assert (words[0], int(words[1]), int(words[2])) == line.interval
    assert 400 < read < 3600


def bases(intervals: list[Interval]) -> set[tuple[str, int]]:
    return {(record, i) for record, start, end in intervals for i in range(start, end)}


def test_intervals_merge_and_subtract_as_sets_do() -> None:
    lot = random.Random(5)

    def some(count: int) -> list[Interval]:
        starts = [(lot.choice("ab"), lot.randrange(40)) for _ in range(count)]
        return [Interval(record, start, start + lot.randint(1, 9)) for record, start in starts]

    for _ in range(300):
        a, b = some(lot.randrange(6)), some(lot.randrange(6))
        assert bases(merge(a)) == bases(a)
        assert sum(end - start for _, start, end in merge(a)) == len(bases(a))
        left = subtract(a, b)
        assert bases(left) == bases(a) - bases(b)
        assert merge(left) == left


def test_no_base_is_in_two_splits(tmp_path: Path) -> None:
    genomes = opened(
        write_fasta(tmp_path / "a.fa", one=1000, two=500), write_fasta(tmp_path / "b.fa", one=300, z=9)
    )
    (tmp_path / "t.bed").write_text("two\t100\t200\ntwo\t450\t480\n")
    (tmp_path / "r.bed").write_text("two\t200\t500\n")
    whole = [bases([Interval(name, 0, genome.length(name)) for name in genome.names]) for genome in genomes]
    selections: list[tuple[object, object, object]] = [
        (None, 0.1, None), (None, 0.1, 0.2), (None, "one", None), (None, ["one", "z"], 0.2),
        (None, 0.1, str(tmp_path / "t.bed")), ("two", 0.3, None), (str(tmp_path / "r.bed"), ["one"], 0.2),
        ("two", ["one"], ["z"]),
    ]  # fmt: skip
    for train, valid, test in selections:
        splits = split_genomes(genomes, train, valid, test)  # type: ignore[arg-type]
        assert list(splits) == ["train", "val", "test"][: 2 + (test is not None)]
        for i, all_ in enumerate(whole):
            sets = [bases(parts[i]) for parts in splits.values()]
            assert sum(map(len, sets)) == len(set().union(*sets))
            assert set().union(*sets) <= all_
            if train is None:
                assert set().union(*sets) == all_


def test_a_fraction_is_the_end_of_each_record(tmp_path: Path) -> None:
    genomes = opened(write_fasta(tmp_path / "a.fa", one=1000, two=500))
    splits = split_genomes(genomes, None, 0.1, 0.2)
    assert splits["train"] == [[("one", 0, 700), ("two", 0, 350)]]
    assert splits["val"] == [[("one", 700, 800), ("two", 350, 400)]]
    assert splits["test"] == [[("one", 800, 1000), ("two", 400, 500)]]
    # a record is held out in every genome that has it
    both = opened(tmp_path / "a.fa", write_fasta(tmp_path / "b.fa", two=60, b=70))
    assert split_genomes(both, None, "two", None)["val"] == [[("two", 0, 500)], [("two", 0, 60)]]


def test_selections_that_cannot_be_are_said(tmp_path: Path) -> None:
    genomes = opened(
        write_fasta(tmp_path / "a.fa", chr1=100, chr2=50), write_fasta(tmp_path / "b.fa", chr2=50)
    )
    (tmp_path / "t.bed").write_text("chr1\t10\t20\n")
    (tmp_path / "two.bed").write_text("chr2\t10\t20\n")
    for train, valid, message in (
        (None, "chr3", r"data.valid: there is no record 'chr3'; is it chr"),
        ("chr1", str(tmp_path / "t.bed"), "data.valid: bases 10 to 20 of chr1 of a.fa are in data.train too"),
        (None, str(tmp_path / "two.bed"), "line 1: there is a record 'chr2' in each of a.fa, b.fa"),
    ):
        with pytest.raises(ValueError, match=message):
            split_genomes(genomes, train, valid, None)
    with pytest.raises(FileNotFoundError, match=r"data\.valid: there is no file none\.bed"):
        split_genomes(genomes, None, "none.bed", None)
