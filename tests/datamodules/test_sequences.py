"""Sequences from files: what is read is what Biopython reads, and what is damaged is said with file and line."""

import gzip
import io
import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqFeature import SeqFeature, SimpleLocation
from Bio.SeqIO.FastaIO import SimpleFastaParser
from Bio.SeqRecord import SeqRecord
from mambazoo.datamodules import sequences
from mambazoo.datamodules.alphabet import (
    COMPLEMENT,
    LETTERS,
    SIZE,
    SOFT,
    Nucleotides,
    letters_of,
    reverse_complement,
    stored,
    targets_of,
    tokens_of,
)
from mambazoo.datamodules.sequences import read_sequences
from mambazoo.datamodules.vocab import vocabulary_from_dict

FASTA = b">one first record\nACGTNNacgtn\nRYSWkmbdhv\n\n>two\nACGU\r\nTT TT\r\n>three/3|x\tmore\nA"


def records(path: Path) -> dict[str, bytes]:
    """The letters of every record."""
    found: dict[str, bytes] = {}
    for name, piece in read_sequences(path):
        if name is not None:
            last = name
            found[last] = b""
        found[last] += piece
    return {name: letters_of(np.frombuffer(piece, dtype=np.uint8)) for name, piece in found.items()}


def bgzip(content: bytes, block: int = 100) -> bytes:
    """The blocks that bgzip writes: each a gzip member that knows its size, and an empty one at the end."""
    out = b""
    for chunk in (*(content[i : i + block] for i in range(0, len(content), block)), b""):
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = deflate.compress(chunk) + deflate.flush()
        size = len(body) + 25
        head = bytes.fromhex("1f8b08040000000000ff0600424302") + b"\0" + size.to_bytes(2, "little")
        out += head + body + zlib.crc32(chunk).to_bytes(4, "little") + len(chunk).to_bytes(4, "little")
    return out


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
def test_fasta_of_every_kind_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, pack: object
) -> None:
    monkeypatch.setattr(sequences, "BLOCK", block)
    path = tmp_path / "a.fa"
    path.write_bytes(pack(FASTA))  # type: ignore[operator]
    assert records(path) == {"one": b"ACGTNNACGTNRYSWKMBDHV", "two": b"ACGTTTTT", "three/3|x": b"A"}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
def test_a_byte_order_mark_is_left_out(tmp_path: Path, pack: object) -> None:
    path = tmp_path / "a.fa"
    for content in (FASTA, genbank()):
        path.write_bytes(pack(content))  # type: ignore[operator]
        plain = records(path)
        path.write_bytes(pack(b"\xef\xbb\xbf" + content))  # type: ignore[operator]
        assert records(path) == plain


def test_small_letters_are_kept_as_a_bit(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(FASTA)
    piece = np.frombuffer(b"".join(piece for _, piece in read_sequences(tmp_path / "a.fa")), dtype=np.uint8)
    small = bytes(letter for letter in b"ACGTNNacgtnRYSWkmbdhvACGUTTTTA")
    assert ((piece & SOFT) > 0).tolist() == [bytes([letter]).islower() for letter in small]


def test_the_watcher_sees_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(b">a\n" + b"ACGT" * (1 << 19))
    seen: list[int] = []
    assert sum(len(piece) for _, piece in read_sequences(tmp_path / "a.fa", seen.append)) == 1 << 21
    assert seen == sorted(seen)
    assert seen[-1] == (1 << 21) + 3


def test_real_genomes_are_read_as_biopython_reads_them(data: Path) -> None:
    for path in sorted((data / "dna" / "bacteria").glob("*.gz")):
        with gzip.open(path, "rt") as file:
            expected = {record.id: bytes(record.seq) for record in SeqIO.parse(file, "fasta")}
        assert records(path) == expected


def genbank(count: int = 2) -> bytes:
    """Records with features, as Biopython writes them."""
    made = []
    for i in range(count):
        feature = SeqFeature(SimpleLocation(3, 60, strand=-1), type="CDS", qualifiers={"gene": "abc"})
        letters = "".join(random.Random(i).choices("ACGTNR", (9, 9, 9, 9, 1, 1), k=200 + i))
        annotations = {"molecule_type": "DNA"}
        made.append(SeqRecord(Seq(letters), f"X{i}.1", f"X{i}", features=[feature], annotations=annotations))
    text = io.StringIO()
    SeqIO.write(made, text, "genbank")
    return text.getvalue().encode()


def test_genbank_is_read(tmp_path: Path) -> None:
    for name, content in (("a.gb", genbank()), ("b.gbk.gz", gzip.compress(genbank()))):
        path = tmp_path / name
        path.write_bytes(content)
        parsed = SeqIO.parse(io.StringIO(genbank().decode()), "genbank")
        assert records(path) == {record.id: bytes(record.seq) for record in parsed}
        # GenBank's small letters mask nothing
        assert not any(byte & SOFT for _, piece in read_sequences(path) for byte in piece)


BAD = [
    (b"", "line 1: there is no record"),
    (b"\n\n", "line 3: there is no record"),
    (gzip.compress(b""), "line 1: there is no record"),
    (b"ACGT\n", "line 1: neither FASTA"),
    (b"\n\n@read\nACGT\n+\nIIII\n", "line 3: FASTQ is not read"),
    (b"BZh91AY&SY" + bytes(20), "line 1: neither FASTA"),
    (b">a\nAC\n>b\nACGT\n>a\nAA\n", "line 5: a record is called a as the one of line 1 is"),
    (b">a\nACGT\n>b\n>c\nAC\n", "line 3: record b has no sequence"),
    (b">a\nACGT\n>b\n\n", "line 3: record b has no sequence"),
    (b">a\nACGT\n> \nAC\n", "line 3: a record has no name"),
    (b">a\nACGT\nACGL\n", "line 3: 'L' is no letter of DNA; is it a protein"),
    (b">a\r\nACGT\r\n>b\r\nAC\r\nMKVLA*\r\n", "line 5: 'L' is no letter of DNA"),
    (b">p\nMKRSTWHDVKRS\n", "line 1: more than half of record p are letters for several"),
    (b">a\nAC--GT\n", "line 2: '-' is no letter of DNA; give sequences without gaps"),
    (b">a\nAC>GT\n", "line 2: '>' is no letter of DNA"),
    (b">a\n1 ACGT\n", "line 2: '1' is no letter of DNA"),
    (b">a\xff\nACGT\n", "line 1: the header is no text"),
    (b">a\0b\nACGT\n", "line 1: .* is no name"),
    (b">a\rACGT\r>b\rACGT\r", "line 1: lines end with CR alone"),
    (b">" + b"a" * 3_000_000, "line 1: a header has no end"),
    (gzip.compress(FASTA * 1)[:-12], "cannot be read beyond here .*is it whole"),
    (gzip.compress(FASTA)[:30] + b"junk" + gzip.compress(FASTA)[34:], "cannot be read beyond here"),
    (bgzip(FASTA)[:-28], "cut off"),
    (b"\xef\xbb\xbf\n", "line 2: there is no record"),
    (b">a\nAC\n\xef\xbb\xbf>b\nAC\n", "line 3: .* is no letter of DNA"),
    (
        b"LOCUS       X " + b"x" * 9999 + b" 200 bp DNA\n",
        r"line 1: this is not GenBank \(.* LOCUS X \.\.\.\)",
    ),
    (b"LOCUS       x\n", "is not GenBank|no record|no sequence"),
    (genbank()[:-40], "line [0-9]+: this is not GenBank"),
    (genbank(1).replace(b"       61 ", b"       61 ac"), "line [0-9]+: this is not GenBank .*length"),
    (
        re.sub(rb"ORIGIN.*?//", b"CONTIG      join(Y.1:1..200)\n//", genbank(), flags=re.DOTALL),
        "line 1: a record has no sequence",
    ),
    (genbank(1) * 2, "is called"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_sequences(path))
    assert is_short(str(caught.value), path)


def is_short(message: str, path: Path) -> bool:
    """Whether a message begins with the path and is one line of at most 200 characters more."""
    return (
        message.startswith(str(path))
        and len(message.splitlines()) == 1
        and len(message) <= len(str(path)) + 200
    )


def mutate(content: bytes, lot: random.Random) -> bytes:
    """Damage a file in one to three places."""
    out = bytearray(content)
    for _ in range(lot.randint(1, 3)):
        at, kind = lot.randrange(len(out) + 1), lot.randrange(6)
        if kind == 0 and at < len(out):
            out[at] = lot.randrange(256)
        elif kind == 1:
            del out[at : at + lot.randint(1, 8)]
        elif kind == 2:
            out[at:at] = lot.choice(
                [b">", b"\n", b"\r\n", b"\n>", b" ", b"\t", b"-", b"\0", b"\xc3", b"9", b"@"]
            )
        elif kind == 3:
            end = min(len(out), at + lot.randint(1, 40))
            out[at:at] = out[at:end]
        elif kind == 4:
            del out[at:]
        elif at < len(out):
            out[at] = lot.choice(b"ACGTacgtNRYXLu\r\n>\t ")
    return bytes(out)


def expected_records(content: bytes) -> dict[str, bytes]:
    """What Biopython reads, in our letters."""
    parsed = SimpleFastaParser(io.StringIO(content.decode(), newline="\n"))
    return {
        title.split()[0]: letters.replace("\t", "").upper().replace("U", "T").encode()
        for title, letters in parsed
    }


def test_damaged_fasta_is_read_as_it_stands_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lot, path, read = random.Random(1), tmp_path / "a.fa", 0
    for i in range(5000):
        monkeypatch.setattr(sequences, "BLOCK", (16, 64, 1 << 20)[i % 3])
        content = mutate(FASTA, lot)
        path.write_bytes(content)
        try:
            found = records(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}, line ")  # noqa: PT017
            assert is_short(str(error), path)  # noqa: PT017
        else:
            read += 1
            assert found == expected_records(content)
            assert all(found.values())
    assert 1200 < read < 4600


@pytest.mark.parametrize("pack", [gzip.compress, bgzip], ids=["gzip", "bgzip"])
def test_damaged_gzip_is_refused(tmp_path: Path, pack: object) -> None:
    path = tmp_path / "a.fa.gz"
    path.write_bytes(FASTA)
    whole, lot, refused = records(path), random.Random(2), 0
    for _ in range(500):
        path.write_bytes(mutate(pack(FASTA), lot))  # type: ignore[operator]
        try:
            # what is no content, like the time in a header, may change
            assert records(path) == whole
        except ValueError as error:
            refused += str(error).startswith(str(path))
    assert refused > 250


def test_damaged_genbank_is_read_or_refused(tmp_path: Path) -> None:
    lot, path, refused = random.Random(3), tmp_path / "a.gb", 0
    for _ in range(300):
        path.write_bytes(mutate(genbank(), lot))
        try:
            assert all(set(letters) <= set(LETTERS.encode()) for letters in records(path).values())
        except ValueError as error:
            refused += 1
            assert is_short(str(error), path)  # noqa: PT017
    assert refused > 50


def test_the_complement_is_biopythons() -> None:
    assert sorted(COMPLEMENT) == list(range(SIZE))
    assert [COMPLEMENT[other] for other in COMPLEMENT] == list(range(SIZE))
    sequence = np.frombuffer(stored(LETTERS.encode()), dtype=np.uint8)
    assert letters_of(reverse_complement(sequence)).decode() == str(Seq(LETTERS).reverse_complement())
    assert (
        tokens_of(reverse_complement(sequence)).tolist() == [COMPLEMENT[t] for t in tokens_of(sequence)][::-1]
    )


def test_both_strands_keep_the_soft_mask() -> None:
    sequence = np.frombuffer(stored(b"acgTTN"), dtype=np.uint8)
    assert (reverse_complement(sequence) & SOFT > 0).tolist() == [False, False, False, True, True, True]
    assert np.array_equal(reverse_complement(reverse_complement(sequence)), sequence)


def test_only_known_bases_are_targets() -> None:
    sequence = np.frombuffer(stored(b"ACGTacgtNnRYswkmbdhv"), dtype=np.uint8)
    assert targets_of(sequence).tolist() == [0, 1, 2, 3] * 2 + [-100] * 12


def test_letters_are_a_vocabulary() -> None:
    words = vocabulary_from_dict(Nucleotides().to_dict())
    tokens = words.encode(b"acg tNR\n")
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert words.decode([words.eos, *tokens, 16, 17]) == "ACGTNR"
    stream = words.stream()
    assert "".join(stream.push(token) for token in tokens) + stream.flush() == "ACGTNR"
    assert words.byte_lengths().tolist() == [1] * 15 + [0] * 3
    with pytest.raises(ValueError, match="'X' is no base"):
        words.encode(b"AC GX")
