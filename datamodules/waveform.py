"""Sound as numbers: how samples between -1 and 1 become codes of 8 bits, and codes samples.

On disk a sample is an integer of 16 bits, 32768 of which are 1. Models see codes: of the mu-law (ITU-T G.711 without
its segments, sign(x) log(1 + 255 |x|) / log 256 in even steps, as torchaudio has it), which are fine where sound is
soft; or linear ones in even steps; or, to classify, the samples themselves.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ENCODINGS = ("mu-law", "linear", "float")
LEVELS = 256
FULL_SCALE = 32768
MU = LEVELS - 1


class Waveform:
    """How sound is written as tokens: what a checkpoint keeps to read and write it.

    Raises:
        ValueError: for an encoding that there is not.
    """

    def __init__(self, encoding: str, sample_rate: int, classes: list[str] | None = None) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"data.encoding: must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
        self.encoding, self.sample_rate, self.classes = encoding, sample_rate, classes or []
        self.size = None if encoding == "float" else LEVELS
        every = np.arange(FULL_SCALE * 2, dtype=np.uint16).view(np.int16)
        # the code of each sample that can be on disk
        self._codes = self.encode(samples_of(every))
        self.silence = self.encode(0.0)[()]

    def encode(self, samples: ArrayLike) -> NDArray[Any]:
        """The codes (uint8, or float32 where there are none) of samples, what is beyond -1 or 1 clipped."""
        x = np.clip(np.asarray(samples, dtype=np.float32), -1, 1)
        if self.encoding == "mu-law":
            x = np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(np.float32(MU))
            return ((x + 1) / 2 * MU + np.float32(0.5)).astype(np.uint8)
        if self.encoding == "linear":
            return np.clip(np.rint(x * 128) + 128, 0, MU).astype(np.uint8)
        return x

    def decode(self, codes: ArrayLike) -> NDArray[np.float32]:
        """The samples (float32) that codes stand for."""
        if self.encoding == "mu-law":
            x = np.asarray(codes, dtype=np.float32) / MU * 2 - 1
            return np.sign(x) * np.expm1(np.abs(x) * np.log1p(np.float32(MU))) / MU
        if self.encoding == "linear":
            return (np.asarray(codes, dtype=np.float32) - np.float32(128)) / np.float32(128)
        return np.asarray(codes, dtype=np.float32)

    def read(self, stored: NDArray[np.int16]) -> NDArray[Any]:
        """The codes of samples as they are on disk, looked up."""
        return self._codes[stored.view(np.uint16)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `from_dict` rebuilds it."""
        return {
            "kind": "waveform",
            "encoding": self.encoding,
            "levels": self.size,
            "sample_rate": self.sample_rate,
            "classes": self.classes,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Waveform":
        """Rebuild it from what `to_dict` gave.

        Raises:
            ValueError: when the values are of another kind of vocabulary, or damaged.
        """
        if values.get("kind") != "waveform" or values.get("levels") not in (LEVELS, None):
            raise ValueError(
                f"a vocabulary of {values.get('kind')} with {values.get('levels')} levels is no sound"
            )
        encoding, rate, classes = (values.get(key) for key in ("encoding", "sample_rate", "classes"))
        if not isinstance(rate, int) or rate < 1 or not isinstance(classes or [], list):
            raise ValueError(
                f"a vocabulary of sound at {rate!r} samples a second, of {classes!r}, is damaged"
            )
        return cls(str(encoding), rate, classes)


def samples_of(stored: NDArray[np.int16]) -> NDArray[np.float32]:
    """Samples between -1 and 1 of what is on disk."""
    return stored.astype(np.float32) / np.float32(FULL_SCALE)


def stored(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """What samples are on disk; what is beyond -1 or 1 is clipped."""
    return np.clip(np.rint(samples * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
