"""Vocabularies: what turns text into token ids and back, and how many bytes of text a token stands for.

A vocabulary is rebuilt from plain values (`to_dict`), which checkpoints keep. Every document starts with the
separator, `eos`, which also ends the one before it: a model is told where text begins, and learns where it ends.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .alphabet import Nucleotides

EOS = "<|eos|>"


class Vocabulary(Protocol):
    """The face of a vocabulary."""

    size: int
    eos: int

    def encode(self, text: bytes) -> NDArray[Any]:
        """Token ids of UTF-8 text, in the smallest unsigned type that holds every id; no separator is added."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; the separator is none."""
        ...

    def stream(self) -> "Stream":
        """A decoder that is given a token at a time."""
        ...

    def byte_lengths(self) -> NDArray[np.int64]:
        """How many bytes of text each token stands for (size,)."""
        ...

    def names(self) -> list[bytes]:
        """What each token is, alike in every vocabulary: its text, EOS for the separator, or nothing."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class Stream(Protocol):
    """Decodes as tokens come: `push` returns the text that has become certain, `flush` the rest."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Bytes:
    """A token for each byte, and the separator: every file is text, and nothing is lost."""

    size = 257
    eos = 256

    def encode(self, text: bytes) -> NDArray[Any]:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token != self.eos).decode("utf-8", errors="replace")

    def stream(self) -> Stream:
        return _ByteStream()

    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.ones(self.size, dtype=np.int64)
        lengths[self.eos] = 0
        return lengths

    def names(self) -> list[bytes]:
        return [*(bytes([byte]) for byte in range(256)), EOS.encode()]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def as_subwords(self) -> "Subwords":
        """The same tokens in a tokenizer.json, for programs that know no other vocabulary."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
        tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([EOS])
        return Subwords(tokenizer.to_str())


class _ByteStream:
    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(b"" if token == Bytes.eos else bytes([token]))

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class Subwords:
    """The tokens of a tokenizer.json of the `tokenizers` library; `<|eos|>` or its like separates.

    Raises:
        ValueError: when the JSON is no tokenizer, or no token of it can separate documents.
    """

    # what tokenizers in the wild call the token between documents
    SEPARATORS = (EOS, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")

    def __init__(self, tokenizer_json: str, name: str = "the tokenizer") -> None:
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:
            raise ValueError(f"{name}: is not a tokenizer.json ({error})") from None
        # a separator that stands in a user's text is text
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        found = [self.tokenizer.token_to_id(token) for token in self.SEPARATORS]
        if not any(token is not None for token in found):
            raise ValueError(
                f"{name}: has no token to put between documents; it needs one of {', '.join(self.SEPARATORS)}"
            )
        self.eos = next(token for token in found if token is not None)
        self.dtype = np.uint16 if self.size <= 1 << 16 else np.uint32

    def encode(self, text: bytes) -> NDArray[Any]:
        encoded = self.tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(
            [token for token in tokens if token != self.eos], skip_special_tokens=False
        )

    def stream(self) -> Stream:
        return _SubwordStream(self)

    def byte_lengths(self) -> NDArray[np.int64]:
        pieces = [self.tokenizer.id_to_token(token) or "" for token in range(self.size)]
        special = {
            token for token, added in self.tokenizer.get_added_tokens_decoder().items() if added.special
        }
        byte_level = self._is_byte_level()
        lengths = [_piece_length(piece, byte_level) for piece in pieces]
        return np.array([0 if i in special else length for i, length in enumerate(lengths)], dtype=np.int64)

    def names(self) -> list[bytes]:
        pieces = [self.tokenizer.id_to_token(token) or "" for token in range(self.size)]
        if self._is_byte_level():
            byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
            named = [
                bytes(byte_of[letter] for letter in piece) if byte_of.keys() >= set(piece) else piece.encode()
                for piece in pieces
            ]
        else:
            # the mark of a space in sentence-piece vocabularies
            named = [piece.replace("\u2581", " ").encode() for piece in pieces]
        named[self.eos] = EOS.encode()
        return named

    def _is_byte_level(self) -> bool:
        """Whether a letter of a piece stands for a byte."""
        level = json.loads(self.tokenizer.to_str()).get("decoder") or {}
        return "ByteLevel" in {level.get("type"), *(part.get("type") for part in level.get("decoders", ()))}

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "subwords", "json": self.tokenizer.to_str()}


def _byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write for each byte: itself if it can be printed, else one past 255."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _piece_length(piece: str, byte_level: bool) -> int:
    """The bytes of text that a piece stands for: one a letter in byte-level vocabularies, else its UTF-8."""
    if byte_level:
        return len(piece)
    if piece.startswith("<0x") and piece.endswith(">"):
        return 1
    # the mark of a space in sentence-piece vocabularies, the mark of a continued word in WordPiece ones
    return len(piece.replace("\u2581", " ").removeprefix("##").encode())


class _SubwordStream:
    def __init__(self, vocabulary: Subwords) -> None:
        self.vocabulary = vocabulary
        self.tokens: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        self.tokens.append(token)
        text = self.vocabulary.decode(self.tokens)
        # a letter whose bytes are spread over tokens is not shown before it is whole
        if text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if len(self.tokens) > 64:
            # decode on from the last few tokens: what a token reads as depends on no more than those
            self.tokens = self.tokens[-16:]
            self.shown = self.vocabulary.decode(self.tokens)
        return new

    def flush(self) -> str:
        return self.vocabulary.decode(self.tokens)[len(self.shown) :]


def train_bpe(texts: Iterator[str], size: int) -> Subwords:
    """Train a byte-level BPE of `size` tokens (Sennrich et al., 1508.07909); the same texts give the same one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Subwords(tokenizer.to_str())


def vocabulary_from_dict(values: dict[str, Any]) -> Vocabulary:
    """Rebuild a vocabulary from what its `to_dict` gave."""
    if values.get("kind") == "bytes":
        return Bytes()
    if values.get("kind") == "subwords":
        return Subwords(values["json"])
    if values.get("kind") == "nucleotides":
        return Nucleotides()
    if values.get("kind") == "waveform":
        raise ValueError("these tokens are samples of sound and no text (see datamodules/waveform.py)")
    raise ValueError(
        f"no vocabulary is called {values.get('kind')!r}; this version knows bytes, subwords and nucleotides"
    )


def read_tokenizer(path: Path) -> Subwords:
    """Read a tokenizer.json.

    Raises:
        FileNotFoundError, ValueError: when there is no such file, or it is something else.
    """
    try:
        return Subwords(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.tokenizer: there is no file {path}; write bytes, bpe-8192, or a path"
        ) from None
