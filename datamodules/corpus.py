"""A corpus as token ids on disk: built once, memory-mapped ever after, shared by all who ask for it.

A corpus lives in a folder of datamodules/cache.py named by a digest of its text and its tokenizer. Reading takes
memory for no more than what is read.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import TokenFile, build_folder, cache_root, remember, write_whole
from .documents import Source
from .vocab import Bytes, Vocabulary, read_tokenizer, train_bpe, vocabulary_from_dict

SPLITS = ("train", "val")
# of fewer documents, each gives its end to the held-out split
_FEW = 20
# of fewer documents, the held-out ones are counted; of more, each is drawn by itself
_COUNTED = 1000
# a change of the format on disk changes every key
_FORMAT = "1"


@dataclass
class Split:
    """Tokens (a separator before every document and one at the end) and where each document starts."""

    tokens: TokenFile
    starts: TokenFile
    documents: int
    bytes: int


@dataclass
class Corpus:
    folder: Path
    digest: str
    vocabulary: Vocabulary
    splits: dict[str, Split]


@dataclass(frozen=True)
class CorpusRecipe:
    """All that decides what a corpus is."""

    sources: list[Source]
    valid_sources: list[Source]
    valid_fraction: float
    tokenizer: str

    def build(self) -> None:
        """Build the corpus in the cache unless it is there."""
        digest = self._content_digest()
        build_folder(self._folder(digest), lambda folder: self._write(folder, digest))

    def open(self) -> Corpus:
        """Map the corpus that `build` left in the cache."""
        digest = self._content_digest()
        folder = self._folder(digest)
        meta = json.loads((folder / "meta.json").read_text())
        splits = {
            name: Split(
                TokenFile(folder / f"{name}.tokens", meta["dtype"]),
                TokenFile(folder / f"{name}.starts", "int64"),
                **meta["splits"][name],
            )
            for name in SPLITS
        }
        return Corpus(folder, digest, vocabulary_from_dict(meta["vocabulary"]), splits)

    def _folder(self, digest: str) -> Path:
        return cache_root() / "text" / digest[:32]

    def _content_digest(self) -> str:
        """A digest of names, contents and tokenizer; contents are read again when a file's size or time changed."""
        spec = [_FORMAT, self.tokenizer, self.valid_fraction, len(self.sources)]
        if self._tokenizer_path() is not None:
            spec.append(hashlib.sha256(Path(self.tokenizer).read_bytes()).hexdigest())
        sources = self.sources + self.valid_sources
        stamp = hashlib.sha256(
            json.dumps([spec, [source.stamp() for source in sources]]).encode()
        ).hexdigest()
        return remember(stamp, lambda: self._read_digest(spec))

    def _read_digest(self, spec: list[Any]) -> str:
        total = hashlib.sha256(json.dumps(spec).encode())
        for source in self.sources + self.valid_sources:
            total.update(source.name.encode() + b"\0" + source.digest())
        return total.hexdigest()

    def _tokenizer_path(self) -> Path | None:
        return (
            None if self.tokenizer == "bytes" or self.tokenizer.startswith("bpe-") else Path(self.tokenizer)
        )

    def _write(self, folder: Path, digest: str) -> None:
        vocabulary = self._vocabulary()
        dtype = vocabulary.encode(b"").dtype
        separator = np.array([vocabulary.eos], dtype=dtype)
        counts = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
        files = {name: (folder / f"{name}.tokens").open("wb") for name in SPLITS}
        starts = {name: (folder / f"{name}.starts").open("wb") for name in SPLITS}
        for split, blocks in self._documents():
            file = files[split]
            starts[split].write(np.int64(file.tell() // dtype.itemsize).tobytes())
            file.write(separator.tobytes())
            for block in blocks:
                file.write(vocabulary.encode(block).tobytes())
                counts[split]["bytes"] += len(block)
            counts[split]["documents"] += 1
        for name in SPLITS:
            if counts[name]["documents"]:
                files[name].write(separator.tobytes())
        for file in (*files.values(), *starts.values()):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {"digest": digest, "dtype": dtype.name, "vocabulary": vocabulary.to_dict(), "splits": counts}
        write_whole(folder / "meta.json", json.dumps(meta).encode())

    def _vocabulary(self) -> Vocabulary:
        if self.tokenizer == "bytes":
            return Bytes()
        path = self._tokenizer_path()
        if path is not None:
            return read_tokenizer(path)
        texts = (
            block.decode("utf-8", errors="replace")
            for split, blocks in self._documents()
            if split == "train"
            for block in blocks
        )
        return train_bpe(texts, int(self.tokenizer.removeprefix("bpe-")))

    def _documents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Every document with its split; equal documents are on the same side."""
        if self.valid_sources:
            for split, sources in zip(SPLITS, (self.sources, self.valid_sources), strict=True):
                yield from ((split, blocks) for source in sources for blocks in source.documents())
            return
        first = list(itertools.islice(self._drawn(), _COUNTED))
        if len(first) < _FEW:
            yield from self._cut_documents()
            return
        threshold = self.valid_fraction * 2**64
        if len(first) < _COUNTED:
            held_out = max(1, round(self.valid_fraction * len(first)))
            threshold = sorted(lot for lot, _ in first)[held_out - 1] + 1
        del first
        yield from (("val" if lot < threshold else "train", blocks) for lot, blocks in self._drawn())

    def _drawn(self) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Every document with the 64-bit number that its content (of a long one, its first block) draws."""
        for source in self.sources:
            for blocks in source.documents():
                head = next(blocks, b"")
                lot = int.from_bytes(hashlib.blake2b(head, digest_size=8).digest(), "big")
                yield lot, itertools.chain([head], blocks)

    def _cut_documents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Every document twice: all but its last part, and its last part."""
        sizes = [sum(map(len, blocks)) for source in self.sources for blocks in source.documents()]
        cuts = [round(size * (1 - self.valid_fraction)) for size in sizes]
        for split in SPLITS:
            documents = (blocks for source in self.sources for blocks in source.documents())
            for cut, blocks in zip(cuts, documents, strict=True):
                yield split, _cut(blocks, cut, before=split == "train")


def _cut(blocks: Iterator[bytes], cut: int, *, before: bool) -> Iterator[bytes]:
    """The blocks of a document before or after a byte; a letter that spans it goes to the part before."""
    for block in blocks:
        at = min(max(cut, 0), len(block))
        while 0 < at < len(block) and block[at] & 0xC0 == 0x80:
            at += 1
        part = block[:at] if before else block[at:]
        if part:
            yield part
        cut -= len(block)
