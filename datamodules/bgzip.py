"""Packed files: gzip told from plain, bgzip found whole, and bgzip written, so that tabix and its like can index it.

bgzip is gzip in blocks that say how long they are, after which an empty one says that nothing is missing (the SAM
specification, section 4.1).
"""

import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

# the block that ends a file
END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
# what comes before a block's length, and bytes that a block holds: packed they stay below 2^16, whatever they are
_HEAD, _SIZE = bytes.fromhex("1f8b08040000000000ff0600424302 00"), 0xFF00


def is_packed(path: Path, file: IO[bytes]) -> bool:
    """Whether a file, open and at its start, is gzip or bgzip.

    Raises:
        ValueError: for bgzip without its last block.
    """
    magic = file.read(16)
    file.seek(0)
    if not magic.startswith(b"\x1f\x8b"):
        return False
    if magic[12:14] == b"BC":
        file.seek(0, io.SEEK_END)
        file.seek(-min(file.tell(), len(END)), io.SEEK_END)
        if file.read() != END:
            raise ValueError(f"{path}: the file is cut off, for the block that ends bgzip is missing")
        file.seek(0)
    return True


def bgzip(content: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks of a bgzip file, its end included."""
    held = b""
    for piece in content:
        held += piece
        while len(held) >= _SIZE:
            yield _block(held[:_SIZE])
            held = held[_SIZE:]
    if held:
        yield _block(held)
    yield END


def _block(content: bytes) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(content) + deflate.flush()
    size = len(_HEAD) + 2 + len(body) + 8
    tail = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    return _HEAD + (size - 1).to_bytes(2, "little") + body + tail
