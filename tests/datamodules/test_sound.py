"""Files of sound: what is read of them, at which rate, in how much memory, and which are refused."""

import io
import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambazoo.datamodules import sound
from mambazoo.datamodules.sound import Resampler, read_sound
from numpy.typing import NDArray
from torchaudio.functional import resample

# of files with damaged headers, how many are read: ten seconds' worth
DAMAGED = int(os.environ.get("MAMBAZOO_FUZZ", "10000"))
KINDS = [
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("MP3", "MPEG_LAYER_III"),
]


def draw(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def tone(count: int, rate: int = 16000) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)).astype(np.float32)


def file_of(
    samples: NDArray[np.float32], rate: int = 16000, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def read(content: bytes, rate: int = 16000) -> NDArray[np.float32]:
    return np.concatenate(list(read_sound(io.BytesIO(content), rate)))


@pytest.mark.parametrize(("kind", "subtype"), KINDS, ids=[subtype for _, subtype in KINDS])
def test_every_kind_of_file_is_read(kind: str, subtype: str) -> None:
    samples = tone(16000)
    found = read(file_of(samples, kind=kind, subtype=subtype))
    assert found.dtype == np.float32
    assert len(found) == len(samples)
    error = np.abs(found[2000:-2000] - samples[2000:-2000]).max()
    assert error < {"PCM_U8": 0.01, "VORBIS": 0.05, "MPEG_LAYER_III": 0.05}.get(subtype, 1e-4)


def test_channels_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, path = draw(5000, 9), tmp_path / "a.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    for block in (7, 1 << 18):
        monkeypatch.setattr(sound, "_BLOCK", block)
        found = np.concatenate(list(read_sound(path, 16000)))
        assert np.allclose(found, samples.mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(44100, 16000), (8000, 16000), (16000, 8000), (11025, 16000), (384_000, 8000), (1000, 16000)],
)
def test_a_stream_is_resampled_as_the_whole(given: int, wanted: int) -> None:
    lot = random.Random(0)
    for count in (1, 7, 20_011):
        samples, resampler, found, at = draw(count), Resampler(given, wanted), [], 0
        while at < count:
            size = lot.randint(1, 5000)
            found += resampler.push(samples[at : at + size])
            at += size
        expected = resample(torch.from_numpy(samples), given, wanted).numpy()
        got = np.concatenate([*found, *resampler.finish()])
        assert len(got) == len(expected)
        assert np.abs(got - expected).max() < 2e-5


def test_a_long_file_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(4_000_000, dtype=np.int16), 44100)
    tracemalloc.start()
    count = sum(len(block) for block in read_sound(path, 16000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == -(-4_000_000 * 160 // 441)
    # a block is a megabyte, and the file 16 of them
    assert peak < 8_000_000


def _header(content: bytes, layout: str, at: int, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


def clipped(count: int = 16000) -> NDArray[np.float32]:
    """A tone 20 decibels too loud, cut off."""
    return np.clip(20 * tone(count), -1, 1)


WAV, FLAC, MP3, RF64 = (file_of(tone(16000), kind=kind) for kind in ("WAV", "FLAC", "MP3", "RF64"))
VORBIS, OPUS = (file_of(draw(64000), kind="OGG", subtype=subtype) for subtype in ("VORBIS", "OPUS"))
HOLED = draw(1000)
HOLED[500] = np.nan
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is no sound that can be read"),
    "text": (b"hello\n" * 100, "it is no sound that can be read"),
    "no samples": (file_of(tone(0)), "there is no sample in it"),
    "header alone": (WAV[:44], "there is no sample in it|it is cut short|no sound that can be read"),
    "half a wav": (WAV[:16000], "it is cut short: 15956 of 32000 bytes are there"),
    "half a flac": (FLAC[: len(FLAC) // 2], r"no sound that can be read \(.*lost sync"),
    "half an mp3": (MP3[: len(MP3) // 2], r"it is cut short: \d+ of 16000 samples are there"),
    "half a vorbis": (VORBIS[: len(VORBIS) // 2], "it is cut short: it has not the last page"),
    "half an opus": (OPUS[: len(OPUS) // 2], "it is cut short: it has not the last page"),
    "an opus without its last page": (
        OPUS[: OPUS.rindex(b"OggS")],
        "it is cut short: it has not the last page",
    ),
    "an opus without its last byte": (OPUS[:-1], "it is cut short: it has not the last page"),
    "half an rf64": (RF64[: len(RF64) // 2], r"it is cut short: 1\d+ of 32000 bytes are there"),
    "too short a length": (
        _header(WAV, "<I", 40, 1000),
        "says that it has 1000 bytes of sound, and 31000 more lie behind them",
    ),
    "too short a length of an rf64": (
        _header(RF64, "<Q", 28, 1000),
        "says that it has 1000 bytes of sound, and 31000 more lie behind them",
    ),
    "a length that lies": (_header(WAV, "<I", 40, 1 << 20), "it is cut short: 32000 of 1048576"),
    "no channel": (_header(WAV, "<H", 22, 0), "no sound that can be read"),
    "no rate": (_header(WAV, "<I", 24, 0), "no sound that can be read"),
    "1 Hz": (file_of(tone(1000), 1), "it says that it has 1 samples a second"),
    "2 GHz": (_header(WAV, "<I", 24, 2_000_000_000), "it says that it has 2000000000 samples a second"),
    "a prime rate": (file_of(tone(1000), 44_101), "44101 samples a second cannot be made 16000"),
    "not a number": (file_of(HOLED, subtype="FLOAT"), "samples in it that are no numbers"),
    "integers as floats": (
        file_of(tone(1000) * 32768, subtype="FLOAT"),
        r"\d+ of 1000 samples are beyond full scale",
    ),
    "channels that cancel out": (
        file_of(np.stack([4 * tone(1000), -4 * tone(1000)], 1), subtype="FLOAT"),
        r"\d+ of 1000 samples are beyond full scale",
    ),
    **{
        f"cut off at full scale, {subtype}": (
            file_of(clipped(), subtype=subtype),
            "94% of its samples are cut off at full scale; record it, or convert it, at a lower level",
        )
        for subtype in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT", "ULAW", "ALAW")
    },
    "one channel cut off": (
        file_of(np.stack([tone(1000), clipped(1000)], 1)),
        "94% of its samples are cut off",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_sound_is_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        read(content)
    assert "\n" not in str(caught.value)


def test_what_is_odd_is_read() -> None:
    # written to a pipe, whose end nobody knew
    assert len(read(_header(WAV, "<I", 40, 0xFFFF_FFFF))) == 16000
    # what other programs lay behind the sound
    for behind in (b"LIST\4\0\0\0abcd" * 200, bytes(9000), b"\1\2\3 and a line that is no chunk"):
        assert len(read(WAV + behind)) == 16000
    odd = file_of(tone(15999), subtype="PCM_U8")[: 44 + 15999]
    for pad in (b"", b"\0"):
        assert len(read(odd + pad + b"LIST\xe8\3\0\0" + bytes(1000))) == 15999
    # a few samples that go too far
    loud = tone(1000)
    loud[:5] = 1.5
    assert read(file_of(loud, subtype="FLOAT")).max() == 1.5
    # full scale that is reached and not stayed at, and a tenth of the time stayed at
    assert len(read(file_of(2 * tone(16000), subtype="PCM_16"))) == 16000
    assert len(read(file_of(np.concatenate([tone(15000), clipped(1000)])))) == 16000
    assert len(read(file_of(tone(384_000, 384_000), 384_000), 8000)) == 8000


@pytest.mark.parametrize("content", [b"", b"hello\n" * 100, bytes(3000), MP3[:100]], ids=len)
def test_an_mp3_without_sound_is_called_damaged(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp3").write_bytes(content)
    with pytest.raises(ValueError, match=r"no sound that can be read \(it is damaged, or of another kind"):
        list(read_sound(tmp_path / "a.mp3", 16000))


def damage(content: bytes, lot: random.Random) -> bytes:
    """Change a file in one to three places of its first bytes, where what it says of itself is, or cut it."""
    changed = bytearray(content)
    for _ in range(lot.randint(1, 3)):
        at, kind = lot.randrange(min(len(changed), 128) or 1), lot.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([lot.randrange(256)])
        elif kind == 1:
            changed[at : at + 4] = struct.pack("<I", lot.choice([0, 1, 7, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 16]))
        elif kind == 2:
            del changed[at : at + lot.randint(1, 8)]
        elif kind == 3:
            changed[at:at] = bytes(lot.randrange(256) for _ in range(lot.randint(1, 8)))
        elif kind == 4:
            changed[at : at + 2] = bytes([lot.choice([0, 1, 255]), 0])
        else:
            del changed[lot.randrange(len(changed) + 1) :]
    return bytes(changed)


def test_damaged_headers_are_read_or_refused(capfd: pytest.CaptureFixture[str]) -> None:
    files = [file_of(tone(4000), kind=kind, subtype=subtype) for kind, subtype in KINDS]
    lot, refused = random.Random(0), 0
    for i in range(DAMAGED):
        content = damage(files[i % len(files)], lot)
        try:
            blocks = list(read_sound(io.BytesIO(content), 8000))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert all(np.isfinite(block).all() for block in blocks)
            # no more than the bytes can stand for, at the lowest rate there is
            assert sum(map(len, blocks)) < 8 * 8 * (len(content) + 1152)
    assert DAMAGED / 5 < refused < DAMAGED
