"""Sequences of DNA from FASTA and GenBank files, plain, gzip or bgzip, a block at a time.

What a file is, its content says: `>` opens FASTA, `LOCUS` GenBank, with or without a byte order mark. A record is
called by the first word of its header. Letters are those of datamodules/alphabet.py; blanks and line ends of any kind
but a lone CR are left out.
"""

import codecs
import gzip
import io
import re
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .alphabet import BASES, FOREIGN, LETTERS, stored
from .bgzip import is_packed

# what files of sequences are called in a folder
SUFFIXES = (".fa", ".fasta", ".fna", ".gb", ".gbk", ".gbff", ".genbank")
BLOCK = 1 << 20
# a longer header is no header; of what Biopython says, as much is told
_LONGEST_HEADER, _LONGEST_REASON = 1 << 16, 150
_PLAIN = bytes(range(BASES + 1)) + bytes(token | 0x80 for token in range(BASES + 1))
_KNOWN = f"{LETTERS}U{LETTERS.lower()}u \t\r\n".encode()
_NO_DNA = re.compile(b"[^" + re.escape(_KNOWN) + b"]")

# a record's name, or None where the piece goes on with the record before, and a stretch of stored bytes
Piece = tuple[str | None, bytes]


def read_sequences(path: Path, watch: Callable[[int], None] | None = None) -> Iterator[Piece]:
    """The records of a file, each in one or more pieces that hold a byte a base (see datamodules/alphabet.py).

    `watch` is told now and then how many bytes of the file have been read.

    Raises:
        ValueError: with file and line, where it is not FASTA or GenBank of DNA, has no record, an empty one, or two
            of one name, or ends before its end.
    """
    names: dict[str, int] = {}
    at = _Place(path)
    with _opened(path, at, watch) as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        head = file.peek(1).lstrip()  # type: ignore[attr-defined]
        pieces = _genbank(file, at) if head.startswith(b"LOCUS") else _fasta(file, at)
        for name, piece in pieces:
            if name is not None:
                first = names.setdefault(name, at.header)
                if first != at.header:
                    raise at.error(f"a record is called {name} as the one of line {first} is", at.header)
            yield name, piece


class _Place:
    """Where in a file the reader is: lines from 1, of the block at hand and of the last header."""

    def __init__(self, path: Path) -> None:
        self.path, self.line, self.header = path, 1, 0
        self.name, self.bases, self.unsure = "", 0, 0

    def error(self, problem: str, line: int | None = None) -> ValueError:
        return ValueError(f"{self.path}, line {self.line if line is None else line}: {problem}")

    def begin(self, name: str, line: int) -> None:
        """Leave one record for the next."""
        self.end()
        if not name.isprintable() or not name:
            raise self.error(f"{name!r} is no name for a record" if name else "a record has no name", line)
        self.name, self.header, self.bases, self.unsure = name, line, 0, 0

    def end(self) -> None:
        if not self.header:
            return
        if not self.bases:
            raise self.error(f"record {self.name} has no sequence", self.header)
        # a few letters of proteins are no IUPAC codes, but short proteins can do without them
        if self.unsure * 2 > self.bases:
            raise self.error(
                f"more than half of record {self.name} are letters for several bases; is it a protein?",
                self.header,
            )

    def check(self, letters: bytes, start: int, end: int, line: int) -> bytes:
        """The stored bytes of letters[start:end], the first of them in `line`."""
        piece = stored(letters[start:end])
        if FOREIGN in piece:
            found = _NO_DNA.search(letters, start, end)
            assert found is not None
            raise self.error(
                f"{found[0].decode('latin-1')!r} is no letter of DNA{_why(found[0])}",
                line + letters.count(b"\n", start, found.start()),
            )
        self.bases += len(piece)
        self.unsure += len(piece.translate(None, _PLAIN))
        return piece


@contextmanager
def _opened(path: Path, at: _Place, watch: Callable[[int], None] | None) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is gzip; what goes wrong in reading it is said with the line that was reached."""
    with path.open("rb") as raw:
        packed = is_packed(path, raw)
        watched = raw if watch is None else io.BufferedReader(_Watched(raw, watch), BLOCK)
        file: Any = gzip.GzipFile(fileobj=watched) if packed else watched
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise at.error(f"the file cannot be read beyond here ({error}); is it whole?") from None


class _Watched(io.RawIOBase):
    """A file that says how far it has been read."""

    def __init__(self, file: IO[bytes], watch: Callable[[int], None]) -> None:
        self.file, self.watch = file, watch

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        self.watch(self.file.tell())
        return self.file.readinto(buffer)  # type: ignore[attr-defined]


def _fasta(file: IO[bytes], at: _Place) -> Iterator[Piece]:
    """Cut blocks at the lines that start with `>`; nothing is done line by line."""
    # does the block start a line, and what of the last one is the start of a header
    fresh, held = True, b""
    while True:
        block = file.read(BLOCK)
        text = held + block
        if not text:
            break
        end = len(text)
        last = text.rfind(b"\n") + 1
        if block and text.startswith(b">", last) and (last or fresh):
            # a header is read whole
            end = last
            if len(text) - last > _LONGEST_HEADER:
                raise at.error("a header has no end; are the line ends those of DOS or Unix?")
        position = 0
        if not (fresh and text.startswith(b">")):
            position = _next_record(text, 0, end)
            if at.header:
                yield None, at.check(text, 0, position, at.line)
            elif rest := text[:position].lstrip():
                line = at.line + text.count(b"\n", 0, position - len(rest))
                raise at.error(_no_fasta(rest), line)
        line = at.line + text.count(b"\n", 0, position)
        while position < end:
            stop = text.find(b"\n", position, end)
            stop = end if stop < 0 else stop
            at.begin(_name(text[position + 1 : stop], at, line), line)
            position = _next_record(text, stop, end)
            yield at.name, at.check(text, stop, position, line)
            line += text.count(b"\n", stop, position)
        at.line = line
        fresh = fresh if end == 0 else text.endswith(b"\n", 0, end)
        held = text[end:]
    at.end()
    if not at.header:
        raise at.error("there is no record in the file")


def _why(letter: bytes) -> str:
    if letter in (b"-", b"."):
        return "; give sequences without gaps"
    return "; is it a protein?" if letter.isalpha() or letter == b"*" else ""


def _next_record(text: bytes, start: int, end: int) -> int:
    found = text.find(b"\n>", start, end)
    return end if found < 0 else found + 1


def _name(header: bytes, at: _Place, line: int) -> str:
    """The first word of a header."""
    if b"\r" in header.rstrip(b"\r"):
        raise at.error("lines end with CR alone; write LF or CRLF", line)
    try:
        words = header.decode().split(maxsplit=1)
    except UnicodeDecodeError:
        raise at.error("the header is no text", line) from None
    return words[0] if words else ""


def _no_fasta(rest: bytes) -> str:
    if rest.startswith(b"@"):
        return "FASTQ is not read; make FASTA of it (seqtk seq -A)"
    return "neither FASTA, which starts with '>', nor GenBank, which starts with LOCUS"


def _genbank(file: IO[bytes], at: _Place) -> Iterator[Piece]:
    """Records as Biopython reads them, each called by its accession and version."""
    from Bio import BiopythonParserWarning, SeqIO
    from Bio.Seq import UndefinedSequenceError

    with _Lines(file, encoding="utf-8", errors="replace", newline=None) as lines:
        records = SeqIO.parse(lines, "genbank")  # type: ignore[no-untyped-call]
        while True:
            line = lines.count + 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BiopythonParserWarning)
                # a sequence that is not as long as its record says has lost something
                warnings.filterwarnings("error", "Expected sequence length", BiopythonParserWarning)
                try:
                    record = next(records, None)
                    # GenBank writes every base small, which masks nothing
                    letters = None if record is None else bytes(record.seq).upper()
                except UndefinedSequenceError:
                    raise at.error("a record has no sequence; ask for it with its sequence", line) from None
                except (EOFError, gzip.BadGzipFile, zlib.error):
                    at.line = max(1, lines.count)
                    raise
                except Exception as error:
                    # what damaged files make Biopython raise is of many kinds
                    reason = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
                    raise at.error(f"this is not GenBank ({reason})", max(1, lines.count)) from None
            if record is None or letters is None:
                break
            at.begin(record.id if record.id not in ("", "<unknown id>") else record.name, line)
            yield at.name, at.check(letters, 0, len(letters), line)
        at.end()
        if not at.header:
            raise at.error("there is no record in the file")


class _Lines(io.TextIOWrapper):
    """Text whose lines are counted."""

    count = 0

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        line = super().readline(size)
        self.count += bool(line)
        return line

    def __next__(self) -> str:  # type: ignore[override]
        line = self.readline()
        if not line:
            raise StopIteration
        return line
