"""A text file that takes long to write: a kill loses little of it, and the same command goes on where it stopped.

Until it is whole it is called NAME.part, plain text. A line of its head says what it is made of; one that is made of
something else is left alone.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

from ..datamodules.bgzip import bgzip
from ..datamodules.intervals import read_lines
from ..zoo.saving import sync_folder, write_whole


class PartialFile:
    """A file at path that begins with what `head` makes of a line: `mark` and the JSON of what the file is made of.

    `finished` says that it is there, whole, and `lines` how many lines behind the head are there when it is not.

    Raises:
        ValueError: when what is there is made of something else, or is being written by another process.
    """

    def __init__(self, path: Path, head: Callable[[str], str], mark: str, made_of: dict[str, Any]) -> None:
        self.path, self.part = path, path.with_name(f"{path.name}.part")
        self.mark, self.made_of = mark, made_of
        self.head = head(mark + json.dumps(made_of)).encode()
        self.lines = 0
        self.finished = path.exists()
        if self.finished:
            self._refuse_another(path)
            return
        self.file: IO[bytes] = os.fdopen(os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            self._lock()
            self._begin()
        except ValueError:
            self.file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.finished:
            self.file.close()

    def keep(self, lines: int) -> None:
        """Go on behind that many lines; what is there beyond is dropped."""
        self.file.seek(len(self.head))
        end = len(self.head) + sum(len(self.file.readline()) for _ in range(lines))
        self.file.truncate(end)
        self.file.seek(end)

    def write(self, text: str) -> None:
        self.file.write(text.encode())
        self.file.flush()

    def finish(self) -> None:
        """Give the file its name; a name that ends in .gz has it packed as bgzip."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.path.suffix == ".gz":
            write_whole(self.path, lambda packed: packed.writelines(bgzip(self._blocks())))
            self.part.unlink()
        else:
            os.replace(self.part, self.path)
            sync_folder(self.path.parent)

    def _begin(self) -> None:
        """Count the lines that are there behind the head, or write that."""
        there = self.file.read(len(self.head))
        if there == self.head:
            self.lines = sum(line.endswith(b"\n") for line in self.file)
        elif self.head.startswith(there):
            self.file.seek(0)
            self.write(self.head.decode())
        else:
            self._refuse_another(self.part)

    def _blocks(self) -> Iterator[bytes]:
        self.file.seek(0)
        while block := self.file.read(1 << 20):
            yield block

    def _lock(self) -> None:
        # where there are such locks, no two processes write one file
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.part} is being written by another process") from None

    def _refuse_another(self, path: Path) -> None:
        kept: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            for _, line in read_lines(path):
                if line.startswith(self.mark):
                    kept = json.loads(line.removeprefix(self.mark))
                if not line.startswith("#") or kept:
                    break
        if not kept:
            raise ValueError(f"{path} is there, and nothing that this command wrote; name another file")
        changed = [
            f"{key} {kept.get(key)!r}, not {value!r}"
            for key, value in self.made_of.items()
            if kept.get(key) != value
        ]
        if changed:
            raise ValueError(f"{path} was made with {'; '.join(changed)}: name another file, or remove it")
