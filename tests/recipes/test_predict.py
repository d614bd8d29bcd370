"""The verb `predict`: classes by their names, of what is held out and of what nobody has labelled."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from mambazoo.checkpoints.io import save_pretrained
from mambazoo.datamodules.waveform import Waveform
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.saving import read_checkpoint

from .command import SMALL, Command


def test_recordings_that_nobody_has_labelled_are(mambazoo: Command, sounds: Path, tmp_path: Path) -> None:
    save_pretrained(
        WaveformModel({"d_model": 16, "n_layers": 1}), Waveform("linear", 8000).to_dict(), tmp_path / "heard"
    )
    heard = "model.pretrained=heard"
    code, _, err = mambazoo("finetune", "audio/finetune", heard, f"data.paths={sounds}", *SMALL)
    assert code == 0, err
    run = Path("runs/audio/finetune/1")

    def predicted(*overrides: str) -> dict[str, dict[str, Any]]:
        code, _, err = mambazoo("predict", str(run), *overrides)
        assert code == 0, err
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        return {row.pop("name"): row for row in rows}

    labelled = predicted("data.test=[*/00000001*,*/00000003*]")
    assert list(labelled) == [
        f"{label}/0000000{i}_nohash_0.flac" for label in ("high", "low") for i in (1, 3)
    ]
    assert len({str(row) for row in labelled.values()}) == 4
    flat = tmp_path / "clips"
    flat.mkdir()
    for i, name in enumerate(labelled):
        shutil.copy(sounds / name, flat / f"{i}.flac")
    clips = f"data.paths={flat}"
    found = predicted(clips, "data.labels=null")
    assert found == {f"{i}.flac": row for i, row in enumerate(labelled.values())}
    # without labels nothing is measured, and who forgets to say that there are none is told how
    for verb, overrides, message in (
        ("predict", [clips], "0.flac is in no folder, which would be its label"),
        ("predict", [clips], "for recordings that nobody has labelled write data.labels=null"),
        ("test", [clips, "data.labels=null"], "data.labels: must be given to learn or measure"),
        (
            "validate",
            [clips, "data.labels=null", "data.classes=[high,low]"],
            "data.labels: null leaves nothing",
        ),
        ("predict", [clips, "data.classes=[high,low]"], "data.classes: are of unlabelled recordings"),
        (
            "predict",
            [clips, "data.labels=null", "data.sample_rate=16000"],
            "data.sample_rate: the checkpoint has 8000, the recipe 16000",
        ),
    ):
        code, _, err = mambazoo(verb, str(run), *overrides)
        assert (code, message in err) == (2, True), err
    # a classifier of before knows its classes by its vocabulary
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    del checkpoint["hyper_parameters"]["classes"]
    torch.save(checkpoint, path)
    assert predicted(clips, "data.labels=null") == found


def test_texts_are_predicted_by_the_classes_that_they_have(mambazoo: Command, reviews: Path) -> None:
    model = ("model.backbone.d_model=16", "model.backbone.n_layers=1", "trainer.precision=32-true")
    given = ("lra/text", f"data.path={reviews}", "callbacks.compile.mode=null", *model, *SMALL)
    code, _, err = mambazoo("fit", *given)
    assert code == 0, err
    code, _, err = mambazoo("predict", "runs/lra/text/1")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("runs/lra/text/1/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert all(list(row["probabilities"]) == ["neg", "pos"] for row in rows)
