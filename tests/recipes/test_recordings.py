"""Writing sound: files to listen to, classes, prompts, pictures."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from mambazoo.checkpoints.io import save_pretrained
from mambazoo.datamodules.waveform import Waveform
from mambazoo.recipes.recordings import draw, spectrogram
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.language import LanguageModel
from matplotlib.backends.backend_agg import FigureCanvasAgg

from .command import call

RATE = 8000
UNET: dict[str, Any] = {"d_model": 8, "n_layers": 1, "pool": [2, 3], "pattern": "s4d", "s4d": {"d_state": 4}}


def keep(folder: Path, num_classes: int | None = None) -> Path:
    """An untrained model on disk that is sure of what it says, as one that is trained is."""
    torch.manual_seed(0)
    model = WaveformModel(UNET, num_classes=num_classes)
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.head.weight)
    classes = ["one", "two"][:num_classes] if num_classes else None
    save_pretrained(model, Waveform("mu-law", RATE, classes).to_dict(), folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keep(tmp_path_factory.mktemp("models") / "classes", num_classes=2)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names(folder: str = "recordings") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_recordings_are_written_with_pictures(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", model, "--seconds", 0.05, "--number", 2, "--seed", 3) == 0
    assert names() == ["recording-3.png", "recording-3.wav", "recording-4.png", "recording-4.wav"]
    first, rate = soundfile.read("recordings/recording-3.wav")
    second, _ = soundfile.read("recordings/recording-4.wav")
    assert (rate, len(first), len(second)) == (RATE, 400, 400)
    assert soundfile.info("recordings/recording-3.wav").subtype == "PCM_16"
    assert not np.array_equal(first, second)
    assert "recordings/recording-3.wav" in capsys.readouterr().out
    # alone as in company
    assert call("generate", model, "--seconds", 0.05, "--seed", 4, "--output", "again") == 0
    assert np.array_equal(soundfile.read("again/recording-4.wav")[0], second)


def test_a_prompt_of_another_rate_and_in_stereo_is_gone_on_with(model: Path) -> None:
    t = np.arange(1600) / 16000
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write("tone.wav", np.stack([tone, tone], 1), 16000)
    assert call("generate", model, "--seconds", 0.01, "--number", 2, "--prompt", "tone.wav") == 0
    assert [name for name in names() if name.endswith(".wav")] == ["tone-0.wav", "tone-1.wav"]
    first, second = (soundfile.read(f"recordings/tone-{i}.wav")[0] for i in range(2))
    assert len(first) == 800 + 80
    # as it was, but for its resampling and 8 bits
    assert np.abs(first[100:700] - tone[200:1400:2]).max() < 0.03
    assert np.array_equal(first[:800], second[:800])
    assert not np.array_equal(first[800:], second[800:])


def test_what_follows_a_prompt_is_the_models_own(model: Path) -> None:
    from mambazoo.checkpoints.io import from_pretrained

    sound, loaded = Waveform("mu-law", RATE), from_pretrained(model)
    codes = np.random.default_rng(0).integers(0, 256, 101).astype(np.uint8)
    soundfile.write("noise.wav", sound.decode(codes), RATE, subtype="FLOAT")
    assert call("generate", model, "--seconds", 0.005, "--temperature", 0, "--prompt", "noise.wav") == 0
    written = sound.encode(soundfile.read("recordings/noise-0.wav", dtype="float32")[0])
    history = [int(sound.silence), *codes.tolist()]
    with torch.no_grad():
        for _ in range(40):
            history.append(int(loaded(torch.tensor([history]))[0][0, -1].argmax()))
    # 16 bits on disk move a code by one where it is finest
    assert np.abs(written.astype(int) - np.array(history[1:])).max() <= 1


def test_classes_are_asked_for_by_name_or_come_in_turn(
    classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", classes, "--seconds", 0.02, "--number", 3, "--output", "turns") == 0
    assert [name for name in names("turns") if name.endswith(".wav")] == [
        "one-0.wav",
        "one-2.wav",
        "two-1.wav",
    ]
    assert call("generate", classes, "--seconds", 0.02, "--number", 2, "--label", "two") == 0
    assert [name for name in names() if name.endswith(".wav")] == ["two-0.wav", "two-1.wav"]
    again, turn = (soundfile.read(f"{folder}/two-1.wav")[0] for folder in ("recordings", "turns"))
    assert np.array_equal(again, turn)
    assert call("generate", classes, "--label", "tow") == 2
    assert "--label: 'tow' is none of one, two, did you mean 'two'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "one"], "--label: this model knows no classes"),
        (["--seconds", "0"], "--seconds: must be a sample or more"),
        (["--seconds", "inf"], "--seconds: must be a sample or more, and less than 134217, not inf"),
        (["--seconds", "nan"], "--seconds: must be a sample or more"),
        (["--seed", str(1 << 70)], "--seed: must be 0 or more and below 2^63"),
        (["--output", "text"], "--output: text cannot be made a folder (File exists)"),
        (["--output", "new.wav"], "--output: new.wav is the name of a file; give that of a folder"),
        (["--max-new-tokens", "9"], "--max-new-tokens: means nothing to"),
        (["--max-new-tokens", "9"], "which writes sound; it takes --seconds and --label"),
        (["--top-p", "0.9", "--temperature", "0"], "--top-p: means nothing to --temperature 0"),
        (["--prompt", "nothing.wav"], "--prompt: there is no file nothing.wav"),
        (["--prompt", "text.wav"], "--prompt: text.wav: it is no sound that can be read"),
        (["--prompt", "a.wav", "--prompt", "b/a.wav"], "--prompt: two files have one name"),
        (["--temperature", "-1"], "temperature cannot be"),
    ],
)
def test_mistakes_are_explained(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("text", "text.wav"):
        Path(path).write_text("no sound")
    Path("b").mkdir()
    for path in ("a.wav", "b/a.wav"):
        soundfile.write(path, np.zeros(100), RATE)
    assert call("generate", model, *arguments) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert len(captured.splitlines()) == 1
    assert not Path("recordings").exists()


def test_a_model_of_text_still_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(LanguageModel({"d_model": 8, "n_layers": 1}, 257), {"kind": "bytes"}, tmp_path / "text")
    assert call("generate", tmp_path / "text", "--prompt", "abc", "--max-new-tokens", 3) == 0
    assert capsys.readouterr().out.startswith("abc")
    for flag in ("--seconds", "--label"):
        assert call("generate", tmp_path / "text", flag, "1") == 2
        message = (
            f"{flag}: means nothing to {tmp_path / 'text'}, which writes letters; it takes --max-new-tokens"
        )
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", [4000, 8000, 16000, 44100])
@pytest.mark.parametrize("length", [1, 100, 30000])
def test_pictures_of_any_recording(rate: int, length: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(np.linspace(-1, 1, length, dtype=np.float32), rate, start=length // 2)
    wave, mel = figure.axes
    assert wave.get_xlim()[1] == mel.get_xlim()[1] == pytest.approx(length / rate)


@pytest.mark.parametrize("length", [2, 100, 1600, 30000])
def test_a_wave_is_seen_all_along_whatever_its_length(length: int) -> None:
    figure = draw(0.5 * (-1.0) ** np.arange(length, dtype=np.float32), 8000)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    wave = figure.axes[0]
    wave.grid(False)
    (left, bottom), (right, top) = wave.transData.transform([(0, -0.4), (length / 8000, 0.4)]).astype(int)
    pixels = np.asarray(canvas.buffer_rgba())[::-1][bottom:top, left + 2 : right - 2, :3]
    # every column of pixels has some that are not white, but for what is between two samples that are far apart
    assert (pixels.min(axis=(0, 2)) < 255).mean() > (0.9 if length > 2 else 0.4)


def test_a_tone_lies_in_its_band() -> None:
    t = torch.arange(RATE) / RATE
    low, high = (spectrogram(torch.sin(6.2832 * f * t), RATE).mean(1).argmax() for f in (300, 2500))
    assert low < high
    assert spectrogram(torch.sin(6.2832 * 300 * t), RATE).max() == 0
