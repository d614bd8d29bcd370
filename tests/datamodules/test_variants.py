"""Variants from VCF files: what they change, the windows round them, and what is wrong said with file and line."""

import gzip
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from Bio.Seq import Seq
from mambazoo.datamodules.alphabet import LETTERS, MASK
from mambazoo.datamodules.bgzip import bgzip, is_packed
from mambazoo.datamodules.genome import Genome, find_genomes
from mambazoo.datamodules.variants import Change, Pieces, Skip, VariantFile, Windows, changes_of

HEAD = "##fileformat=VCFv4.3\n##contig=<ID=one>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
ONE, TWO = "ACGTNACGGTTACAGTRCATTCAG", "TTGACCA"


def mutate(content: bytes, lot: random.Random) -> bytes:
    """Damage a file in a place or two."""
    out = bytearray(content)
    for _ in range(lot.choice([1, 1, 2])):
        at, kind = lot.randrange(len(out) + 1), lot.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = lot.randrange(256)
        elif kind == 1:
            del out[at : at + lot.randint(1, 8)]
        elif kind == 2:
            out[at:at] = lot.choice(
                [b"#", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\xc3", b"9", b",", b"<", b"N"]
            )
        elif kind == 3:
            end = min(len(out), at + lot.randint(1, 40))
            out[at:at] = out[at:end]
        elif at < len(out):
            out[at] = lot.choice(b"ACGTacgtN.*,<>[]0123\r\n\t ")
    return bytes(out)


def write_vcf(path: Path, *rows: str, head: str = HEAD) -> Path:
    """A file of rows whose columns are parted by blanks, the last three of them left out."""
    lines = ["\t".join([*row.split(), ".", ".", "."]) for row in rows]
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def opened(tmp_path: Path) -> Genome:
    (tmp_path / "a.fa").write_text(f">one\n{ONE}\n>two\n{TWO.lower()}\n")
    [files] = find_genomes([str(tmp_path / "a.fa")])
    files.build()
    return files.open()


def packed(content: bytes) -> bytes:
    return b"".join(bgzip([content]))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, packed], ids=["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_vcf_is_read(tmp_path: Path, pack: Callable[[bytes], bytes], end: str) -> None:
    samples = HEAD.replace("INFO\n", "INFO\tFORMAT\tme\n")
    rows = [
        "one\t3\trs1\tG\ta,<DEL>,GT\t9\tPASS\tAC=1\tGT\t0/1",
        "two\t1\t.\tttg\t.\t.\t.\t.\tGT\t0",
        "two\t0\t.\tN\t*,N[one:4[,.A\t.\t.\t.\tGT\t0",
    ]
    (tmp_path / "a.vcf").write_bytes(pack((samples + "\n\n".join(rows) + "\n").replace("\n", end).encode()))
    file = VariantFile(tmp_path / "a.vcf")
    assert file.header == samples.splitlines()
    for _ in range(2):
        found = list(file)
        assert [variant.text for variant in found] == rows
        assert [tuple(variant[:6]) for variant in found] == [
            (4, "one", 2, "rs1", "G", ("a", "<DEL>", "GT")),
            (6, "two", 0, ".", "ttg", ()),
            (8, "two", -1, ".", "N", ("*", "N[one:4[", ".A")),
        ]


ROW = "one\t3\t.\tG\tA\t.\t.\t."
BAD = [
    ("", "a.vcf: there is no header"),
    ("\n", "there is no header"),
    (ROW, "line 1: is no VCF, which starts with"),
    (">one\nACGT\n", "line 1: is no VCF"),
    (HEAD.splitlines()[0], "there is no header"),
    (f"##fileformat=VCFv4.2\n{ROW}\n", "line 2: there is no header line"),
    ("##fileformat=VCFv4.2\n#CHROM POS ID REF ALT QUAL FILTER INFO\n", "line 2: .*parted by tabs"),
    (HEAD + ROW.replace("\t", " "), "line 4: has 1 columns, .* the header 8"),
    (HEAD + ROW + "\tGT", "line 4: has 9 columns"),
    (HEAD + f"{ROW}\n\n{ROW[:-2]}", "line 6: has 7 columns"),
    (HEAD + ROW.replace("3", "x"), "line 4: the position 'x' is no whole number"),
    (HEAD + ROW.replace("3", "-3"), "line 4: the position '-3'"),
    (HEAD + ROW.replace("3", "3.0"), "line 4: the position '3.0'"),
    (HEAD + ROW.replace("3", "٣"), "line 4: the position"),
    (HEAD + ROW.replace("G", "."), "line 4: REF '.' is not written in bases"),
    (HEAD + ROW.replace("G", "GX"), "line 4: REF 'GX'"),
    (HEAD + ROW.replace("G", ""), "line 4: REF '' is not written in bases"),
    (HEAD + ROW[:-1], "line 4: a column is empty"),
    (HEAD + ROW.replace("one", ""), "line 4: a column is empty"),
    (HEAD + ROW.replace("A", "A,"), "line 4: ALT '' is no allele"),
    (HEAD + ROW.replace("A", "A,U"), "line 4: ALT 'U' is no allele"),
    (HEAD + ROW.replace("A", "<DEL"), "line 4: ALT '<DEL' is no allele"),
    (HEAD + ROW + "\r" + ROW, "line 4: is not text in UTF-8 with LF or CRLF"),
    (HEAD + ROW + "\0", "line 4: is not text"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_vcf_that_is_wrong_is_said_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.vcf").write_text(content, newline="")
    with pytest.raises(ValueError, match=message):
        list(VariantFile(tmp_path / "a.vcf"))


@pytest.mark.parametrize("pack", [gzip.compress, packed], ids=["gzip", "bgzip"])
def test_a_truncated_vcf_is_said(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    rows = [f"one\t{i}\t.\tG\tA\t.\t.\t{random.Random(i).random()}\n" for i in range(9000)]
    whole = pack((HEAD + "".join(rows)).encode())
    for cut in (9, 28, len(whole) // 2):
        (tmp_path / "a.vcf.gz").write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"a\.vcf\.gz.*: (cannot be read|the file is cut off)"):
            list(VariantFile(tmp_path / "a.vcf.gz"))


def test_bgzip_is_gzip_that_is_found_whole(tmp_path: Path) -> None:
    lot = random.Random(0)
    for sizes in ((), (0,), (1,), (65280,), (65281, 3), (200_000, 0, 70_000)):
        pieces = [lot.randbytes(size) for size in sizes]
        (tmp_path / "a.gz").write_bytes(b"".join(bgzip(pieces)))
        assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"".join(pieces)
        with (tmp_path / "a.gz").open("rb") as file:
            assert is_packed(tmp_path / "a.gz", file)
            assert file.tell() == 0


def applied(genome: Genome, change: Change) -> str:
    """The record of a change, with it."""
    letters = np.frombuffer(LETTERS.encode(), dtype=np.uint8)
    row = genome.sequence.array
    parts = (
        row[change.low : change.start],
        np.frombuffer(change.alt, np.uint8),
        row[change.end : change.high],
    )
    return letters[np.concatenate(parts) & 0x7F].tobytes().decode()


def test_a_change_is_what_the_alleles_say_however_they_are_written(tmp_path: Path, opened: Genome) -> None:
    lot, rows, expected = random.Random(3), [], []
    for _ in range(400):
        name, whole = lot.choice([("one", ONE), ("two", TWO)])
        start = lot.randrange(len(whole))
        ref = whole[start : start + lot.randint(1, 5)]
        alt = "".join(lot.choices("ACGT", k=lot.randint(1, 5)))
        rows.append(f"{name} {start + 1} . {lot.choice([ref, ref.lower()])} {alt}")
        expected.append((ref, alt, whole[:start] + alt + whole[start + len(ref) :]))
    found = [changes_of(v, opened, 9)[0] for v in VariantFile(write_vcf(tmp_path / "a.vcf", *rows))]
    for (ref, alt, after), change in zip(expected, found, strict=True):
        if ref == alt:
            assert change == ("no_change", "REF and ALT are the same")
        elif isinstance(change, Skip):
            assert change.status == "ambiguous"
            assert set(ref) & set("NR")
        else:
            assert applied(opened, change) == after
            before = bytes(opened.sequence.array[change.start : change.end] & 0x7F)
            for end in (0, -1):
                assert not before or not change.alt or before[end] != change.alt[end]
    assert sum(isinstance(change, Change) for change in found) > 300


def test_what_cannot_be_scored_says_why(tmp_path: Path, opened: Genome) -> None:
    rows = {
        "one 4 . A C": ("ref_mismatch", "REF is A, the genome has T"),
        "one 1 . A <DEL>": ("symbolic", "<DEL> is not written in bases"),
        "one 1 . A *": ("symbolic", "* is not written in bases"),
        "one 5 . N A": ("ambiguous", "N or A has a letter for several bases"),
        "one 1 . A AN": ("ambiguous", "A or AN has"),
        "one 24 . GT G": ("out_of_range", "REF is not within one, which has 24 bases"),
        "two 0 . T G": ("out_of_range", "REF is not within two, which has 7 bases"),
        "three 1 . A C": ("no_record", "a.fa has no record three; it has one, two"),
        f"one 1 . A A{'C' * 10}": ("too_long", "10 bases are more than the window's 9"),
        "one 1 . A a": ("no_change", "REF and ALT are the same"),
    }
    found = [changes_of(v, opened, 9) for v in VariantFile(write_vcf(tmp_path / "a.vcf", *rows))]
    for (status, reason), [skip] in zip(rows.values(), found, strict=True):
        assert isinstance(skip, Skip)
        assert (skip.status, reason in skip.reason) == (status, True)


def sequences(pieces: Pieces) -> list[str]:
    letters = LETTERS + "." * 3
    text = "".join(letters[token] for token in pieces.tokens)
    ends = np.cumsum(pieces.lengths).tolist()
    return [text[end - size : end] for end, size in zip(ends, pieces.lengths.tolist(), strict=True)]


def other_strand(letters: str) -> str:
    return str(Seq(letters).reverse_complement())


def test_windows_hold_either_allele_between_the_same_flanks(tmp_path: Path, opened: Genome) -> None:
    rows = [
        "one 8 . G A,C,GT", "one 8 . G T", "one 1 . A C", "one 1 . A TA", "one 24 . G GC", "one 24 . G C",
        "two 1 . TT T", "two 1 . T GT", "two 5 . CCA C", "two 3 . GAC CTT", "one 9 . GTTAC GAC",
    ]  # fmt: skip
    variants = list(VariantFile(write_vcf(tmp_path / "a.vcf", *rows)))
    changes = [change for variant in variants for change in changes_of(variant, opened, 9)]
    whole = ONE + TWO
    for flank in (0, 2, 7, 30):
        windows = Windows(opened, changes, flank)
        prefixes, suffixes = map(sequences, windows.parted())
        backs, fronts = map(sequences, windows.parted(reverse=True))
        # three alleles and the reference of one place are read with one prefix
        assert len(prefixes) == len({(c.start, c.end, c.low) for c in changes}) == 11
        assert len(windows.place) == len(suffixes) == 4 + 2 * 10
        for change, alleles in zip(changes, windows.alleles, strict=True):
            before = whole[max(change.low, change.start - flank) : change.start]
            behind = whole[change.end : min(change.high, change.end + flank)]
            both = (whole[change.start : change.end], "".join(LETTERS[token] for token in change.alt))
            for number, allele in zip(alleles, both, strict=True):
                place = windows.place[number]
                assert (prefixes[place], suffixes[number]) == (before, allele + behind)
                assert (backs[place], fronts[number]) == (other_strand(behind), other_strand(before + allele))


def test_masked_windows_hide_the_changed_base_on_both_strands(tmp_path: Path, opened: Genome) -> None:
    rows = ["one 8 . G A", "one 1 . A C", "two 7 . A T", "one 8 . G C"]
    changes = [changes_of(v, opened, 9)[0] for v in VariantFile(write_vcf(tmp_path / "a.vcf", *rows))]
    windows = Windows(opened, [change for change in changes if isinstance(change, Change)], 3)
    for reverse in (False, True):
        pieces, at = windows.masked(reverse=reverse)
        assert pieces.tokens[at].tolist() == [MASK] * 3
        assert (pieces.tokens == MASK).sum() == 3
        expected = ["NAC.GTT", ".CGT", "ACC."]
        turned = [other_strand(letters.replace(".", "-")).replace("-", ".") for letters in expected]
        assert sequences(pieces) == (turned if reverse else expected)


FUZZ = HEAD.replace("INFO\n", "INFO\tFORMAT\tme\n") + (
    "one\t3\trs1\tG\tA,<DEL>,GT\t9\tPASS\tAC=1\tGT\t0/1\none\t6\t.\tACG\tA\t.\t.\t.\tGT\t1\r\n"
    "\ntwo\t2\t.\tT\t*,TCC\t.\tq10\tDP=3;AF=0.5\tGT\t0|1\ntwo\t7\t.\tA\tA[one:3[\t.\t.\tEND=3\tGT\t.\n"
)


def expected_variants(content: bytes) -> list[list[str]]:
    """The columns of every line behind the header."""
    lines = [line.rstrip("\r") for line in content.decode().removeprefix("\ufeff").split("\n")]
    lines = [line for line in lines if line.strip()]
    header = next(i for i, line in enumerate(lines) if not line.startswith("##"))
    return [line.split("\t") for line in lines[header + 1 :]]


def test_damaged_vcf_is_read_as_it_stands_or_refused(tmp_path: Path, opened: Genome) -> None:
    lot, path, read, changed = random.Random(1), tmp_path / "a.vcf", 0, 0
    records = {"one": ONE, "two": TWO}
    for _ in range(2000):
        content = mutate(FUZZ.encode(), lot)
        path.write_bytes(content)
        try:
            found = list(VariantFile(path))
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}(, line \d+)?: [^\n]+$", str(error))  # noqa: PT017
            continue
        read += 1
        for variant, columns in zip(found, expected_variants(content), strict=True):
            name, position, id, ref, alts = columns[:5]
            start = int(position) - 1
            assert variant[1:5] == (name, start, id, ref)
            assert list(variant.alts) == ([] if alts == "." else alts.split(","))
            assert variant.text == "\t".join(columns)
            for alt, change in zip(variant.alts, changes_of(variant, opened, 9), strict=True):
                if isinstance(change, Change):
                    whole = records[name]
                    after = whole[:start] + alt + whole[start + len(ref) :]
                    assert applied(opened, change) == after.upper()
                    changed += 1
    assert 400 < read < 1600
    assert changed > 1000
