"""Clips of sound varied by lot, so that a classifier hears more voices, rooms and microphones than there are."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# of the signal-to-noise ratios that are drawn, how many decibels the highest is above the lowest
_NOISE_RANGE = 30
# between so many points, evenly spaced in pitch over six octaves, the gain of an equaliser is drawn
_BANDS = 7


@dataclass(frozen=True)
class Augmentation:
    """What is done to a clip, in this order; 0 and None do nothing.

    Args:
        speed: play it faster or slower by up to this factor less 1, pitch and all, as 0.15.
        equalise: raise or lower each octave by up to so many decibels, as 6.
        noise: add noise between white and brown, so many decibels or up to 30 more below the clip, as 10.
        gain: make it louder or softer by up to so many decibels, as 6.
        polarity: turn every other clip upside down.
    """

    speed: float = 0.0
    equalise: float = 0.0
    noise: float | None = None
    gain: float = 0.0
    polarity: bool = False

    def __post_init__(self) -> None:
        for key in ("speed", "equalise", "gain"):
            if not 0 <= getattr(self, key) < 100:
                raise ValueError(f"data.{key}: must be 0 or more, not {getattr(self, key)}")
        if self.speed > 1:
            raise ValueError(f"data.speed: must be 1 at most, twice as fast or slow, not {self.speed}")

    def __bool__(self) -> bool:
        return self != Augmentation()

    def span(self, length: int) -> int:
        """How many samples must be read for `length` to be left."""
        return int(np.ceil(length * (1 + self.speed)))

    def __call__(self, x: NDArray[np.float32], rate: int, lots: np.random.Generator) -> NDArray[np.float32]:
        """A clip (k,) at a rate, as `lots` has it; of another length where its speed changes."""
        if self.speed or self.equalise:
            x = self._filtered(x, rate, lots)
        if self.noise is not None:
            level = _level(x, -lots.uniform(self.noise, self.noise + _NOISE_RANGE))
            x = x + level * _noise(len(x), lots)
        gain = 10 ** (lots.uniform(-self.gain, self.gain) / 20)
        if self.polarity and lots.random() < 0.5:
            gain = -gain
        return x * np.float32(gain)

    def _filtered(self, x: NDArray[np.float32], rate: int, lots: np.random.Generator) -> NDArray[np.float32]:
        """Equalised, and resampled without aliases, by the spectrum."""
        spectrum = np.fft.rfft(x)
        octaves = np.log2(np.linspace(1e-9, rate / 2, len(spectrum)) / (rate / 2))
        points = np.linspace(-_BANDS + 1, 0, _BANDS)
        decibels = lots.uniform(-self.equalise, self.equalise, _BANDS)
        spectrum *= 10 ** (np.interp(octaves, points, decibels) / 20)
        speed = (1 + self.speed) ** lots.uniform(-1, 1)
        size = max(1, round(len(x) / speed))
        return (np.fft.irfft(spectrum, size) * (size / len(x))).astype(np.float32)


def _noise(count: int, lots: np.random.Generator) -> NDArray[np.float32]:
    """Noise of power 1 whose spectrum falls by 0 to 6 dB an octave."""
    bins = count // 2 + 1
    spectrum = lots.standard_normal((bins, 2)) @ np.array([1, 1j])
    spectrum *= np.maximum(1, np.arange(bins)) ** -lots.uniform(0, 1)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, count)
    return (noise / max(1e-9, float(np.sqrt((noise**2).mean())))).astype(np.float32)


def _level(x: NDArray[np.float32], decibels: float) -> np.float32:
    """The level that is so many decibels above that of a clip."""
    return np.float32(np.sqrt((x**2).mean()) * 10 ** (decibels / 20))
