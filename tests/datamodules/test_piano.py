"""Scores on the sampled piano: notes are read right, in tune, on time, without clicks."""

import importlib.util
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mambazoo.datamodules import samples
from mambazoo.datamodules.piano import Instrument, Rendering, render
from mambazoo.datamodules.recordings import RecordingFiles, find_recordings
from mambazoo.datamodules.scores import Note, read_score
from mambazoo.datamodules.soundfont import Tone, read_instrument

RATE = 8000
TIE, TIED = '<tie type="start"/>', '<tie type="stop"/>'


def note(step: str, octave: int, duration: int, inside: str = "") -> str:
    pitch = f"<pitch><step>{step}</step><octave>{octave}</octave></pitch>"
    pitch = pitch.replace("#</step>", "</step><alter>1</alter>").replace(
        "b</step>", "</step><alter>-1</alter>"
    )
    return f"<note>{inside}{pitch}<duration>{duration}</duration></note>"


def score(path: Path, *parts: str) -> Path:
    body = "".join(f"<part>{part}</part>" for part in parts)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "META-INF/container.xml",
            '<container><rootfiles><rootfile full-path="s.xml"/></rootfiles></container>',
        )
        archive.writestr("s.xml", f"<score-partwise>{body}</score-partwise>")
    return path


def test_notes_are_read_from_a_score(tmp_path: Path) -> None:
    divisions = "<attributes><divisions>2</divisions></attributes>"
    soprano = (
        f"<measure>{divisions}{note('A', 4, 2)}{note('C#', 5, 1)}{note('B', 4, 1, '<chord/>')}"
        "<note><rest/><duration>2</duration></note><note><grace/><pitch><step>A</step><octave>7</octave></pitch></note>"
        f"{note('Bb', 3, 2, TIE)}</measure>"
        f"<measure>{note('Bb', 3, 4, TIED)}</measure>"
    )
    bass = (
        f"<measure>{divisions}{note('C', 2, 4)}<backup><duration>2</duration></backup>{note('G', 2, 2)}"
        f"<forward><duration>2</duration></forward>{note('C', 3, 2)}</measure>"
    )
    assert read_score(score(tmp_path / "a.mxl", soprano, bass)) == sorted(
        [
            Note(69, 0, 1), Note(73, 1, 1.5), Note(71, 1, 1.5), Note(58, 2.5, 5.5),
            Note(36, 0, 2), Note(43, 1, 2), Note(48, 3, 4),
        ]
    )  # fmt: skip
    (tmp_path / "b.mxl").write_text("a score")
    with pytest.raises(ValueError, match="no compressed MusicXML"):
        read_score(tmp_path / "b.mxl")


def chunk(name: str, content: bytes) -> bytes:
    return name.encode() + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def table(layout: str, *rows: tuple[object, ...]) -> bytes:
    return b"".join(struct.pack(layout, *row) for row in rows)


def test_an_instrument_is_read_from_a_soundfont() -> None:
    pcm = (np.arange(100) * 100).astype("<i2").tobytes()
    # a zone of the preset that only says how loud, then one that names the instrument
    generators = table("<Hh", (48, 5), (41, 0), (0, 0))
    zones = table(
        "<Hh", (48, 5), (43, 0x3C30), (58, 62), (52, -20), (8, 6900), (11, 3000), (36, 1200), (38, -1200), (53, 0),
        (43, 0x7F3D), (53, 1), (0, 0),
    )  # fmt: skip
    headers = [(b"x", 10, 60, 30, 50, 22050, 57, 10, 0, 1), (b"y", 60, 90, 62, 88, 11025, 72, 0, 0, 1)]
    presets = [(b"other", 5, 0, 0, 0, 0, 0), (b"piano", 0, 0, 0, 0, 0, 0), (b"EOP", 0, 0, 2, 0, 0, 0)]
    parts = {
        "phdr": table("<20sHHHIII", *presets), "pbag": table("<HH", (0, 0), (1, 0), (2, 0)), "pgen": generators,
        "inst": table("<20sH", (b"piano", 0), (b"EOI", 3)), "ibag": table("<HH", (0, 0), (1, 0), (9, 0), (11, 0)),
        "igen": zones, "shdr": table("<20sIIIIIBbHH", *headers),
    }  # fmt: skip
    inside = chunk("LIST", b"sdta" + chunk("smpl", pcm))
    inside += chunk("LIST", b"pdta" + b"".join(chunk(name, content) for name, content in parts.items()))
    low, high = read_instrument(b"RIFF" + struct.pack("<I", 4 + len(inside)) + b"sfbk" + inside, 0)
    assert (low.keys, high.keys) == ((48, 60), (61, 127))
    # 62, out of tune by 20 cents in the instrument and by 10 in the recording
    assert low.root == pytest.approx(62.1)
    assert (low.rate, low.loop, low.decay, low.release) == (22050, (20, 40), 2.0, 0.5)
    assert low.cutoff == pytest.approx(8.176 * 2**8.25)
    assert np.array_equal(low.samples, np.arange(10, 60) * np.float32(100 / 32768))
    assert (high.root, high.rate, high.loop) == (72, 11025, (2, 28))


def instrument(rate: int = RATE, frequency: float = 440.0) -> Instrument:
    """One tone of a second for all keys: a sine that is the A of key 69."""
    count = 22050
    wave = (0.5 * np.sin(2 * np.pi * frequency * np.arange(count) / 22050)).astype(np.float32)
    # 441 whole periods fit into 22,050 samples at 441 Hz, so the loop has no seam
    return Instrument([Tone((0, 127), 69.0, 22050, wave, (0, 22050), 20_000.0, 0.5, 20.0, 1.0)], rate)


def pitch(sound: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 19))
    return float(spectrum.argmax()) * rate / (1 << 19)


@pytest.mark.parametrize("rate", [8000, 16000])
@pytest.mark.parametrize("key", [36, 57, 69, 80])
def test_a_key_sounds_at_its_pitch(key: int, rate: int) -> None:
    sound = instrument(rate).play(key, 2.0)
    expected = 440 * 2 ** ((key - 69) / 12)
    # of a cent there are 1200 in an octave
    assert abs(1200 * np.log2(pitch(sound[: 2 * rate], rate) / expected)) < 2
    assert np.abs(sound[: rate // 4]).max() == pytest.approx(0.5, rel=0.05)
    # held, it dies away; let go, at once, and ends in silence
    assert len(sound) == 3 * rate
    levels = [np.abs(sound[int(t * rate) : int((t + 0.1) * rate)]).max() for t in (0.3, 1.7, 2.3)]
    assert levels[0] > levels[1] > 2 * levels[2]
    assert abs(float(sound[-1])) < 1e-6


def test_what_is_above_half_the_rate_is_silent() -> None:
    # key 120 would be at 8.4 kHz
    assert np.abs(instrument().play(120, 0.1)[50:]).max() < 0.01


def test_a_score_is_played_on_time() -> None:
    music = render([Note(69, 0, 1), Note(57, 2, 4)], instrument(), RATE, tempo=120)
    # two seconds, and what the last note takes to fade
    assert len(music) == 3 * RATE + 1
    assert pitch(music[: RATE // 2], RATE) == pytest.approx(440, rel=0.01)
    assert pitch(music[RATE : 2 * RATE], RATE) == pytest.approx(220, rel=0.01)
    before, after = np.abs(music[RATE - 200 : RATE - 8]).max(), np.abs(music[RATE : RATE + 200]).max()
    assert after > 3 * before
    assert len(render([], instrument(), RATE)) == RATE + 1


@pytest.fixture
def packages() -> None:
    for package in ("music21", "pretty_midi"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} of the extra samples")


def test_the_piano_is_in_tune(packages: None) -> None:
    piano = samples.find_chorales("sample:bach-piano")[0].soundfont.read_bytes()
    keys = Instrument(read_instrument(piano, 0), 16000)
    for key in range(36, 89, 13):
        sound, expected = keys.play(key, 2.0)[1600:32000], 440 * 2 ** ((key - 69) / 12)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 18))
        frequencies = np.arange(len(spectrum)) * 16000 / (1 << 18)
        near = np.abs(np.log2(np.maximum(frequencies, 1) / expected)) < 1 / 12
        found = frequencies[near][spectrum[near].argmax()]
        # pianos are tuned a little wide
        assert abs(1200 * np.log2(found / expected)) < 8


def test_chorales_are_recordings(packages: None) -> None:
    sources = find_recordings(["sample:bach-piano"])
    assert [source.name for source in sources] == [f"bwv{number}" for number in range(253, 277)]
    files = RecordingFiles(sources[:2], RATE)
    files.build()
    music = files.open()
    assert music.names == ["bwv253", "bwv254"]
    # 40 and 44 quarter notes at 80 a minute, and a second to fade
    assert np.diff(music.starts).tolist() == [31 * RATE + 1, 34 * RATE + 1]
    for start, end in zip(music.starts, music.starts[1:], strict=False):
        x = music.samples.array[start:end] / 32768
        assert 0.4 < np.abs(x).max() < 0.95
        # a click is a change beyond all others round it
        change = np.abs(np.diff(x, 4))
        around = np.sqrt(np.convolve(change**2, np.ones(256) / 256, "same")) + 1e-4
        assert (change / around).max() < 8


def test_samples_that_cannot_be_had_are_named(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="there is no sample:bach; choose from sample:bach-piano, sample:bach"
    ):
        find_recordings(["sample:bach"])
    monkeypatch.setitem(samples._CHORALES, "changed", (range(253, 254), "0"))
    with pytest.raises(ValueError, match=r"does not have the changed that is known.*of music21"):
        find_recordings(["sample:changed"])
    monkeypatch.setattr(samples, "_PIANO", ("no_such_package", "x.sf2", ""))
    with pytest.raises(FileNotFoundError, match=r"pip install \"mambazoo\[samples\]\""):
        find_recordings(["sample:bach-piano"])


def test_a_score_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mxl").write_text("a score")
    with pytest.raises(ValueError, match="no compressed MusicXML"):
        list(Rendering("a", tmp_path / "a.mxl", tmp_path / "none.sf2").blocks(RATE))
