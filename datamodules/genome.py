"""A genome on disk, a byte a base: built once from its files, memory-mapped ever after, never held whole.

The cache of a genome (see datamodules/cache.py) takes as many bytes as it has bases: 3.1 GB for a human one. Records
lie end to end in the order of the files; reading takes memory for no more than what is read.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cache import TokenFile, build_folder, cache_root, digest_of_files
from .progress import reading
from .samples import PREFIX, find_sample
from .sequences import SUFFIXES, read_sequences

# a change of the format on disk changes every key
_FORMAT = "1"


@dataclass
class Genome:
    """Records of DNA: their names, where each starts (records + 1,), and all their stored bytes (see alphabet.py)."""

    name: str
    names: list[str]
    starts: NDArray[np.int64]
    sequence: TokenFile
    digest: str

    def __post_init__(self) -> None:
        self.index = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.sequence)

    def length(self, record: str) -> int:
        """How many bases a record has."""
        i = self.index[record]
        return int(self.starts[i + 1] - self.starts[i])

    def read(self, record: str, start: int, end: int) -> NDArray[np.uint8]:
        """The stored bytes of a record from `start` (0 is the first) up to `end`, not included.

        Raises:
            ValueError: when the genome has no such record, or the record no such bases.
        """
        if record not in self.index:
            raise ValueError(f"{self.name} has no record {record}")
        if not 0 <= start <= end <= self.length(record):
            raise ValueError(
                f"{record} of {self.name} has bases 0 to {self.length(record)}, not {start} to {end}"
            )
        first = self.starts[self.index[record]]
        return self.sequence.array[first + start : first + end]

    def place(self, interval: tuple[str, int, int]) -> tuple[int, int]:
        """Where bases `start` to `end` of a record are in the whole."""
        record, start, end = interval
        first = int(self.starts[self.index[record]])
        return first + start, first + end


@dataclass(frozen=True)
class GenomeFiles:
    """The files that one genome is read from."""

    name: str
    files: tuple[Path, ...]

    def build(self) -> None:
        """Build the genome in the cache unless it is there.

        Raises:
            ValueError: as read_sequences does, and when two records of different files have one name.
        """
        digest = self._content_digest()
        build_folder(self._folder(digest), self._write)

    def open(self) -> Genome:
        """Map the genome that `build` left in the cache."""
        digest = self._content_digest()
        folder = self._folder(digest)
        names = (folder / "names.txt").read_text(encoding="utf-8").splitlines()
        starts = np.fromfile(folder / "starts", dtype=np.int64)
        return Genome(self.name, names, starts, TokenFile(folder / "sequence", "uint8"), digest)

    def size(self) -> int:
        """The bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    def _folder(self, digest: str) -> Path:
        return cache_root() / "dna" / digest[:32]

    def _content_digest(self) -> str:
        return digest_of_files(f"dna {_FORMAT}", self.files)

    def _write(self, folder: Path) -> None:
        owners: dict[str, Path] = {}
        starts, bases = [], 0
        with (folder / "sequence").open("wb") as output, reading(self.name, self.size()) as advance:
            before = 0
            for path in self.files:
                for name, piece in read_sequences(path, lambda n, before=before: advance(before + n)):  # type: ignore[misc]
                    if name is not None:
                        if name in owners:
                            raise ValueError(f"{path}: a record is called {name} as one of {owners[name]} is")
                        owners[name] = path
                        starts.append(bases)
                    bases += output.write(piece)
                before += path.stat().st_size
            output.flush()
            os.fsync(output.fileno())
        for file, content in (
            ("names.txt", "".join(f"{name}\n" for name in owners).encode()),
            ("starts", np.array([*starts, bases], dtype=np.int64).tobytes()),
        ):
            with (folder / file).open("wb") as output:
                output.write(content)
                output.flush()
                os.fsync(output.fileno())


def find_genomes(paths: list[str], option: str = "data.paths") -> list[GenomeFiles]:
    """A genome for each of `paths`, which `option` gave: a file, all the files of a folder or a glob, or sample:NAME.

    Raises:
        FileNotFoundError: when a path, folder or glob holds no file of sequences.
        ValueError, FileNotFoundError: as find_sample does.
    """
    genomes = []
    for given in paths:
        path = Path(given).expanduser()
        if given.startswith(PREFIX):
            genomes.append(GenomeFiles(given.removeprefix(PREFIX), (find_sample(given, option),)))
            continue
        if path.is_dir():
            found = [file for file in sorted(path.iterdir()) if _is_sequences(file)]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            found = [match for match in found if match.is_file()]
        if not found:
            kinds = " ".join(SUFFIXES)
            raise FileNotFoundError(
                f"{option}: there is no file at {given}, nor a folder with {kinds} files, plain or .gz"
            )
        genomes.append(GenomeFiles(path.name, tuple(found)))
    return genomes


def _is_sequences(path: Path) -> bool:
    return path.is_file() and path.name.lower().removesuffix(".gz").removesuffix(".bgz").endswith(SUFFIXES)
