"""One file of sound: read block by block, mixed to one channel, resampled; or told apart from what is none.

wav, flac, ogg and mp3 of any width, rate and number of channels are read by libsndfile. What a file says of itself is
not believed: a header that promises more samples than there are, a rate that no microphone has, samples that are no
numbers or far beyond full scale are refused.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# samples a second that sound is recorded with
RATES = (1000, 768_000)
# samples, of all channels together, that are read at once
_BLOCK = 1 << 18
# coefficients of a resampling filter: rates whose ratio needs more have no small common divisor
_LARGEST_FILTER = 1 << 24
# up to what share of samples may lie beyond full scale and be clipped, and be missing at the end
_CLIPPED, _MISSING = 0.01, 0.01
# what programs that write to a pipe, where they cannot go back, say the length is
_UNKNOWN_LENGTH = 0x7FFF_0000


def read_sound(file: Path | IO[bytes], rate: int) -> Iterator[NDArray[np.float32]]:
    """The samples of a file at `rate` a second, the mean of its channels, in blocks (k,) of any size.

    Memory is taken for a few blocks, however long the file.

    Raises:
        ValueError: with what is wrong with the file, without its name.
    """
    try:
        sound = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(_reason(error)) from None
    with sound:
        _check_header(sound, rate)
        resampler = Resampler(sound.samplerate, rate)
        for block in _blocks(sound):
            yield from resampler.push(block)
        yield from resampler.finish()


def _check_header(sound: soundfile.SoundFile, rate: int) -> None:
    if not RATES[0] <= sound.samplerate <= RATES[1]:
        raise ValueError(f"it says that it has {sound.samplerate} samples a second")
    if sound.frames <= 0:
        raise ValueError("there is no sample in it")
    if _filter_size(sound.samplerate, rate) > _LARGEST_FILTER:
        raise ValueError(f"{sound.samplerate} samples a second cannot be made {rate}; resample it to another")
    # of WAV, libsndfile believes the file's size and only remarks on the header's
    said = re.search(r"^data : (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if said and int(said[2]) < int(said[1]) < _UNKNOWN_LENGTH:
        raise ValueError(f"it is cut short: {said[2]} of {said[1]} bytes are there")


def _blocks(sound: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    """The mean of the channels, checked."""
    size = max(1, _BLOCK // sound.channels)
    frames = clipped = 0
    while True:
        try:
            block = sound.read(size, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError) as error:
            raise ValueError(_reason(error)) from None
        if not len(block):
            break
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise ValueError("there are samples in it that are no numbers")
        frames += len(mono)
        clipped += int((np.abs(mono) > 1).sum())
        yield mono
    if frames < (1 - _MISSING) * sound.frames:
        raise ValueError(f"it is cut short: {frames} of {sound.frames} samples are there")
    if clipped > _CLIPPED * frames:
        raise ValueError(f"{clipped} of {frames} samples are beyond full scale; samples go from -1 to 1")


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or str(error)
    return "it is no sound that can be read (" + text.strip().rstrip(".") + ")"


class Resampler:
    """Band-limited resampling of a stream, with torchaudio's filter; block by block it gives what the whole would."""

    def __init__(self, given: int, wanted: int) -> None:
        divisor = math.gcd(given, wanted)
        # every `given` samples become `wanted`
        self.given, self.wanted = given // divisor, wanted // divisor
        # what the filter sees on either side, in whole groups of `given`
        self.groups = _half_width(self.given, self.wanted) // self.given + 1
        self.held = np.zeros(self.groups * self.given, dtype=np.float32)
        self.read = self.written = 0

    def push(self, block: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """What is certain once `block` (k,) is known."""
        self.read += len(block)
        if self.given == self.wanted:
            yield block
            return
        held = np.concatenate([self.held, block])
        ready = len(held) // self.given - 2 * self.groups
        if ready > 0:
            yield self._resample(held[: (ready + 2 * self.groups) * self.given])
            held = held[ready * self.given :]
        self.held = held

    def finish(self) -> Iterator[NDArray[np.float32]]:
        """The rest."""
        total = -(-self.read * self.wanted // self.given)
        if self.given != self.wanted and self.written < total:
            short = -(-(total - self.written) // self.wanted) + 2 * self.groups
            padded = np.zeros(short * self.given, dtype=np.float32)
            padded[: len(self.held)] = self.held[: len(padded)]
            rest = total - self.written
            yield self._resample(padded)[:rest]

    def _resample(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        y = _filter(self.given, self.wanted)(torch.from_numpy(x)).numpy()
        inside = y[self.groups * self.wanted : len(y) - self.groups * self.wanted]
        self.written += len(inside)
        return inside


def _half_width(given: int, wanted: int) -> int:
    """How many samples torchaudio's filter sees on either side: 6 zero crossings at 0.99 of the lower Nyquist rate."""
    return math.ceil(6 * given / (0.99 * min(given, wanted)))


def _filter_size(given: int, wanted: int) -> int:
    divisor = math.gcd(given, wanted)
    given, wanted = given // divisor, wanted // divisor
    return 0 if given == wanted else wanted * (2 * _half_width(given, wanted) + given)


@lru_cache(maxsize=4)
def _filter(given: int, wanted: int) -> Any:
    from torchaudio.transforms import Resample

    return Resample(given, wanted)
