"""Recipes on sound: what `check` says of the data, what simple models reach, and that batches train."""

from pathlib import Path

import pytest
import yaml

from .command import call


def recipe(folder: Path, model: dict[str, object], data: dict[str, object]) -> Path:
    path = folder / "sound.yaml"
    values = {
        "extends": "trainer/default",
        "model": {**model, "backbone": {"d_model": 16, "n_layers": 1}},
        "data": {"sample_rate": 8000, "length": 200, "batch_size": 4, "valid": 0.2, **data},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "val_check_interval": 2},
    }
    path.write_text("# A model of sound.\n" + yaml.safe_dump(values))
    return path


@pytest.fixture
def waveforms(sounds: Path) -> Path:
    data = {"class_path": "mambazoo.datamodules.audio.AudioDataModule", "paths": str(sounds)}
    return recipe(sounds.parent, {"class_path": "mambazoo.zoo.audio.WaveformModel"}, data)


@pytest.fixture
def classes(sounds: Path) -> Path:
    class_path = "mambazoo.datamodules.labelled_audio.LabelledAudioDataModule"
    data = {"class_path": class_path, "paths": str(sounds), "labels": "folder", "noise": 20.0}
    return recipe(sounds.parent, {"class_path": "mambazoo.zoo.classification.SequenceClassifier"}, data)


def test_check_says_what_there_is_to_hear(waveforms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", waveforms) == 0
    assert (
        "AudioDataModule, 12 recordings in 0.0 MB, mu-law at 8000 Hz, batches of 4 x 200 samples"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["data.paths=nowhere"], ["data.paths: there is no .wav .flac .ogg .mp3 file at nowhere"]),
        (
            ["data.paths=nowhere", "data.sample_rat=1", "data.length=many"],
            ["data.length: must be", "data.sample_rat: there is no such key", "data.paths: there is no"],
        ),
        (["data.labels=(x)"], ["data.labels: '(x)' finds nothing in high/00000000_nohash_0.flac"]),
        (["data.speed=3"], ["data.speed: must be 1 at most"]),
        (["data.encoding=float"], []),
        (["data.valid=2"], ["data.valid: a fraction must be between 0 and 1"]),
        (["data.speaker=(x"], ["data.speaker: '(x' is no regular expression"]),
        (
            [
                "model.patch=0",
                "model.pooling=loud",
                "model.backbone.dropout=2",
                "data.valid=0.5",
                "data.test=0.6",
            ],
            [
                "model.backbone.dropout: must be",
                "data.valid: 0.5 and",
                "model.patch, model.",
                "model.pooling: must be",
            ],
        ),
    ],
)
def test_check_says_what_is_wrong(
    classes: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], problems: list[str]
) -> None:
    assert call("check", classes, *overrides) == (2 if problems else 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"mambazoo: {problem}")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("folder", "is 1, and the data have 2 classes; leave it out"),
        ("null", "is 1, and the data have no classes; give data.labels, or leave it out"),
    ],
)
def test_a_model_has_as_many_classes_as_its_data(
    waveforms: Path, capsys: pytest.CaptureFixture[str], labels: str, problem: str
) -> None:
    assert call("check", waveforms, "model.num_classes=1", f"data.labels={labels}") == 2
    assert capsys.readouterr().err == f"mambazoo: model.num_classes: {problem}\n"


def test_simple_models_are_measured(
    waveforms: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(waveforms.parent)
    assert call("baseline", waveforms) == 0
    bits = {
        line.split(maxsplit=1)[1]: float(line.split()[0]) for line in capsys.readouterr().out.splitlines()
    }
    assert bits["Markov model of order 1, bits per sample"] < bits["Markov model of order 0, bits per sample"]


@pytest.mark.parametrize("kind", ["waveforms", "classes"])
@pytest.mark.filterwarnings("ignore")
def test_batches_train(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("fit", request.getfixturevalue(kind)) == 0
    assert (tmp_path / "runs" / "sound" / "1" / "summary.json").is_file()
