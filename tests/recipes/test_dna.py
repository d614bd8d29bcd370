"""Models of DNA in use: variants scored, sequences embedded, FASTA written, and what is wrong said."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from Bio import SeqIO
from Bio.Seq import Seq
from mambazoo.checkpoints.io import save_pretrained
from mambazoo.datamodules.alphabet import COMPLEMENT, EOS, MASK, SIZE, Nucleotides
from mambazoo.recipes import score as score_module
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.language import LanguageModel

from .command import Command, Result

HEAD = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
WINDOW, FLANK = 64, 31


def build(**backbone: Any) -> GenomeModel:
    model = GenomeModel({"d_model": 16, "n_layers": 2, **backbone}, SIZE, COMPLEMENT).eval()
    with torch.no_grad():
        # far from an even guess
        model.embedding.weight.mul_(30)
    return model


@pytest.fixture
def model(tmp_path: Path) -> GenomeModel:
    """A model of the next base that knows nothing, in the folder `model`."""
    model = build()
    save_pretrained(model, Nucleotides().to_dict(), tmp_path / "model")
    return model


@pytest.fixture
def records(genome: Path) -> dict[str, str]:
    """The sequences of genome.fa."""
    return {record.id: str(record.seq) for record in SeqIO.parse(genome, "fasta")}


class Allele(NamedTuple):
    """A row of VCF with one ALT, its position from 0."""

    chrom: str
    start: int
    ref: str
    alt: str


def some_alleles(records: dict[str, str], count: int) -> list[Allele]:
    """Substitutions, insertions and deletions at random places, which can stand nowhere else; the edges among them."""
    lot, found = random.Random(0), []
    while len(found) < count:
        chrom = lot.choice(list(records))
        sequence = records[chrom]
        start = lot.choice([lot.randrange(1, 990), lot.randrange(1, 20), lot.randrange(970, 990)])
        size, kind = lot.randint(1, 5), lot.randrange(3)
        base, inserted = sequence[start], "".join(lot.choices("ACGT", k=size))
        behind = sequence[start + 1 : start + 1 + size]
        if kind == 0 and inserted[0] != base:
            found.append(Allele(chrom, start, base, inserted[0]))
        elif kind == 1 and inserted[-1] != base and inserted[0] != behind[0]:
            found.append(Allele(chrom, start, base, base + inserted))
        elif kind == 2 and behind[-1] != base and behind[0] != sequence[start + 1 + size]:
            found.append(Allele(chrom, start, base + behind, base))
    return found


def write_vcf(path: Path, alleles: list[Allele]) -> None:
    rows = (f"{chrom}\t{start + 1}\t.\t{ref}\t{alt}\t.\t.\t.\n" for chrom, start, ref, alt in alleles)
    path.write_text(HEAD + "".join(rows))


def write_fasta(path: Path, records: dict[str, str]) -> None:
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in records.items()))


def read_scores(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    names, *rows = (line.split("\t") for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def numbers(path: Path, name: str = "score") -> list[float]:
    return [float(row[name]) for row in read_scores(path)]


def score(mambazoo: Command, vcf: str, output: str, *more: str, fasta: str = "genome.fa") -> Result:
    return mambazoo(
        "score", "model", "--fasta", fasta, "--vcf", vcf, "--output", output, "--window", str(WINDOW), *more
    )


@torch.no_grad()
def log_likelihood(model: GenomeModel, letters: str) -> float:
    tokens = torch.from_numpy(Nucleotides().encode(letters.encode())).long()
    seen = torch.cat([torch.tensor([EOS]), tokens])[:-1]
    return -float(F.cross_entropy(model(seen[None])[0][0].double(), tokens, reduction="sum"))


def other_strand(letters: str) -> str:
    return str(Seq(letters).reverse_complement())


@pytest.mark.parametrize("strand", ["forward", "both"])
def test_a_score_is_the_difference_of_two_windows(
    mambazoo: Command, model: GenomeModel, records: dict[str, str], strand: str
) -> None:
    alleles = some_alleles(records, 30)
    write_vcf(Path("a.vcf"), alleles)
    assert score(mambazoo, "a.vcf", "a.tsv", "--strand", strand, "--batch-size", "7").code == 0
    rows = read_scores(Path("a.tsv"))
    for (chrom, start, ref, alt), row in zip(alleles, rows, strict=True):
        assert (row["chrom"], row["pos"], row["ref"], row["alt"]) == (chrom, str(start + 1), ref, alt)
        whole, shared = records[chrom], len(ref) + len(alt) > 2
        before = whole[max(0, start + shared - FLANK) : start + shared]
        behind = whole[start + len(ref) : start + len(ref) + FLANK]
        for key, allele in (("ref_ll", ref), ("alt_ll", alt)):
            window = before + allele[shared:] + behind
            strands = [window, other_strand(window)] if strand == "both" else [window]
            expected = sum(log_likelihood(model, letters) for letters in strands) / len(strands)
            assert float(row[key]) == pytest.approx(expected, abs=1e-3)
        assert float(row["score"]) == pytest.approx(float(row["alt_ll"]) - float(row["ref_ll"]), abs=1e-5)


def test_the_other_way_round_a_score_is_its_negative(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    alleles = [allele for allele in some_alleles(records, 60) if 80 < allele.start < 900][:8]
    write_vcf(Path("a.vcf"), alleles)
    score(mambazoo, "a.vcf", "a.tsv")
    backwards = []
    for i, (chrom, start, ref, alt) in enumerate(alleles):
        changed = {chrom: records[chrom][:start] + alt + records[chrom][start + len(ref) :]}
        write_fasta(Path(f"{i}.fa"), changed)
        write_vcf(Path(f"{i}.vcf"), [Allele(chrom, start, alt, ref)])
        assert score(mambazoo, f"{i}.vcf", f"{i}.tsv", fasta=f"{i}.fa").code == 0
        backwards += numbers(Path(f"{i}.tsv"))
    assert backwards == pytest.approx([-value for value in numbers(Path("a.tsv"))], abs=1e-3)
    assert max(map(abs, backwards)) > 0.1


def test_scores_on_both_strands_are_the_same_from_either_side(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    alleles = some_alleles(records, 30)
    write_vcf(Path("a.vcf"), alleles)
    write_fasta(Path("b.fa"), {name: other_strand(letters) for name, letters in records.items()})
    turned = [
        Allele(chrom, 1000 - start - len(ref), other_strand(ref), other_strand(alt))
        for chrom, start, ref, alt in alleles
    ]
    write_vcf(Path("b.vcf"), turned)
    for strand in ("both", "forward"):
        score(mambazoo, "a.vcf", f"a-{strand}.tsv", "--strand", strand)
        score(mambazoo, "b.vcf", f"b-{strand}.tsv", "--strand", strand, fasta="b.fa")
    assert numbers(Path("a-both.tsv")) == pytest.approx(numbers(Path("b-both.tsv")), abs=1e-3)
    assert numbers(Path("a-forward.tsv")) != pytest.approx(numbers(Path("b-forward.tsv")), abs=0.1)


@pytest.mark.parametrize(
    "backbone", [{"bidirectional": "tied"}, {"reverse_complement": True}], ids=["bidirectional", "strands"]
)
@torch.no_grad()
def test_models_that_see_both_sides_score_the_hidden_base(
    mambazoo: Command, tmp_path: Path, records: dict[str, str], backbone: dict[str, Any]
) -> None:
    model = build(**backbone)
    save_pretrained(model, Nucleotides().to_dict(), tmp_path / "model")
    alleles = some_alleles(records, 30)
    write_vcf(Path("a.vcf"), alleles)
    assert "no_substitution" in score(mambazoo, "a.vcf", "a.tsv").out
    for (chrom, start, ref, alt), row in zip(alleles, read_scores(Path("a.tsv")), strict=True):
        if len(ref) + len(alt) > 2:
            assert (row["score"], row["status"]) == ("NA", "no_substitution")
            continue
        low = max(0, start - FLANK)
        tokens = torch.from_numpy(
            Nucleotides().encode(records[chrom][low : start + FLANK + 1].encode())
        ).long()
        tokens[start - low] = MASK
        logits = model.average_strands(tokens[None])[0, start - low]
        difference = float(logits["ACGT".index(alt)] - logits["ACGT".index(ref)])
        assert float(row["score"]) == pytest.approx(difference, abs=1e-3)
        assert float(row["alt_ll"]) < 0


def test_a_vcf_is_written_as_it_was_with_scores(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    a, b = records["chr0"][9], records["chr1"][99]
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    rows = [
        f"chr0\t10\trs1\t{a}\t{other[a]},<DEL>,{a}TT\t9\tPASS\tAC=1;DB\tGT\t0/1",
        f"chr0\t10\t.\t{a}\t.\t.\t.\t.\tGT\t0/0",
        f"chr1\t100\t.\t{other[b]}\t{b}\t.\t.\tDP=3\tGT\t1|0",
        f"chr1\t100\t.\t{b}\t{other[b].lower()}\t.\t.\t.\tGT\t1|0",
    ]
    head = HEAD.replace("INFO\n", "INFO\tFORMAT\tme\n")
    Path("a.vcf").write_text(head + "\n".join(rows) + "\n")
    result = score(mambazoo, "a.vcf", "a.tsv")
    assert "3 of 5 alleles scored (left out: 1 symbolic, 1 ref_mismatch): a.tsv" in result.out
    assert "a.vcf, line 3: <DEL> is left out: <DEL> is not written in bases" in result.err
    assert f"a.vcf, line 5: {b} is left out: REF is {other[b]}, the genome has {b}" in result.err
    table = read_scores(Path("a.tsv"))
    assert [row["status"] for row in table] == ["scored", "symbolic", "scored", "ref_mismatch", "scored"]
    values = [row["score"] for row in table]
    infos = [
        f"AC=1;DB;MAMBAZOO_DLL={values[0]},.,{values[2]};MAMBAZOO_STATUS=scored,symbolic,scored",
        ".",
        "DP=3;MAMBAZOO_STATUS=ref_mismatch",
        f"MAMBAZOO_DLL={values[4]}",
    ]
    for name, unpack in (
        ("b.vcf", Path.read_bytes),
        ("b.vcf.gz", lambda path: gzip.decompress(path.read_bytes())),
    ):
        assert score(mambazoo, "a.vcf", name).code == 0
        lines = unpack(Path(name)).decode().splitlines()
        assert lines[0] == "##fileformat=VCFv4.3"
        assert lines[1].startswith("##INFO=<ID=MAMBAZOO_DLL,Number=A,Type=Float,")
        assert lines[2].startswith("##INFO=<ID=MAMBAZOO_STATUS,Number=A,Type=String,")
        assert json.loads(lines[3].removeprefix(score_module.MARK))["window"] == WINDOW
        assert lines[4] + "\n" == head.splitlines(keepends=True)[1]
        for row, info, line in zip(rows, infos, lines[5:], strict=True):
            before, after = row.split("\t"), line.split("\t")
            assert after == [*before[:7], info, *before[8:]]
    result = score(mambazoo, "b.vcf", "c.vcf")
    assert result.code == 2
    assert "has MAMBAZOO_DLL in INFO already" in result.err
    lines = [line for line in Path("b.vcf").read_text().splitlines() if "ID=MAMBAZOO_DLL" not in line]
    Path("b.vcf").write_text("\n".join(lines))
    assert "has MAMBAZOO_STATUS in INFO already" in score(mambazoo, "b.vcf", "c.vcf").err


@pytest.mark.parametrize("name", ["a.tsv", "a.vcf.gz"])
def test_a_killed_score_goes_on_where_it_stopped(
    mambazoo: Command, model: GenomeModel, records: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        f"{chrom}\t{start + 1}\t.\t{ref}\t{alt},{alt}GTACGTC\t.\t.\t.\n"
        for chrom, start, ref, alt in some_alleles(records, 12)
    ]
    Path("a.vcf").write_text(HEAD + "".join(rows))
    read: list[int] = []
    forward = GenomeModel.mix
    monkeypatch.setattr(GenomeModel, "mix", lambda *a, **k: read.append(1) or forward(*a, **k))  # type: ignore[func-returns-value]
    assert score(mambazoo, "a.vcf", name, "--batch-size", "4").code == 0
    path, part = Path(name), Path(f"{name}.part")
    whole, full = path.read_bytes(), len(read)
    text = gzip.decompress(whole) if path.suffix == ".gz" else whole
    assert not part.exists()
    head = sum(len(line) for line in text.splitlines(keepends=True) if line.startswith((b"#", b"chrom")))
    for end in (10, head + 5, head + 300, len(text) - 1, len(text)):
        path.unlink()
        part.write_bytes(text[:end])
        read.clear()
        assert score(mambazoo, "a.vcf", name, "--batch-size", "4").code == 0
        assert not part.exists()
        lines = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert [line.split(b"\t")[:5] for line in lines.splitlines()] == [
            line.split(b"\t")[:5] for line in text.splitlines()
        ]
        assert (len(read) < full) == (end > head + 5)
        assert bool(read) == (end < len(text))
        if name == "a.tsv":
            expected = [float(line.split(b"\t")[5]) for line in text[head:].splitlines()]
            assert numbers(path) == pytest.approx(expected, abs=1e-4)


def test_what_is_there_is_not_made_again_nor_mixed(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    write_vcf(Path("a.vcf"), some_alleles(records, 4))
    score(mambazoo, "a.vcf", "a.tsv")
    whole = Path("a.tsv").read_bytes()
    result = score(mambazoo, "a.vcf", "a.tsv", "--batch-size", "1")
    assert (result.code, "is there and whole" in result.out) == (0, True)
    os.rename("a.tsv", "b.tsv.part")
    for name in ("a.tsv", "b.tsv"):
        if name == "a.tsv":
            Path(name).write_bytes(whole)
        result = score(mambazoo, "a.vcf", name, "--strand", "forward")
        assert result.code == 2
        assert "was made with strand 'both', not 'forward'" in result.err
    Path("c.tsv").write_text("my own notes\n")
    result = score(mambazoo, "a.vcf", "c.tsv")
    assert (result.code, Path("c.tsv").read_text()) == (2, "my own notes\n")
    assert "nothing that this command wrote" in result.err
    save_pretrained(build(), Nucleotides().to_dict(), Path("model"))
    assert "was made with weights " in score(mambazoo, "a.vcf", "a.tsv").err
    assert Path("a.tsv").read_bytes() == whole


def test_a_score_goes_on_however_its_files_are_called(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    write_vcf(Path("a.vcf"), some_alleles(records, 4))
    score(mambazoo, "a.vcf", "a.tsv")
    whole = Path("a.tsv").read_text()
    Path("b.tsv.part").write_text(whole[: whole.index("\n", 400) + 1])
    os.rename("a.vcf", "same.vcf")
    os.rename("genome.fa", "same.fa")
    for output, said in (("a.tsv", "is there and whole"), ("b.tsv", "going on behind line")):
        options = {"--fasta": "./same.fa", "--vcf": "./same.vcf", "--output": output, "--window": str(WINDOW)}
        result = mambazoo("score", "./model/", *(word for option in options.items() for word in option))
        assert (result.code, said in result.out + result.err) == (0, True), result.err
    for name, more, changed in (
        ("other.fa", Path("same.fa").read_text() + "A\n", "fasta"),
        ("other.vcf", Path("same.vcf").read_text() + "chr0\t1\t.\tA\tC\t.\t.\t.\n", "vcf"),
    ):
        Path(name).write_text(more)
        fasta, vcf = ("other.fa", "same.vcf") if changed == "fasta" else ("same.fa", "other.vcf")
        result = score(mambazoo, vcf, "a.tsv", fasta=fasta)
        assert (result.code, f"was made with {changed} " in result.err) == (2, True), result.err


def test_two_processes_do_not_write_one_file(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    write_vcf(Path("a.vcf"), some_alleles(records, 4))
    with Path("a.tsv.part").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = score(mambazoo, "a.vcf", "a.tsv")
    assert result.code == 2
    assert "a.tsv.part is being written by another process" in result.err
    assert score(mambazoo, "a.vcf", "a.tsv").code == 0


def test_what_cannot_be_scored_is_said(mambazoo: Command, model: GenomeModel, genome: Path) -> None:
    write_vcf(Path("other.vcf"), [Allele("1", 5, "A", "C")] * 9)
    write_vcf(Path("bad.vcf"), [Allele("chr0", 5, "A", "C"), Allele("chr0", 5, "A", "?")])
    Path("none.vcf").write_text("chr0\t5\t.\tA\tC\n")
    Path("protein.fa").write_text(">p\nMKLV\n")
    save_pretrained(LanguageModel({"d_model": 16, "n_layers": 1}, 257), {"kind": "bytes"}, Path("text"))
    classifier = SequenceClassifier({"d_model": 16, "n_layers": 1}, SIZE, 2)
    save_pretrained(classifier, Nucleotides().to_dict(), Path("classes"))
    save_pretrained(model, Nucleotides().to_dict() | {"objective": "masked"}, Path("masked"))
    options = {"checkpoint": "model", "--fasta": "genome.fa", "--vcf": "other.vcf", "--output": "a.tsv"}
    for changes, message in (
        ({}, "no allele that can be scored (left out: 9 no_record)"),
        ({"--vcf": "bad.vcf"}, "bad.vcf, line 4: ALT '?' is no allele"),
        ({"--vcf": "none.vcf"}, "none.vcf, line 1: is no VCF"),
        ({"--vcf": "nowhere.vcf"}, "--vcf: there is no file nowhere.vcf"),
        ({"--fasta": "nowhere.fa"}, "--fasta: there is no file at nowhere.fa"),
        ({"--fasta": "sample:nothing"}, "--fasta: there is no sample:nothing"),
        ({"--fasta": "protein.fa"}, "protein.fa, line 2: 'L' is no letter of DNA"),
        ({"--output": "a.bed"}, "--output: a.bed must end in .tsv or .tsv.gz or .vcf"),
        ({"--output": "nowhere/a.tsv"}, "--output: nowhere/a.tsv cannot be written"),
        ({"--window": "0"}, "--window must be 1 or more, not 0"),
        ({"--batch-size": "0"}, "--batch-size must be 1 or more, not 0"),
        ({"--device": "gpu"}, "--device: a model cannot be put on 'gpu'"),
        ({"checkpoint": "nowhere"}, "no checkpoint, model folder or run nowhere"),
        ({"checkpoint": "text"}, "text is a LanguageModel that does not read DNA"),
        ({"checkpoint": "classes"}, "classes is a SequenceClassifier, which gives no likelihoods"),
        ({"checkpoint": "masked"}, "masked has learnt to tell masked bases by those before them"),
    ):
        given = {**options, **changes}
        checkpoint = given.pop("checkpoint")
        result = mambazoo("score", checkpoint, *(word for option in given.items() for word in option))
        assert (result.code, message in result.err) == (2, True), result.err
        assert "Traceback" not in result.err
    assert result.err.count("\n") < 3
    assert not list(Path().glob("a.*"))


def embed(mambazoo: Command, *more: str, checkpoint: str = "model") -> tuple[Result, Any]:
    Path("a.npz").unlink(missing_ok=True)
    result = mambazoo("embed", checkpoint, "--fasta", "genome.fa", "--output", "a.npz", *more)
    return result, np.load("a.npz") if Path("a.npz").exists() else None


@torch.no_grad()
def vectors(model: GenomeModel, letters: str) -> np.ndarray:  # type: ignore[type-arg]
    """A causal model's vectors of every base."""
    tokens = [EOS, *Nucleotides().encode(letters.encode()).tolist()]
    return model.mix(torch.tensor([tokens]))[0][0, 1:].numpy()


@pytest.mark.parametrize("window", ["17", "65536"])
def test_embeddings_are_the_models_vectors(
    mambazoo: Command, model: GenomeModel, records: dict[str, str], window: str
) -> None:
    bed = "chr1\t5\t40\tsome\nchr2\t0\t3\nchr0\t100\t160\tback\t0\t-\nchr0\t999\t1000\n"
    Path("a.bed").write_text(bed)
    sequences = [
        records["chr1"][5:40], records["chr2"][:3], other_strand(records["chr0"][100:160]), records["chr0"][999],
    ]  # fmt: skip
    expected = [vectors(model, letters) for letters in sequences]
    for pool, pooled in (("mean", lambda y: y.mean(0)), ("last", lambda y: y[-1])):
        _, found = embed(mambazoo, "--bed", "a.bed", "--pool", pool, "--window", window)
        np.testing.assert_allclose(
            found["embeddings"], np.stack([pooled(y) for y in expected]), rtol=1e-3, atol=1e-4
        )
        assert found["name"].tolist() == ["some", "chr2:0-3", "back", "chr0:999-1000"]
        assert found["chrom"].tolist() == ["chr1", "chr2", "chr0", "chr0"]
        assert found["start"].tolist() == [5, 0, 100, 999]
        assert found["end"].tolist() == [40, 3, 160, 1000]
        assert found["strand"].tolist() == ["+", "+", "-", "+"]
    _, found = embed(mambazoo, "--bed", "a.bed", "--pool", "none", "--window", window)
    assert found["offsets"].tolist() == [0, 35, 38, 98, 99]
    np.testing.assert_allclose(found["embeddings"], np.concatenate(expected), rtol=1e-3, atol=1e-4)


def test_without_a_bed_file_every_record_is_embedded(
    mambazoo: Command, model: GenomeModel, records: dict[str, str]
) -> None:
    result, found = embed(mambazoo, "--window", "300")
    assert "3 sequences embedded: a.npz" in result.out
    assert found["name"].tolist() == list(records)
    expected = np.stack([vectors(model, letters).mean(0) for letters in records.values()])
    np.testing.assert_allclose(found["embeddings"], expected, rtol=1e-3, atol=1e-4)


def test_models_that_see_both_sides_embed_what_fits(mambazoo: Command, genome: Path, tmp_path: Path) -> None:
    model = build(reverse_complement=True, bidirectional="tied")
    save_pretrained(model, Nucleotides().to_dict(), tmp_path / "model")
    Path("a.bed").write_text("chr0\t0\t50\tone\t0\t+\nchr0\t0\t50\ttwo\t0\t-\n")
    _, found = embed(mambazoo, "--bed", "a.bed")
    assert found["embeddings"].shape == (2, 16)
    np.testing.assert_allclose(*found["embeddings"], rtol=1e-3, atol=1e-4)
    result, _ = embed(mambazoo, "--window", "999")
    assert result.code == 2
    assert "reads a sequence at once, and chr0 has 1000 bases" in result.err
    assert not Path("a.npz").exists()


def test_classifiers_embed_too(mambazoo: Command, genome: Path) -> None:
    model = SequenceClassifier({"d_model": 16, "n_layers": 1}, SIZE, 2).eval()
    save_pretrained(model, Nucleotides().to_dict(), Path("classes"))
    Path("a.bed").write_text("chr0\t0\t50\n")
    _, found = embed(mambazoo, "--bed", "a.bed", "--pool", "none", checkpoint="classes")
    letters = next(SeqIO.parse(genome, "fasta")).seq[:50]
    tokens = torch.from_numpy(Nucleotides().encode(bytes(letters))).long()
    with torch.no_grad():
        expected = model.backbone(model.embedding(tokens[None]))[0][0]
    np.testing.assert_allclose(found["embeddings"], expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", ["17", "65536"])
def test_a_table_holds_what_the_arrays_do(
    mambazoo: Command, model: GenomeModel, genome: Path, window: str
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    bed = "chr1\t5\t40\tsome\nchr2\t0\t3\nchr0\t100\t160\tback\t0\t-\nchr0\t999\t1000\n"
    Path("a.bed").write_text(bed)
    for pool in ("mean", "none"):
        more = ["--bed", "a.bed", "--pool", pool, "--window", window]
        _, arrays = embed(mambazoo, *more)
        assert embed(mambazoo, *more, "--output", "a.parquet")[0].code == 0
        table = parquet.read_table("a.parquet")
        for key in ("name", "chrom", "start", "end", "strand"):
            assert table[key].to_pylist() == arrays[key].tolist()
        found = table["embedding"].to_pylist()
        if pool == "none":
            assert [len(row) for row in found] == [35, 3, 60, 1]
            found = [vector for row in found for vector in row]
        assert np.array_equal(np.array(found, np.float32), arrays["embeddings"])


def test_a_table_without_pyarrow_is_refused(mambazoo: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambazoo.recipes.embed.find_spec", lambda _: None)
    result, _ = embed(mambazoo, "--output", "a.parquet")
    assert (result.code, "pip install 'mambazoo[parquet]'" in result.err) == (2, True)


def test_what_cannot_be_embedded_is_said(mambazoo: Command, model: GenomeModel, genome: Path) -> None:
    Path("far.bed").write_text("chr0\t0\t10\nchr0\t990\t1010\n")
    Path("strand.bed").write_text("chr0\t0\t10\ta\t0\t.\nchr0\t0\t10\tb\t0\t?\n")
    for more, message in (
        (["--bed", "far.bed"], "far.bed, line 2: chr0 has 1000 bases, and the interval ends at 1010"),
        (["--bed", "strand.bed"], "strand.bed, line 2: the strand '?' is none of + - ."),
        (["--bed", "nowhere.bed"], "--bed: there is no file nowhere.bed"),
        (["--output", "a.csv"], "--output: a.csv must end in .npz or .parquet"),
        (["--window", "0"], "--window must be 1 or more, not 0"),
    ):
        result, _ = embed(mambazoo, *more)
        assert (result.code, message in result.err) == (2, True), result.err
    assert not [path for path in Path().iterdir() if "npz" in path.name]


def test_dna_is_written_as_fasta(mambazoo: Command, model: GenomeModel) -> None:
    arguments = ["generate", "model", "--prompt", "acgtN", "--prompt", "TT", "--number", "2", "--seed", "3"]
    arguments += ["--max-new-tokens", "150", "--output"]
    for name in ("a.fasta", "b.fa"):
        result = mambazoo(*arguments, name)
        assert (result.code, result.out) == (0, f"{name}\n")
    assert Path("a.fasta").read_bytes() == Path("b.fa").read_bytes()
    found = list(SeqIO.parse("a.fasta", "fasta"))
    assert [record.id.partition("_seed")[2] for record in found] == ["3_1", "4_2", "3_3", "4_4"]
    assert len({record.id.partition("_seed")[0] for record in found}) == 1
    for record, prompt in zip(found, ("ACGTN", "ACGTN", "TT", "TT"), strict=True):
        assert record.seq.startswith(prompt)
        given, written = (int(word) for word in record.description.split() if word.isdigit())
        assert (given, written) == (len(prompt), len(record.seq) - len(prompt))
    assert max(map(len, Path("a.fasta").read_text().splitlines()[1:4])) == 70
    shown = mambazoo(*arguments[:-1]).out
    assert f"--- 3 of 4\n{found[2].seq}\n" in shown


def test_text_is_written_to_a_file_as_it_is_shown(mambazoo: Command, tmp_path: Path) -> None:
    save_pretrained(LanguageModel({"d_model": 16, "n_layers": 1}, 257), {"kind": "bytes"}, tmp_path / "text")
    for more in ([], ["--number", "2"]):
        arguments = ["generate", "text", "--prompt", "ab", "--max-new-tokens", "20", *more]
        shown = mambazoo(*arguments).out
        assert shown.startswith("--- 1 of 2\nab" if more else "ab")
        assert mambazoo(*arguments, "--output", "a.txt").code == 0
        assert Path("a.txt").read_text() == shown


def test_what_cannot_be_generated_is_said(mambazoo: Command, model: GenomeModel) -> None:
    save_pretrained(build(bidirectional="tied"), Nucleotides().to_dict(), Path("both"))
    save_pretrained(model, Nucleotides().to_dict() | {"objective": "masked"}, Path("masked"))
    for checkpoint, more, message in (
        ("model", ["--prompt", "ACX"], "'X' is no base"),
        ("model", ["--prompt", ">one\nACGT"], "--prompt: give the letters of a sequence alone"),
        ("model", ["--seconds", "1"], "which writes letters; it takes --max-new-tokens"),
        ("model", ["--output", "a.txt"], "--output: a.txt must end in .fa or .fasta or .fna"),
        ("model", ["--device", "gpu"], "--device: a model cannot be put on 'gpu'"),
        ("both", ["--output", "a.fa"], "has no state"),
        ("masked", [], "train it with data.objective=next"),
    ):
        result = mambazoo("generate", checkpoint, *more)
        assert (result.code, message in result.err) == (2, True), result.err
    assert not list(Path().glob("a.*"))
