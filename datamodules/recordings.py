"""Recordings on disk at one rate, 16 bits a sample: built once from files of sound, memory-mapped ever after.

The cache (see datamodules/cache.py) takes two bytes a sample: 115 MB for an hour at 16 kHz. Recordings lie end to end
in the order of the files. A file that cannot be read is left out and named, and the rest goes on.
"""

import glob
import hashlib
import io
import itertools
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cache import TokenFile, build_folder, cache_root, digest_of_files, write_whole
from .progress import reading
from .samples import PREFIX, find_chorales
from .sound import SUFFIXES, read_sound
from .waveform import FULL_SCALE, stored

log = logging.getLogger(__name__)

# a change of the format on disk, or of what is heard of a file or score, changes every key
_FORMAT = "2"
# samples that are worked on at once
_BLOCK = 1 << 20
# a recording of more samples is decoded to the disk
_LONG = 1 << 22
# of files that are left out, so many are named at once
_NAMED = 5


class Source(Protocol):
    """What one recording is made of: its name, the files whose content it is, and their share of the bytes."""

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def size(self) -> int: ...

    def blocks(self, rate: int) -> Iterator[NDArray[np.float32]]:
        """Its samples at a rate; ValueError says what is wrong with it."""
        ...


@dataclass(frozen=True)
class SoundFile:
    """A file, or a member of a .zip."""

    name: str
    path: Path
    size: int
    member: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def blocks(self, rate: int) -> Iterator[NDArray[np.float32]]:
        return read_sound(self.path if self.member is None else self._unpacked(self.member), rate)

    def _unpacked(self, member: str) -> IO[bytes]:
        try:
            return io.BytesIO(_archive(self.path).read(member))
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
            NotImplementedError,
            OSError,
        ) as error:
            raise ValueError(f"it cannot be taken from {self.path.name} ({error})") from None


@lru_cache(maxsize=1)
def _archive(path: Path) -> zipfile.ZipFile:
    """A .zip that stays open from one member to the next: its directory is long to read."""
    return zipfile.ZipFile(path)


@dataclass
class Recordings:
    """Recordings: their names, where each starts (recordings + 1,), all their samples; what was left out, and why."""

    names: list[str]
    starts: NDArray[np.int64]
    samples: TokenFile
    # of the samples of each
    digests: list[str]
    skipped: dict[str, str]
    digest: str

    def __len__(self) -> int:
        return len(self.names)

    @property
    def places(self) -> list[tuple[int, int]]:
        """From where to where each recording is among all samples."""
        return list(itertools.pairwise(self.starts.tolist()))

    def names_at(self, samples: NDArray[np.int64]) -> list[str]:
        """The name of the recording that each of some samples is in."""
        return [self.names[i] for i in np.searchsorted(self.starts, samples, side="right") - 1]


@dataclass(frozen=True)
class RecordingFiles:
    """All that decides what recordings are.

    Args:
        rate: samples a second.
        trim: cut at both ends what is so many decibels below a recording's peak.
        normalise: scale each recording so that its peak is full scale.
    """

    sources: list[Source]
    rate: int
    trim: float | None = None
    normalise: bool = False

    def build(self) -> None:
        """Build the recordings in the cache unless they are there.

        Raises:
            ValueError: when not one of the files can be read.
        """
        digest = self._digest()
        build_folder(self._folder(digest), lambda folder: self._write(folder, digest))

    def open(self) -> Recordings:
        """Map the recordings that `build` left in the cache, and say what it left out."""
        digest = self._digest()
        folder = self._folder(digest)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        starts = np.array(meta.pop("starts"), dtype=np.int64)
        recordings = Recordings(
            starts=starts, samples=TokenFile(folder / "samples", "int16"), digest=digest, **meta
        )
        if recordings.skipped:
            left_out, more = _first(recordings.skipped), len(recordings.skipped) > _NAMED
            where = f"; all of them, and why, are under skipped in {folder / 'meta.json'}" if more else ""
            log.warning(
                "%d of %d files are left out: %s%s",
                len(recordings.skipped), len(self.sources), left_out, where,
            )  # fmt: skip
        return recordings

    def size(self) -> int:
        """The bytes of all files."""
        return sum(source.size for source in self.sources)

    def _folder(self, digest: str) -> Path:
        return cache_root() / "audio" / digest[:32]

    def _digest(self) -> str:
        """A digest of names, contents and settings."""
        names = hashlib.sha256("\0".join(source.name for source in self.sources).encode()).hexdigest()
        header = json.dumps(["audio", _FORMAT, self.rate, self.trim, self.normalise, names])
        return digest_of_files(header, dict.fromkeys(file for s in self.sources for file in s.files))

    def _write(self, folder: Path, digest: str) -> None:
        names, starts, digests, skipped = [], [0], [], {}
        scratch = folder / "scratch"
        with (
            (folder / "samples").open("wb") as output,
            reading(f"{len(self.sources)} recordings", self.size()) as advance,
        ):
            before = 0
            for source in self.sources:
                try:
                    count, content = self._store(self._decode(source, scratch), output)
                except ValueError as error:
                    # in several paths there may be files of one name
                    named = source.name if source.name not in skipped else source.files[0].as_posix()
                    skipped[named] = str(error)
                else:
                    names.append(source.name)
                    starts.append(starts[-1] + count)
                    digests.append(content)
                before += source.size
                advance(before)
            output.flush()
            os.fsync(output.fileno())
        scratch.unlink(missing_ok=True)
        _archive.cache_clear()
        if not names:
            raise ValueError(
                f"data.paths: not one of {len(self.sources)} files can be read: {_first(skipped)}"
            )
        meta = {"names": names, "starts": starts, "digests": digests, "skipped": skipped}
        write_whole(folder / "meta.json", json.dumps(meta).encode())

    def _decode(self, source: Source, scratch: Path) -> NDArray[np.float32]:
        """The samples of a recording; those of a long one are on disk."""
        held, count, blocks = [], 0, source.blocks(self.rate)
        for block in blocks:
            held.append(block)
            count += len(block)
            if count > _LONG:
                break
        else:
            return np.concatenate([np.empty(0, dtype=np.float32), *held])
        with scratch.open("wb") as file:
            for block in itertools.chain(held, blocks):
                file.write(block.tobytes())
        return TokenFile(scratch, "float32").array

    def _store(self, x: NDArray[np.float32], output: IO[bytes]) -> tuple[int, str]:
        """Append what was decoded as it is kept; return how many samples those are, and their digest."""
        if not len(x):
            raise ValueError("there is no sample in it")
        peak = max(float(np.abs(x[i : i + _BLOCK]).max()) for i in range(0, len(x), _BLOCK))
        low, high = 0, len(x)
        if self.trim is not None:
            low, high = _loud(x, peak * 10 ** (-self.trim / 20))
            if low >= high:
                raise ValueError("it is silent throughout")
        gain = (FULL_SCALE - 1) / FULL_SCALE / peak if self.normalise and peak > 0 else 1.0
        digest = hashlib.blake2b(digest_size=16)
        for i in range(low, high, _BLOCK):
            content = stored(x[i : min(i + _BLOCK, high)] * np.float32(gain)).tobytes()
            digest.update(content)
            output.write(content)
        return high - low, digest.hexdigest()


def _loud(x: NDArray[np.float32], threshold: float) -> tuple[int, int]:
    """From which to which sample something is louder than a threshold."""
    low, high = len(x), 0
    for i in range(0, len(x), _BLOCK):
        found = np.flatnonzero(np.abs(x[i : i + _BLOCK]) > threshold)
        if len(found):
            low, high = min(low, i + int(found[0])), i + int(found[-1]) + 1
    return low, high


def _first(skipped: dict[str, str]) -> str:
    named = [f"{name}: {why}" for name, why in list(skipped.items())[:_NAMED]]
    more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    return "; ".join(named) + more


def find_recordings(paths: list[str]) -> list[Source]:
    """A recording for each file of sound: given itself, in a folder, in a .zip, or matched by a glob; or sample:NAME.

    Its name is the file's; of a file in a folder or a .zip, its path in there, whose folders are then part of the name.

    Raises:
        FileNotFoundError: when a path, folder or glob holds no file of sound.
        ValueError: when a file is of no kind that is read, or a .zip is none.
    """
    return [source for given in paths for source in _find(given)]


def _find(given: str) -> list[Source]:
    if given.startswith(PREFIX):
        return list(find_chorales(given))
    path = Path(given).expanduser()
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if _is_sound(file.name) and file.is_file()]
        return _some([_of(file, file.relative_to(path).as_posix()) for file in found], given)
    if path.suffix.lower() == ".zip" and path.is_file():
        return _some(_members(path), given)
    if path.is_file():
        if not _is_sound(path.name):
            raise ValueError(
                f"data.paths: {given} is not a kind of file that is read: {' '.join(SUFFIXES)}, or a .zip of them"
            )
        return [_of(path, path.name)]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    return _some(
        [_of(match, match.as_posix()) for match in matches if _is_sound(match.name) and match.is_file()],
        given,
    )


def _of(path: Path, name: str) -> Source:
    return SoundFile(name, path, path.stat().st_size)


def _members(path: Path) -> list[Source]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.filename)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"data.paths: {path} is no .zip that can be read ({error})") from None
    return [
        SoundFile(info.filename, path, info.compress_size, info.filename)
        for info in infos
        if _is_sound(info.filename.rpartition("/")[2])
    ]


def _is_sound(name: str) -> bool:
    # what starts with a dot is a file system's own
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _some(found: list[Any], given: str) -> list[Source]:
    if not found:
        raise FileNotFoundError(
            f"data.paths: there is no {' '.join(SUFFIXES)} file at {given}, nor in a folder or .zip of that name"
        )
    return found
