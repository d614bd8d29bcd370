"""Scripts that stand beside the measurements."""

import io
import os
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"

# how high the voices are
VOICES = {"awb": 120, "kal16": 105, "rms": 95}
# a voice of one tone within silence, as long as it is asked to be, that says nothing of the word
FLITE = """#!{python}
import sys, numpy as np, soundfile
_, _, voice, _, stretch, _, height, _, word, _, output = sys.argv
stretch = float(stretch.removeprefix("duration_stretch="))
with open("{asked}", "a") as file:
    print(voice, height.removeprefix("int_f0_target_mean="), word, file=file)
tone = 0.4 * np.sin(np.arange(int(8000 * stretch)) / 5)
soundfile.write(output, np.concatenate([np.zeros(4000), tone, np.zeros(4000)]), 16000)
"""


def test_synthetic_voices_take_turns_and_say_each_word_without_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flite = tmp_path / "flite"
    flite.write_text(FLITE.format(python=sys.executable, asked=tmp_path / "asked"))
    flite.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def spoken(name: str, seed: int) -> bytes:
        output = tmp_path / name
        arguments = [str(output), "yes", "no", "--number", "6", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", ["spoken_words.py", *arguments])
        runpy.run_path(str(SCRIPTS / "spoken_words.py"), run_name="__main__")
        return output.read_bytes()

    first = spoken("a.zip", 1)
    assert spoken("b.zip", 1) == first != spoken("c.zip", 2)
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        names = archive.namelist()
        clips = [soundfile.read(io.BytesIO(archive.read(name))) for name in names]
    voices = ["awb", "kal16", "rms"]
    assert names == [f"voices/{n % 2}_{voices[n // 2]}_{n}.flac" for n in range(6)]
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[0] for line in asked[:6]] == [voice for voice in voices for _ in range(2)]
    assert [line[2] for line in asked[:6]] == ["yes", "no"] * 3
    heights = [float(line[1]) / VOICES[line[0]] for line in asked]
    assert 0.75 < min(heights) < max(heights) < 1.3
    for sound, rate in clips:
        assert rate == 8000
        assert np.abs(sound).max() == round(0.9 * 32768) / 32768
        # half a second, 0.8 to 1.4 times as long, and 20 milliseconds before and after
        assert 0.8 * 4000 + 300 < len(sound) < 1.4 * 4000 + 340
    assert len({len(sound) for sound, _ in clips}) > 3
