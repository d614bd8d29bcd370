"""Models of sound that go on with other recordings: what they take over, and what starts anew."""

from pathlib import Path

import pytest
import torch
import yaml
from mambazoo.checkpoints.io import from_pretrained, save_pretrained
from mambazoo.datamodules.waveform import Waveform
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.classification import SequenceClassifier

from .command import SMALL, Command


@pytest.fixture
def heard(tmp_path: Path) -> str:
    """A model of samples to start from."""
    save_pretrained(
        WaveformModel({"d_model": 16, "n_layers": 1}), Waveform("linear", 8000).to_dict(), tmp_path / "heard"
    )
    return "model.pretrained=heard"


def test_a_model_of_sound_hears_what_it_was_trained_on(
    mambazoo: Command, heard: str, sounds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("audio/finetune", heard, f"data.paths={sounds}", "data.length=256", *SMALL)
    assert mambazoo("finetune", *given)[0] == 0
    kept = yaml.safe_load(Path("runs/audio/finetune/1/recipe.yaml").read_text())["data"]
    assert (kept["sample_rate"], kept["encoding"]) == (8000, "linear")
    assert "heard heard" not in caplog.text
    code, out, err = mambazoo("finetune", *given, "data.sample_rate=4000")
    assert code == 0
    assert "heard heard sound of sample_rate 8000, and data.sample_rate is 4000" in caplog.text + out + err
    # a model of samples has no vocabulary to compare
    classifier = SequenceClassifier({"d_model": 16, "n_layers": 1}, None, 2, patch=8)
    save_pretrained(classifier, Waveform("float", 8000).to_dict(), tmp_path / "raw")
    given = ("audio/finetune", "model.pretrained=raw", *given[2:])
    code, out, err = mambazoo("check", *given, "data.sample_rate=4000")
    assert code == 0, err
    assert "raw heard sound of sample_rate 8000, and data.sample_rate is 4000" in caplog.text + out + err


@pytest.mark.parametrize(
    ("classes", "said", "mode"),
    [
        (["high", "low"], "loaded", "full"),
        (["low", "high"], "new", "full"),
        (["one", "two", "three"], "new", "lora"),
    ],
)
def test_a_model_that_speaks_by_class_starts_anew_with_other_classes(
    mambazoo: Command, sounds: Path, tmp_path: Path, classes: list[str], said: str, mode: str
) -> None:
    speaker = WaveformModel({"d_model": 16, "n_layers": 1}, num_classes=len(classes))
    torch.nn.init.constant_(speaker.classes.weight, 1.0)
    save_pretrained(speaker, Waveform("mu-law", 8000, classes).to_dict(), tmp_path / "speaks")
    recipe = {
        "extends": "trainer/finetune",
        "model": {"class_path": "mambazoo.zoo.audio.WaveformModel"},
        "data": {
            "class_path": "mambazoo.datamodules.audio.AudioDataModule",
            "paths": str(sounds),
            "labels": "folder",
        },
    }
    (tmp_path / "speak.yaml").write_text("# To speak by class.\n" + yaml.safe_dump(recipe))
    given = ("speak.yaml", "model.pretrained=speaks", f"finetune.mode={mode}", *SMALL)
    code, out, err = mambazoo("finetune", *given)
    assert code == 0, err
    assert f"  classes      {said} 1 tensor, 32 parameters" in out
    learnt = from_pretrained(Path("runs/speak/1"))
    assert isinstance(learnt, WaveformModel)
    assert learnt.num_classes == 2
    # drawn around 0, if not kept, and in six steps nothing goes far
    kept = learnt.classes.weight.mean().item() > 0.5
    assert kept == (said == "loaded")
    # no classes are made up for recordings that have none
    code, _, err = mambazoo("predict", "runs/speak/1", "data.labels=null")
    assert code == 2
    assert "data.classes" not in err


def test_what_simple_models_reach_is_known_before_fine_tuning(
    mambazoo: Command, heard: str, sounds: Path
) -> None:
    code, out, err = mambazoo(
        "baseline", "audio/finetune", heard, f"data.paths={sounds}", "data.valid=0.3", "data.length=200"
    )
    assert (code, "regression on log-mel spectra, accuracy" in out) == (0, True), err
