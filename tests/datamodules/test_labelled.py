"""Labelled sequences from tables and BED files: what is read, how it is split and cut, what is refused."""

import gzip
import itertools
import logging
import random
from pathlib import Path

import pytest
import torch
from Bio.Seq import Seq
from mambazoo.datamodules.alphabet import PAD
from mambazoo.datamodules.labelled import LabelledSequenceDataModule, read_table

LETTERS = "ACGTNRYSWKMBDHV"


def draw(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=length))


def rows(count: int) -> list[tuple[str, str, str]]:
    """Label, chromosome and sequence; one more than half are of the class b."""
    return [(("a", "b", "b")[i % 3], f"chr{i % 4}", draw(20 + i, i)) for i in range(count)]


def write_table(path: Path, count: int = 60, between: str = "\t") -> Path:
    lines = [between.join(("label", "chrom", "sequence")), *(between.join(row) for row in rows(count))]
    path.write_text("\n".join(lines) + "\n")
    return path


def module(paths: Path, **options: object) -> LabelledSequenceDataModule:
    data = LabelledSequenceDataModule(str(paths), **{"batch_size": 8, **options})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def read(data: LabelledSequenceDataModule, split: str, pass_: int = 0) -> list[tuple[str, str]]:
    """The class and the letters of every sequence of a split."""
    samples = [data.samples[split].read(i, pass_) for i in range(len(data.samples[split]))]
    return [
        (data.classes[sample["label"]], "".join(LETTERS[token & 127] for token in sample["sequence"]))
        for sample in samples
    ]


def test_tables_of_every_kind_are_read(tmp_path: Path) -> None:
    expected = [(label, sequence) for label, _, sequence in rows(60)]
    tsv = write_table(tmp_path / "a.tsv")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(tsv.read_bytes().replace(b"\n", b"\r\n")))
    csv = write_table(tmp_path / "c.csv", between=",")
    csv.write_text(csv.read_text().replace("chr0", '"chr""0"'))
    for path in (tsv, tmp_path / "b.tsv.gz", csv):
        data = module(path)
        assert sorted(read(data, "train") + read(data, "val")) == sorted(expected)
        lines = [int(name.removeprefix(f"{path}:")) for name in data.names()]
        assert [expected[line - 2] for line in lines] == read(data, "val")
    assert read_table(csv).records[0] == 'chr"0'


def test_folders_of_classes_are_read(tmp_path: Path) -> None:
    for i, (label, _, sequence) in enumerate(rows(60)):
        file = tmp_path / ("valid" if i % 5 == 0 else "train") / label / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(sequence.lower() + "\n")
    data = module(tmp_path / "train", valid=str(tmp_path / "valid"))
    expected = [(label, sequence) for label, _, sequence in rows(60)]
    assert sorted(read(data, "train")) == sorted(row for i, row in enumerate(expected) if i % 5)
    assert sorted(read(data, "val")) == sorted(expected[::5])
    files = [Path(name) for name in data.names()]
    assert [(file.parent.name, expected[int(file.stem)][1]) for file in files] == read(data, "val")
    (tmp_path / "train" / "a" / "bad.txt").write_text("ACGX")
    with pytest.raises(ValueError, match=r"bad\.txt: 'X' is no letter of DNA"):
        module(tmp_path / "train")
    with pytest.raises(
        ValueError, match=r"is not a kind of file that is read: .*or a folder of CLASS/NAME\.txt"
    ):
        module(tmp_path)


def test_batches_are_padded(tmp_path: Path) -> None:
    data = module(write_table(tmp_path / "a.tsv"))
    for given in itertools.islice(data.train_dataloader(), 10):
        batch = data.on_after_batch_transfer(given, 0)
        assert batch["inputs"].shape == (8, int(batch["lengths"].max()))
        assert batch["inputs"].dtype == batch["labels"].dtype == torch.int64
        assert torch.equal((batch["inputs"] != PAD).sum(1), batch["lengths"])
        assert all(
            (row[length:] == PAD).all() for row, length in zip(batch["inputs"], batch["lengths"], strict=True)
        )


def test_rows_may_be_filled_to_one_length(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv")
    data = LabelledSequenceDataModule(str(path), length=50, fill=True, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    for batch in itertools.islice(data.train_dataloader(), 5):
        assert batch["inputs"].shape == (8, 50)
        assert torch.equal((batch["inputs"] != PAD).sum(1), batch["lengths"])


def test_classes_counts_and_the_majority_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path / "a.tsv")
    data = LabelledSequenceDataModule(str(path), valid="chr0")
    assert (data.classes, data.num_classes) == (["a", "b"], 2)
    with caplog.at_level(logging.INFO, logger="mambazoo"):
        data.prepare_data()
        data.setup("fit")
    assert data.counts == {"train": [15, 30], "val": [5, 10]}
    assert data.majority == {"train": pytest.approx(2 / 3), "val": pytest.approx(2 / 3)}
    assert "train: 45 sequences (a 15, b 30; majority 0.6667)" in caplog.text
    # numbers are in their order, not in that of their digits
    path.write_text("sequence,label\n" + "".join(f"ACG{'T' * n},{n}\n" for n in (10, 9, 2, 0)))
    assert LabelledSequenceDataModule(str(path)).classes == ["0", "2", "9", "10"]


def test_chromosomes_and_files_are_held_out(tmp_path: Path) -> None:
    path, other = write_table(tmp_path / "a.tsv"), write_table(tmp_path / "b.csv", 9, ",")
    data = module(path, valid=["chr1", "chr3"], test=str(other))
    kept = [(label, sequence) for label, chrom, sequence in rows(60) if chrom in ("chr0", "chr2")]
    assert sorted(read(data, "train")) == sorted(kept)
    assert len(read(data, "val")) == 30
    assert read(data, "test") == [(label, sequence) for label, _, sequence in rows(9)]


def test_a_fraction_keeps_equal_sequences_together(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pairs = [(sequence, str(Seq(sequence).reverse_complement())) for _, _, sequence in rows(200)]
    path.write_text("sequence,label\n" + "".join(f"{one},x\n{two.lower()},y\n" for one, two in pairs))
    data = module(path, valid=0.2, test=0.2)
    sets = [{sequence for _, sequence in read(data, split)} for split in ("train", "val", "test")]
    assert sum(map(len, sets)) == 400
    assert all(50 < len(part) < 110 for part in sets[1:])
    for one, two in pairs:
        assert any(one in part and two in part for part in sets)


def test_what_is_held_out_and_trained_on_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_table(tmp_path / "a.tsv")
    (tmp_path / "b.csv").write_text(
        "sequence,label\n" + f"{Seq(draw(23, 3)).reverse_complement()},a\n{draw(9, 999)},b\n"
    )
    with caplog.at_level(logging.WARNING, logger="mambazoo"):
        module(path, valid=str(tmp_path / "b.csv"))
    assert "1 sequences of valid are trained on too" in caplog.text


def test_the_middle_of_long_sequences_is_read(tmp_path: Path) -> None:
    data = module(write_table(tmp_path / "a.tsv"), valid="chr0", length=30)
    [(_, sequence)] = [row for row in zip(range(99), read(data, "val"), strict=False) if row[0] == 14]
    whole = draw(20 + 56, 56)
    assert sequence[1] == whole[23:53]


def test_the_other_strand_is_seen_in_training_alone(tmp_path: Path) -> None:
    data = module(write_table(tmp_path / "a.tsv"), valid="chr0", reverse_complement=True)
    whole = {sequence for _, _, sequence in rows(60)}
    seen = [sequence in whole for pass_ in range(10) for _, sequence in read(data, "train", pass_)]
    assert 160 < sum(seen) < 290
    assert all(
        sequence in whole or str(Seq(sequence).reverse_complement()) in whole
        for _, sequence in read(data, "train")
    )
    assert all(sequence in whole for _, sequence in read(data, "val"))


def test_bed_lines_are_labelled(tmp_path: Path) -> None:
    genome = {"one": draw(500, 1), "two": draw(300, 2)}
    fasta = tmp_path / "g.fa"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in genome.items()))
    places = [("one", 10 * i, 10 * i + 40, "xy"[i % 2], "+-"[i % 3 == 0]) for i in range(40)]
    places += [("two", 5, 45, "x", "+"), ("two", 100, 130, "y", "-")]
    bed = tmp_path / "a.bed"
    bed.write_text("".join(f"{r}\t{a}\t{b}\t{label}\t0\t{strand}\n" for r, a, b, label, strand in places))
    data = module(bed, genome=str(fasta), valid="two")
    expected = [
        (label, genome[r][a:b] if strand == "+" else str(Seq(genome[r][a:b]).reverse_complement()))
        for r, a, b, label, strand in places
    ]
    assert read(data, "train") == expected[:40]
    assert read(data, "val") == expected[40:]
    assert data.names() == ["two:5-45", "two:100-130(-)"]
    with pytest.raises(ValueError, match=r"data\.genome: must be given"):
        LabelledSequenceDataModule(str(bed))
    for missing in ("nope.fa", "sample:nope"):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^data\.genome: there is no .*{missing}"):
            module(bed, genome=missing)
    bed.write_text("one\t0\t9\tx\t0\t.\none\t5\t20\ty\none\t7\t9\ty\t0\t?\n")
    with pytest.raises(ValueError, match=r"a\.bed, line 3: the strand '\?' is none of \+ - \."):
        module(bed, genome=str(fasta))


BAD = [
    ("a.csv", "", "there is no column 'sequence'"),
    ("a.csv", "sequence,label\n", "a.csv: there is no row"),
    ("a.csv", "seq,label\nACGT,x\n", "line 1: there is no column 'sequence' among seq, label"),
    ("a.csv", "sequence,class\nACGT,x\n", "line 1: there is no column 'label'"),
    ("a.csv", "sequence,label\nACGT,x\n\nAC,y,z\n", "line 4: has 3 columns, and the header 2"),
    ("a.csv", "sequence,label\nACGT,\n", "line 2: the label is empty"),
    ("a.csv", "sequence,label\n,x\n", "line 2: the sequence is empty"),
    ("a.csv", "sequence,label\nACGT,x\nMKLV,y\n", "line 3: 'L' is no letter of DNA"),
    ("a.csv", "sequence,label\nAC→T,x\n", "line 2: '→' is no letter of DNA"),
    ("a.csv", 'sequence,label\n"ACGT,x\n', "line 2: is no line of CSV"),
    ("a.csv", "sequence,label\nACGT,x\nAC,x\n", "all sequences have the label 'x'"),
    ("a.bed", "one\t0\t9\n", "line 1: the fourth column, the label, is missing"),
    ("a.xls", "?", "not a kind of file that is read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        module(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": "chr9"}, "data.valid: no sequence is from chr9; there are chr0, chr1"),
        ({"valid": 1.0}, "data.valid: a fraction"),
        ({"valid": 1e-9}, "data.valid: there is not a sequence in it"),
        ({"valid": ["chr0", "chr1", "chr2", "chr3"]}, "data.paths: there is not a sequence in it"),
        ({"length": 0}, "data.length"),
        ({"valid": "none.csv"}, "data.valid: there is no file or folder none.csv"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(write_table(tmp_path / "a.tsv"), **options)


def test_damaged_tables_are_read_as_they_stand_or_refused(tmp_path: Path) -> None:
    lot, path, done = random.Random(6), tmp_path / "a.csv", 0
    whole = write_table(path, 5, ",").read_bytes()
    for _ in range(1200):
        content = bytearray(whole)
        at = lot.randrange(len(content))
        content[at : at + lot.randrange(3)] = lot.choice([b"\n", b",", b'"', b"A", b"x", b"\xff", b"\r", b""])
        path.write_bytes(content)
        try:
            table = read_table(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            continue
        done += 1
        assert len(table.labels) == len(table.records) == len(table.starts) - 1
        assert set("".join(LETTERS[token & 127] for token in table.sequence)) <= set("ACGT")
    assert 200 < done < 1100


def test_published_tables_are_read(data: Path) -> None:
    path = data / "dna" / "genomic_benchmarks" / "human_ensembl_regulatory" / "train.tsv.gz"
    served = module(path, valid="chr22", length=512)
    assert served.classes == ["enhancer", "ocr", "promoter"]
    total = [sum(counts) for counts in zip(*served.counts.values(), strict=True)]
    assert max(total) / sum(total) == pytest.approx(0.389, abs=0.03)
