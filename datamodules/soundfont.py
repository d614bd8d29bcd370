"""The recorded notes of one instrument in a SoundFont, a file of samples and how to play them.

Of the SoundFont Technical Specification 2.01 that is read which a note needs: which recording a key is played from, its
pitch, its loop, how it dies away, and how bright it is. Instruments may have one layer, and no sample of two channels.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .waveform import samples_of

# of section 7: the tables of a preset, from names down to samples, and how their entries are laid out
_TABLES = {
    "phdr": "<20sHHHIII",
    "pbag": "<HH",
    "pgen": "<Hh",
    "inst": "<20sH",
    "ibag": "<HH",
    "igen": "<Hh",
    "shdr": "<20sIIIIIBbHH",
}
# generators of section 8.1.2
_CUTOFF, _BRIGHTENING, _HOLD, _DECAY, _RELEASE = 8, 11, 35, 36, 38
_INSTRUMENT, _KEYS, _FINE, _SAMPLE, _ROOT = 41, 43, 52, 53, 58


@dataclass(frozen=True)
class Tone:
    """A recording of a key, and how it is played.

    Args:
        root: the key that the recording sounds, in semitones of MIDI with the fraction it is out of tune.
        loop: from which to which sample it repeats while the key is held.
        cutoff: in Hz, where its low-pass filter begins.
        hold, decay, release: seconds before it dies away, for it to lose 100 dB, and to do so once the key is let go.
    """

    keys: tuple[int, int]
    root: float
    rate: int
    samples: NDArray[np.float32]
    loop: tuple[int, int]
    cutoff: float
    hold: float
    decay: float
    release: float


def read_instrument(content: bytes, program: int) -> list[Tone]:
    """The tones of the instrument of a program number in bank 0, by key."""
    chunks = _chunks(content, 12, len(content))
    tables: dict[str, list[Any]] = {
        name: list(struct.iter_unpack(layout, chunks[name])) for name, layout in _TABLES.items()
    }
    pcm = np.frombuffer(chunks["smpl"], dtype="<i2")
    headers = tables["phdr"]
    at = next(i for i, header in enumerate(headers) if header[1:3] == (program, 0))
    tones = []
    for zone in _zones(tables, "pbag", "pgen", headers[at][3], headers[at + 1][3]):
        if _INSTRUMENT not in zone:
            continue
        first, last = (tables["inst"][zone[_INSTRUMENT] + i][1] for i in range(2))
        for values in _zones(tables, "ibag", "igen", first, last):
            if _SAMPLE in values:
                tones.append(_tone(values, tables["shdr"][values[_SAMPLE]], pcm))
    return sorted(tones, key=lambda tone: tone.keys)


def _chunks(content: bytes, start: int, end: int) -> dict[str, bytes]:
    """The chunks of a RIFF file, those of its lists among them."""
    found: dict[str, bytes] = {}
    while start + 8 <= end:
        name, size = (
            content[start : start + 4].decode("latin-1"),
            *struct.unpack_from("<I", content, start + 4),
        )
        if name == "LIST":
            found |= _chunks(content, start + 12, start + 8 + size)
        else:
            found[name] = content[start + 8 : start + 8 + size]
        start += 8 + size + size % 2
    return found


def _zones(
    tables: dict[str, list[Any]], bags: str, generators: str, first: int, last: int
) -> list[dict[int, int]]:
    """The generators of each zone, by number."""
    bounds = [tables[bags][i][0] for i in range(first, last + 1)]
    return [dict(tables[generators][a:b]) for a, b in pairwise(bounds)]


def _tone(values: dict[int, int], sample: tuple[int, ...], pcm: NDArray[np.int16]) -> Tone:
    _, start, end, loop_start, loop_end, rate, pitch, correction, _, _ = sample
    root = values.get(_ROOT, -1)
    tuning = values.get(_FINE, 0) + correction
    keys = values.get(_KEYS, 0x7F00) & 0xFFFF
    return Tone(
        keys=(keys & 0xFF, keys >> 8),
        root=(root if root >= 0 else pitch) - tuning / 100,
        rate=rate,
        samples=samples_of(pcm[start:end]),
        loop=(loop_start - start, loop_end - start),
        # absolute cents, of which 0 is 8.176 Hz; the envelope that brightens a tone is open all the time it sounds
        cutoff=8.176 * 2 ** ((values.get(_CUTOFF, 13500) + values.get(_BRIGHTENING, 0)) / 1200),
        hold=_seconds(values.get(_HOLD, -12000)),
        decay=_seconds(values.get(_DECAY, -12000)),
        release=_seconds(values.get(_RELEASE, -12000)),
    )


def _seconds(timecents: int) -> float:
    return 2 ** (timecents / 1200)
