"""The cache of prepared data: folders built once, whole or not at all, memory-mapped by all who ask for them.

What a folder is called is a digest of all that decides its content. It is written under another name, flushed to
the disk and renamed, so that whoever finds it finds it whole; processes that build it at once do the same work
twice and keep one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cache_root() -> Path:
    """Where prepared data is kept: MAMBAZOO_CACHE, or mambazoo in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MAMBAZOO_CACHE") or Path(home) / "mambazoo")


class TokenFile:
    """A flat array on disk, mapped when it is first read; it travels to workers as its path."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.length = path.stat().st_size // self.dtype.itemsize
        self._array: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.length

    @property
    def array(self) -> NDArray[Any]:
        if self._array is None:
            self._array = np.memmap(self.path, self.dtype, "r") if self.length else np.empty(0, self.dtype)
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}


def build_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder that becomes `target`, unless that is there already.

    Raises:
        OSError: when the cache cannot be written.
    """
    if target.exists():
        return
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    try:
        write(building)
        building.chmod(0o755)
        os.rename(building, target)
    except OSError as error:
        # another process was first, and what it built is the same
        if not target.exists():
            raise OSError(error.errno, f"the cache cannot be written to {root}: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def remember(stamp: str, compute: Callable[[], str]) -> str:
    """The digest that `compute` gave when it was first asked for this stamp (of names, sizes and times)."""
    note = cache_root() / "digests" / stamp[:32]
    try:
        return note.read_text()
    except FileNotFoundError:
        pass
    digest = compute()
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, digest.encode())
    return digest


def digest_of_files(header: str, files: Iterable[Path]) -> str:
    """A digest of `header` and the files' contents, which are read again when the size or the time of one changed."""
    paths = list(files)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    stamp = hashlib.sha256(json.dumps([header, stats]).encode()).hexdigest()

    def read() -> str:
        total = hashlib.sha256(header.encode())
        for path in paths:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    return remember(stamp, read)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


def _sweep(root: Path) -> None:
    """Remove what a build that was killed left behind more than a day ago."""
    for left in root.glob(".building-*"):
        # another process may just have moved it to its place
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left, ignore_errors=True)
