"""Text: files, folders, globs or Hugging Face data sets to batches of next-token prediction."""

import logging
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import DataModule
from .baselines import markov_bits
from .corpus import Corpus, CorpusRecipe
from .documents import STDLIB, find_sources
from .packing import Windows, pack, stack
from .vocab import Bytes, read_tokenizer

# of the simple models to compare with: what they look back on, and the counts that they may take
MARKOV_ORDERS, MARKOV_TABLE = (0, 1, 2), 1 << 25

log = logging.getLogger(__name__)


class TextDataModule(DataModule):
    """Windows of text, tokenised once into memory-mapped files.

    Args:
        paths: files (.txt .py .md .jsonl, plain, .gz or .xz; a line of .jsonl is an object with a "text"), folders,
            globs, "stdlib" (the Python standard library's source), or, with the package datasets,
            "hf:NAME:CONFIG:SPLIT".
        valid_paths: what to hold out. Without it, `valid_fraction` of the documents is, drawn by their content, or
            the end of each where there are fewer than 20.
        tokenizer: "bytes"; "bpe-8192", to train a byte-level BPE of that size on the training split; or the path
            of a tokenizer.json.
        length: tokens a sample.
        packing: lay samples end to end and keep documents apart. Without it a row is a stretch of the corpus, and
            documents see each other across the separator.
        batch_size, num_workers, seed: see DataModule.
    """

    PROVIDES = ("vocab_size",)

    def __init__(
        self,
        paths: str | list[str] = STDLIB,
        valid_paths: str | list[str] | None = None,
        valid_fraction: float = 0.05,
        tokenizer: str = "bytes",
        length: int = 1024,
        batch_size: int = 8,
        packing: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not 0 < valid_fraction < 1:
            raise ValueError(f"data.valid_fraction: must be between 0 and 1, not {valid_fraction}")
        if length < 1:
            raise ValueError(f"data.length: must be 1 or more, not {length}")
        self.length, self.packing = length, packing
        sources, valid_sources = (
            find_sources([given] if isinstance(given, str) else given or [], f"data.{key}")
            for key, given in (("paths", paths), ("valid_paths", valid_paths))
        )
        if not sources:
            raise ValueError("data.paths: names nothing; give files, folders, globs or stdlib")
        self.recipe = CorpusRecipe(sources, valid_sources, valid_fraction, tokenizer)
        self.vocab_size = _vocab_size(tokenizer)
        self.corpus: Corpus | None = None

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        return None if self.corpus is None else self.corpus.vocabulary.to_dict()

    def describe(self) -> str:
        paths = [source.path for source in self.recipe.sources if source.path is not None]
        size = sum(path.stat().st_size for path in paths)
        files = f"{len(self.recipe.sources)} sources of {size / 1e6:.1f} MB"
        return f"{files}, {self.recipe.tokenizer}, batches of {self.batch_size} x {self.length} tokens"

    def prepare_data(self) -> None:
        self.recipe.build()

    def setup(self, stage: str) -> None:
        if self.corpus is not None:
            return
        self.corpus = corpus = self.recipe.open()
        self.fingerprint = corpus.digest
        for name, split in corpus.splits.items():
            log.info(
                "%s: %d documents, %d bytes, %d tokens, corpus %s",
                name, split.documents, split.bytes, len(split.tokens), corpus.digest[:16],
            )  # fmt: skip
        needed, found = self.length + 1, len(corpus.splits["train"].tokens)
        if not corpus.splits["train"].bytes:
            raise ValueError("data.paths: there is no text in the training split; is the corpus empty?")
        if found < needed:
            raise ValueError(
                f"data.length: {self.length} needs {needed} tokens and the training split has {found}: "
                "lower data.length or give more text"
            )
        if not corpus.splits["val"].bytes:
            raise ValueError("data.valid_fraction: nothing is held out; raise it or give data.valid_paths")
        self.samples = {
            "train": Windows(corpus.splits["train"], self.length, self.seed, shifted=True),
            "val": Windows(corpus.splits["val"], self.length, shifted=False),
        }
        self._byte_lengths = corpus.vocabulary.byte_lengths()

    def baselines(self) -> Iterator[tuple[str, float]]:
        assert self.corpus is not None
        symbols, held_out = self.vocab_size, self.corpus.splits["val"]
        train, tested = (self.corpus.splits[split].tokens.array for split in ("train", "val"))
        for order in MARKOV_ORDERS:
            if symbols ** (order + 1) <= MARKOV_TABLE:
                bits = markov_bits([train], [tested], symbols, order) * len(tested) / held_out.bytes
                yield f"Markov model of order {order}, bits per byte", bits
        if isinstance(self.corpus.vocabulary, Bytes):
            packed = len(zlib.compress(tested[tested != Bytes.eos].astype(np.uint8).tobytes(), level=9))
            yield "gzip of the held-out text, bits per byte", 8 * packed / held_out.bytes

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = pack(rows) if self.packing else stack(rows)
        targets = np.concatenate([row["tokens"][1:] for row in rows])
        batch["bytes"] = torch.tensor(self._byte_lengths[targets].sum())
        return batch


def _vocab_size(tokenizer: str) -> int:
    """How many tokens a tokenizer that is named in a recipe will have, before any text is read."""
    if tokenizer == "bytes":
        return Bytes.size
    if tokenizer.startswith("bpe"):
        match = re.fullmatch(r"bpe-(\d+)", tokenizer)
        if match is None or int(match[1]) < Bytes.size:
            raise ValueError(
                f"data.tokenizer: write bpe-8192 for a BPE of 8,192 tokens (257 or more), not {tokenizer!r}"
            )
        return int(match[1])
    from pathlib import Path

    return read_tokenizer(Path(tokenizer)).size
