"""One file of sound: read block by block, mixed to one channel, resampled; or told apart from what is none.

wav, flac, ogg and mp3 of any width, rate and number of channels are read by libsndfile. What a file says of itself is
not believed: a header that promises more samples than there are, or fewer, a stream without its end, a rate that no
microphone has, samples that are no numbers, far beyond full scale or cut off at it are refused.
"""

import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import nullcontext
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
# up to what share of a channel may lie in runs of three or more equal samples at full scale
_CUT_OFF = 0.1
# where full scale is, of what has less than 16 bits
_FULL_SCALE = {"PCM_U8": 127 / 128, "PCM_S8": 127 / 128, "ULAW": 32124 / 32768, "ALAW": 32256 / 32768}
# what programs that write to a pipe, where they cannot go back, say the length is
_UNKNOWN_LENGTH = 0x7FFF_0000
# bytes of the largest page of Ogg, and of the zeros that may fill a file up
_PAGE, _PADDING = 27 + 255 + 255 * 255, 1 << 16
# libsndfile's number for an mp3 file in which it finds nothing, which it says is no file
_NO_FRAME = 7


def read_sound(file: Path | IO[bytes], rate: int) -> Iterator[NDArray[np.float32]]:
    """The samples of a file at `rate` a second, the mean of its channels, in blocks (k,) of any size.

    Memory is taken for a few blocks, however long the file.

    Raises:
        ValueError: with what is wrong with the file, without its name.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
            _check_length(opened)
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


def _check_length(file: IO[bytes]) -> None:
    """Refuse what has not all that it should: libsndfile takes the length of WAV and Ogg from what is left of them."""
    kind = file.read(4)
    if kind == b"OggS":
        file.seek(max(0, file.seek(0, io.SEEK_END) - _PAGE))
        if not _ends(file.read()):
            raise ValueError("it is cut short: it has not the last page of its stream")
    elif kind in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        _check_data(file, file.seek(0, io.SEEK_END), ">" if kind == b"RIFX" else "<")
    file.seek(0)


def _ends(tail: bytes) -> bool:
    """Whether the end of an Ogg file is a whole page with the flag of the last one."""
    for found in re.finditer(b"OggS", tail):
        page = tail[found.start() :]
        # its size is that of the header, of a table of sizes, and their sum
        if len(page) > 26 and page[5] & 4 and 27 + page[26] + sum(page[27 : 27 + page[26]]) == len(page):
            return True
    return False


def _check_data(file: IO[bytes], end: int, order: str) -> None:
    """Compare what a WAV says of its data with what lies between their beginning and the end, or the next chunk."""
    at, name, size, long_size = 12, b"", 0, 0
    while name != b"data":
        file.seek(at)
        header = file.read(8)
        if not _is_chunk(header):
            return
        name, size = struct.unpack(order + "4sI", header)
        if name == b"ds64":
            # of a length that is too long for 32 bits, the second number is the data's
            long_size = int.from_bytes(file.read(16)[8:], "little")
        at += 8 + (size + size % 2) * (name != b"data")
    if size == 0xFFFF_FFFF and 0 < long_size < 1 << 63:
        size = long_size
    elif size >= _UNKNOWN_LENGTH:
        return
    rest = end - at - size
    if rest < 0:
        raise ValueError(f"it is cut short: {max(0, end - at)} of {size} bytes are there")
    if rest <= _MISSING * size:
        return
    file.seek(at + size)
    behind = file.read(_PADDING)
    # some programs forget the byte that makes a length even
    headers = [behind[skip : skip + 8] for skip in (0, size % 2)]
    known = any(_is_chunk(header) and struct.unpack(order + "I", header[4:])[0] < rest for header in headers)
    if not known and behind.strip(b"\0"):
        raise ValueError(
            f"it says that it has {size} bytes of sound, and {rest} more lie behind them; write it anew"
        )


def _is_chunk(header: bytes) -> bool:
    return len(header) == 8 and all(32 <= byte < 127 for byte in header[:4])


def _blocks(sound: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    """The mean of the channels, checked."""
    size = max(1, _BLOCK // sound.channels)
    frames = clipped = 0
    cut_off = np.zeros(sound.channels, dtype=np.int64)
    full_scale = _FULL_SCALE.get(sound.subtype, 32767 / 32768)
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
        # before they are mixed, since opposite channels cancel out
        loud = np.abs(block)
        clipped += int((loud > 1).any(axis=1).sum())
        cut_off += _count_runs(block, loud >= full_scale)
        yield mono
    if frames < (1 - _MISSING) * sound.frames:
        raise ValueError(f"it is cut short: {frames} of {sound.frames} samples are there")
    if clipped > _CLIPPED * frames:
        raise ValueError(f"{clipped} of {frames} samples are beyond full scale; samples go from -1 to 1")
    if (share := cut_off.max() / max(1, frames)) > _CUT_OFF:
        raise ValueError(
            f"{share:.0%} of its samples are cut off at full scale; record it, or convert it, at a lower level"
        )


def _count_runs(block: NDArray[np.float32], where: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many samples of each channel (k, channels) lie in runs of equal ones, of those that are asked for."""
    within = np.zeros_like(where)
    if where.any():
        same = where[1:] & (block[1:] == block[:-1])
        # of three that are equal, the last two are the same as those before them
        runs = same[1:] & same[:-1]
        for i in range(3):
            within[i : len(runs) + i] |= runs
    return within.sum(axis=0)


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    if getattr(error, "code", None) == _NO_FRAME:
        text = "it is damaged, or of another kind than its name says"
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
