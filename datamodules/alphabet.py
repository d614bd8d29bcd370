"""The alphabet of DNA: a token for each base, for each letter that stands for several, and three for no base.

Token ids: A 0, C 1, G 2, T 3, N 4, then R Y S W K M B D H V (IUPAC, Cornish-Bowden 1985), eos 15, mask 16, pad 17.
On disk a base is a byte: its token, and the highest bit where the file had a small letter (the soft mask of repeats).
Small letters are otherwise read as capitals, for where a genome is masked tells the species and the tool. U is
read as T.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

LETTERS = "ACGTNRYSWKMBDHV"
_OPPOSITE = "TGCANYRSWMKVHDB"
BASES = 4
N = LETTERS.index("N")
EOS, MASK, PAD = 15, 16, 17
SIZE = 18
IGNORE = -100
# of a byte on disk: the soft mask, and what no letter of DNA becomes
SOFT_BIT = 7
SOFT = 1 << SOFT_BIT
FOREIGN = 0xFF
# what a sequence may be broken by
BLANKS = b" \t\r\n"

# complement[token] is the token of the opposite strand: a permutation that is its own inverse
COMPLEMENT = [*(LETTERS.index(letter) for letter in _OPPOSITE), EOS, MASK, PAD]


def _table(entries: dict[int, int], default: int) -> bytes:
    return bytes(entries.get(byte, default) for byte in range(256))


_CAPITALS = {ord(letter): token for token, letter in enumerate(LETTERS)} | {ord("U"): LETTERS.index("T")}
_SMALL = {byte + 32: token | SOFT for byte, token in _CAPITALS.items()}
_STORED = range(SIZE)
# tables for bytes.translate, several times faster than indexing: of letters, and of bytes on disk
_FROM_LETTERS = _table(_CAPITALS | _SMALL, FOREIGN)
_TO_TARGETS = _table({t | soft: t for t in range(BASES) for soft in (0, SOFT)}, IGNORE & 0xFF)
_TO_OPPOSITE = _table({t | soft: COMPLEMENT[t] | soft for t in _STORED for soft in (0, SOFT)}, FOREIGN)
_TO_LETTERS = _table({t | soft: ord(letter) for t, letter in enumerate(LETTERS) for soft in (0, SOFT)}, 0)


def stored(letters: bytes) -> bytes:
    """A byte for each letter, blanks left out; what is no letter of DNA becomes FOREIGN."""
    return letters.translate(_FROM_LETTERS, BLANKS)


def tokens_of(sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The tokens of stored bytes (l,)."""
    return sequence & np.uint8(SOFT - 1)


def targets_of(sequence: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What stored bytes (l,) are as targets: A C G T, or -100 where the base is not known."""
    return np.frombuffer(sequence.tobytes().translate(_TO_TARGETS), dtype=np.int8)


def reverse_complement(sequence: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The other strand of stored bytes (l,), the soft mask kept."""
    return np.frombuffer(sequence.tobytes().translate(_TO_OPPOSITE), dtype=np.uint8)[::-1]


def letters_of(sequence: NDArray[np.uint8]) -> bytes:
    """The capitals of stored bytes."""
    return sequence.tobytes().translate(_TO_LETTERS)


class Nucleotides:
    """The alphabet as a vocabulary; see vocab.Vocabulary."""

    size = SIZE
    eos = EOS

    def encode(self, text: bytes) -> NDArray[Any]:
        """Tokens of letters, small or capital, blanks left out.

        Raises:
            ValueError: for what is no letter of DNA.
        """
        tokens = np.frombuffer(stored(text), dtype=np.uint8)
        if FOREIGN in tokens:
            letter = bytes(text.translate(None, BLANKS))[int(np.argmax(tokens == FOREIGN))]
            raise ValueError(f"{chr(letter)!r} is no base: write the letters {LETTERS}")
        return tokens_of(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(LETTERS[token] for token in tokens if token < len(LETTERS))

    def stream(self) -> "_LetterStream":
        return _LetterStream()

    def byte_lengths(self) -> NDArray[np.int64]:
        return (np.arange(SIZE) < len(LETTERS)).astype(np.int64)

    def names(self) -> list[bytes]:
        # the separator is written as vocab.EOS is
        return [*(letter.encode() for letter in LETTERS), b"<|eos|>", b"", b""]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "nucleotides"}


class _LetterStream:
    def push(self, token: int) -> str:
        return LETTERS[token] if token < len(LETTERS) else ""

    def flush(self) -> str:
        return ""
