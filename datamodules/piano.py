"""Scores played on a sampled piano: what real notes sound like, in time and in tune as no pianist plays.

Each key sounds as its recording, at its pitch, dying away as the SoundFont says; all notes are struck alike, at a
steady pace. So this is a rendering, more regular than any recording: a first step, and no benchmark.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .scores import Note, read_score
from .soundfont import Tone, read_instrument

# quarter notes a minute
TEMPO = 80
# of full scale, so that four voices stay below it
_GAIN = 0.3
# seconds that a key sounds on at most once it is let go
_TAIL = 1.0
_GRAND_PIANO = 0


@dataclass(frozen=True)
class Rendering:
    """A score that becomes a recording when it is read."""

    name: str
    score: Path
    soundfont: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return self.score, self.soundfont

    @property
    def size(self) -> int:
        return self.score.stat().st_size

    def blocks(self, rate: int) -> Iterator[NDArray[np.float32]]:
        yield render(read_score(self.score), _instrument(self.soundfont, rate), rate)


class Instrument:
    """The keys of an instrument at a sample rate, each made when it is first played and kept."""

    def __init__(self, tones: list[Tone], rate: int) -> None:
        self.tones, self.rate = tones, rate
        self._keys: dict[int, NDArray[np.float32]] = {}

    def play(self, key: int, seconds: float) -> NDArray[np.float32]:
        """A key struck, held for so long, and let go."""
        tone = self._tone(key)
        held = round(seconds * self.rate)
        tail = round(min(tone.release, _TAIL) * self.rate)
        sound = self._held(key, held + tail)[: held + tail].copy()
        # to an end without a step
        sound[held:] *= _fall(np.arange(tail) / self.rate, tone.release) * _ramp(tail)
        return sound

    def _tone(self, key: int) -> Tone:
        return min(self.tones, key=lambda t: max(t.keys[0] - key, key - t.keys[1], 0))

    def _held(self, key: int, count: int) -> NDArray[np.float32]:
        """A key that is held for `count` samples or longer."""
        if len(self._keys.get(key, ())) < count:
            # some longer, for the next one
            self._keys[key] = _sound(self._tone(key), key, 1 << (count - 1).bit_length(), self.rate)
        return self._keys[key]


def render(notes: list[Note], instrument: Instrument, rate: int, tempo: float = TEMPO) -> NDArray[np.float32]:
    """Play notes at `tempo` quarter notes a minute; return the samples."""
    beat = 60 / tempo
    end = max((note.end for note in notes), default=0.0) * beat
    out = np.zeros(round((end + _TAIL) * rate) + 1, dtype=np.float32)
    for note in notes:
        sound = instrument.play(note.key, (note.end - note.start) * beat)
        at = round(note.start * beat * rate)
        out[at : at + len(sound)] += _GAIN * sound[: len(out) - at]
    return out


def _sound(tone: Tone, key: int, count: int, rate: int) -> NDArray[np.float32]:
    """`count` samples at `rate` of a key that is held: the recording, looped, dying away, at another pitch."""
    # samples of the recording for one of ours: how much faster it is played, and how the rates differ
    step = 2 ** ((key - tone.root) / 12) * tone.rate / rate
    # some more than is needed, which fades away, since a spectrum joins the end to the start
    native = int(np.ceil(1.1 * count * step)) + 64
    places = np.arange(native)
    first, last = tone.loop
    places = np.where(places < last, places, first + (places - first) % (last - first))
    x = tone.samples[places] * _fall(np.maximum(0, np.arange(native) / (step * rate) - tone.hold), tone.decay)
    margin = native // 20
    x[-margin:] *= _ramp(margin)
    # resampled, and filtered as a Butterworth filter of second order does, by its spectrum
    size = round(native / step)
    spectrum = np.fft.rfft(x)[: size // 2 + 1]
    frequencies = np.arange(len(spectrum)) * rate / size
    spectrum *= 1 / np.sqrt(1 + (frequencies / tone.cutoff) ** 4)
    return (np.fft.irfft(spectrum, size)[:count] * (size / native)).astype(np.float32)


def _fall(seconds: NDArray[np.float64], decay: float) -> NDArray[np.float32]:
    """The envelope of what loses 100 dB in `decay` seconds."""
    return np.power(10.0, -5 * seconds / decay).astype(np.float32)


def _ramp(count: int) -> NDArray[np.float32]:
    return np.linspace(1, 0, count, dtype=np.float32)


@lru_cache(maxsize=1)
def _instrument(soundfont: Path, rate: int) -> Instrument:
    return Instrument(read_instrument(soundfont.read_bytes(), _GRAND_PIANO), rate)
