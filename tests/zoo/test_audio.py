"""Models of raw audio: classes in the state, bits by hand, learning a waveform, checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mambazoo.checkpoints.io import from_pretrained, load, save_pretrained
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.generate import Sampling, generate
from torch import Tensor
from torch.utils.data import DataLoader

UNET: dict[str, Any] = {
    "d_model": 16, "n_layers": 1, "pool": [4], "pattern": "s4d", "s4d": {"d_state": 8},
    "stages": [{}, {"pattern": "mamba", "mamba": {"d_state": 4}}],
}  # fmt: skip
ROW: dict[str, Any] = {"d_model": 16, "n_layers": 1}
VOCABULARY = {
    "kind": "waveform",
    "encoding": "mu-law",
    "levels": 256,
    "sample_rate": 8000,
    "classes": ["a", "b"],
}


def encode(x: np.ndarray) -> np.ndarray:
    """Codes 0 to 255 of samples -1 to 1 by the mu-law; silence is 128."""
    y = np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256)
    return np.floor((y + 1) / 2 * 255 + 0.5).astype(np.int64)


def two_tones(b: int, l: int, seed: int) -> dict[str, Tensor]:
    """Recordings of the same two tones in phases of their own, after a code of silence."""
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, (2, b, 1))
    t = np.arange(l)
    codes = encode(0.5 * np.sin(0.21 * t + phases[0]) + 0.3 * np.sin(0.83 * t + phases[1]))
    inputs = np.concatenate([np.full((b, 1), 128), codes[:, :-1]], 1)
    return {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(codes)}


def order_1_entropy(batch: dict[str, Tensor]) -> float:
    """The bits that the code before leaves of each code, by counting the batch itself."""
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (batch["inputs"].numpy().ravel(), batch["targets"].numpy().ravel()), 1)
    p = pairs / pairs.sum()
    given = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    return float(-(p[p > 0] * np.log2(given[p > 0])).sum())


@pytest.mark.parametrize("backbone", [ROW, UNET], ids=["row", "unet"])
@torch.no_grad()
def test_a_recording_stays_of_its_class(backbone: dict[str, Any]) -> None:
    model = WaveformModel(backbone, num_classes=3).double().eval()
    torch.nn.init.normal_(model.classes.weight)
    tokens, labels = torch.randint(256, (2, 21)), torch.tensor([2, 0])
    logits, _ = model(tokens, labels=labels)
    assert not torch.allclose(model(tokens, labels=torch.tensor([2, 1]))[0][1], logits[1])
    with_state, state = model(tokens[:, :13], state=model.init_state(2, labels))
    torch.testing.assert_close(with_state, logits[:, :13], rtol=0, atol=1e-10)
    for t in range(13, 21):
        row, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(row, logits[:, t], rtol=0, atol=1e-10)
    packed, _ = model(
        tokens.view(1, -1), cu_seqlens=torch.tensor([0, 21, 42], dtype=torch.int32), labels=labels
    )
    torch.testing.assert_close(packed.view(2, 21, -1), logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="knows 3 classes"):
        model(tokens)
    with pytest.raises(ValueError, match="knows 3 classes"):
        model.init_state(2)


def test_classes_are_written_in() -> None:
    model = WaveformModel(UNET, num_classes=2).eval()
    torch.nn.init.normal_(model.classes.weight)
    torch.nn.init.normal_(model.embedding.weight)
    with torch.no_grad():
        model.head.weight.mul_(20)
    written = {}
    for labels in ([0, 1], [1, 1]):
        state = model.init_state(2, torch.tensor(labels))
        steps = generate(model, [[128], [128]], 30, Sampling(), seeds=[0, 0], state=state)
        written[tuple(labels)] = list(zip(*steps, strict=True))
    # alike but for their class
    assert written[1, 1][0] == written[1, 1][1] == written[0, 1][1] != written[0, 1][0]


def test_bits_per_sample_by_hand() -> None:
    model, batch = WaveformModel(ROW, num_classes=2), two_tones(3, 40, seed=0)
    batch["targets"][0, 20:] = -100
    batch["labels"] = torch.tensor([0, 1, 1])
    values: dict[str, Any] = {}
    model.log = lambda name, value, **_: values.update({name: value})  # type: ignore[assignment, misc]
    with torch.no_grad():
        model.measure(batch, "val")
        model.on_validation_epoch_end()
        logits, _ = model(batch["inputs"], labels=batch["labels"])
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100)
    assert float(values["val/bits_per_sample"]) == pytest.approx(nats.item() / math.log(2), rel=1e-5)
    torch.testing.assert_close(model.training_loss(batch), nats)
    # an even guess has 8 bits, and what is not trained yet guesses so
    assert float(values["val/bits_per_sample"]) == pytest.approx(8, abs=0.1)


@pytest.mark.filterwarnings("ignore")
def test_learns_a_waveform_and_survives_its_files(tmp_path: Path) -> None:
    model = WaveformModel({**UNET, "d_model": 24}, optimizer={"lr": 1e-2, "warmup_steps": 10})
    trainer = L.Trainer(
        max_steps=120, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=120,
    )  # fmt: skip
    held_out = two_tones(16, 1024, seed=1000)
    trainer.fit(
        model,
        DataLoader([two_tones(8, 256, seed) for seed in range(120)], batch_size=None),
        DataLoader([held_out], batch_size=None),
    )
    assert trainer.callback_metrics["val/bits_per_sample"] < order_1_entropy(held_out) - 0.5

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    json.dumps(dict(model.hparams))
    model.eval()
    save_pretrained(model, VOCABULARY, tmp_path / "model")
    for again in (from_pretrained(tmp_path / "a.ckpt"), from_pretrained(tmp_path / "model")):
        assert isinstance(again, WaveformModel)
        with torch.no_grad():
            assert torch.equal(again(held_out["inputs"])[0], model(held_out["inputs"])[0])
    assert load(tmp_path / "model")[1] == VOCABULARY


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 0}, "model.num_classes: must be 1 or more"),
        ({"backbone": {**ROW, "bidirectional": "tied"}}, "model.backbone: a model of the next sample"),
        ({"backbone": {**ROW, "pool": [4], "widenn": 2}}, "model.backbone.widenn: there is no such key"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveformModel(**{"backbone": ROW, **values})
