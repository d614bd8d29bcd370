"""Documents of text, one after the other, from files of many kinds: what the text data module reads."""

import glob
import gzip
import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".txt", ".py", ".md", ".jsonl")
STDLIB = "stdlib"
# tests and tables are much of the standard library's bytes and little of its language
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
# a longer document is read a block at a time
BLOCK = 1 << 24


@dataclass(frozen=True)
class Source:
    """One file, or one Hugging Face data set, that documents come from, under a name that no machine's paths are in."""

    name: str
    path: Path | None = None

    def documents(self) -> Iterator[Iterator[bytes]]:
        """Its documents, each an iterator over blocks of UTF-8 text (or whatever bytes the file has)."""
        if self.path is None:
            yield from _huggingface(self.name)
        elif self.path.name.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
            yield from _json_lines(self.path)
        else:
            yield _blocks(self.path)

    def stamp(self) -> tuple[str, int, int]:
        """What changes when the file does, and costs nothing to read."""
        if self.path is None:
            return self.name, 0, 0
        status = self.path.stat()
        return str(self.path.resolve()), status.st_size, status.st_mtime_ns

    def digest(self) -> bytes:
        """A digest of the content."""
        if self.path is None:
            return _dataset(self.name)._fingerprint.encode()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()


def find_sources(paths: list[str], key: str = "data.paths") -> list[Source]:
    """The sources that paths, "stdlib" and "hf:NAME", given as `key`, are, in an order that every machine agrees on.

    Raises:
        FileNotFoundError: when a path, folder or glob holds no text file.
        ValueError: when a file is of no kind that is read.
    """
    sources: list[Source] = []
    for given in paths:
        if given == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            files = [file for file in _text_files(root, (".py",)) if not _STDLIB_LEFT_OUT & set(file.parts)]
            sources += [Source(f"{STDLIB}/{file.as_posix()}", root / file) for file in files]
        elif given.startswith("hf:"):
            sources.append(Source(given))
        else:
            sources += _from_path(given, key)
    return sources


def _from_path(given: str, key: str) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        files = _text_files(path, SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{key}: {given} holds no {' '.join(SUFFIXES)} file, plain, .gz or .xz")
        return [Source(file.as_posix(), path / file) for file in files]
    if path.is_file():
        if not _is_text(path, SUFFIXES):
            raise ValueError(
                f"{key}: {given} is not a kind of file that is read: {' '.join(SUFFIXES)}, plain, .gz or .xz"
            )
        return [Source(path.name, path)]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    found = [
        Source(match.as_posix(), match) for match in matches if match.is_file() and _is_text(match, SUFFIXES)
    ]
    if not found:
        raise FileNotFoundError(f"{key}: there is no file, folder or match for {given}")
    return found


def _text_files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = (
        path.relative_to(root) for path in root.rglob("*") if _is_text(path, suffixes) and path.is_file()
    )
    return sorted(files, key=lambda file: file.as_posix())


def _is_text(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".xz").endswith(suffixes)


def _open(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"data.paths: {path} cannot be read to its end ({error}); is it whole?")


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            rest = b""
            while block := file.read(BLOCK):
                # a full block ends with a line where it can, so that no word or letter is cut in two
                cut = (len(block) == BLOCK and block.rfind(b"\n") + 1) or len(block)
                yield rest + block[:cut]
                rest = block[cut:]
            if rest:
                yield rest
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _json_lines(path: Path) -> Iterator[Iterator[bytes]]:
    for text, _ in read_json_lines(path):
        yield iter([text])


def read_json_lines(path: Path, label: str | None = None) -> Iterator[tuple[bytes, str]]:
    """The "text" of each object of a .jsonl file, plain, .gz or .xz, and what it has under the key `label`, if any."""
    wanted = 'is not a JSON object with a "text"' + (f' and a "{label}"' if label else "")
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    text, of = row["text"], row[label] if label else ""
                except (ValueError, KeyError, TypeError):
                    text = of = None
                if not isinstance(text, str) or not isinstance(of, str | int):
                    raise ValueError(f"data.paths: {path}, line {number}: {wanted}")
                yield text.encode("utf-8", errors="replace"), str(of)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise _damaged(path, error) from None


def _dataset(name: str) -> Any:
    """Open hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT; an empty CONFIG is the default, an empty SPLIT train."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"data.paths: {name} needs the package datasets: pip install datasets") from None
    _, dataset, config, split = [*name.split(":"), "", ""][:4]
    return datasets.load_dataset(dataset, config or None, split=split or "train")


def _huggingface(name: str) -> Iterator[Iterator[bytes]]:
    for row in _dataset(name):
        yield iter([row["text"].encode()])
