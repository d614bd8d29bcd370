"""Labelled clips: where they lie in a row, how they are varied, and that this can be gone on with."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambazoo.datamodules.augmentation import Augmentation
from mambazoo.datamodules.labelled_audio import LabelledAudioDataModule
from numpy.typing import NDArray
from torch import Tensor

RATE, LENGTH, SILENCE = 8000, 400, 128
SHORT, LONG = 250, 1000


def draw(label: str, take: int) -> NDArray[np.int16]:
    """Noise that is never silent; "long" recordings are longer than a row."""
    lot = np.random.default_rng([len(label), take])
    sign = lot.choice([-1, 1], SHORT if label == "short" else LONG)
    return (sign * lot.integers(3000, 9000, len(sign))).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for label, take in itertools.product(("short", "long"), range(6)):
        (root / label).mkdir(exist_ok=True)
        soundfile.write(root / label / f"{take}.wav", draw(label, take), RATE)
    return root


def module(folder: Path, **options: object) -> LabelledAudioDataModule:
    values = {
        "labels": "folder", "sample_rate": RATE, "length": LENGTH, "batch_size": 4, "valid": "*/0.wav", **options,
    }  # fmt: skip
    data = LabelledAudioDataModule(str(folder), **values)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def take(data: LabelledAudioDataModule, count: int) -> list[dict[str, Tensor]]:
    return [
        data.on_after_batch_transfer(batch, 0) for batch in itertools.islice(data.train_dataloader(), count)
    ]


def places(data: LabelledAudioDataModule, batches: list[dict[str, Tensor]], label: str) -> list[int]:
    """Where in their rows clips of a label begin; of a longer one, less than 0."""
    found = []
    whole = [data.waveform.read(draw(label, i)).tobytes() for i in range(6)]
    for row, number in zip(*(torch.cat([batch[key] for batch in batches]) for key in ("inputs", "labels"))):  # noqa: B905
        if data.classes[number] == label:
            heard = torch.where(row != SILENCE)[0]
            piece = bytes(row[heard[0] : heard[-1] + 1].tolist())
            [start] = [clip.find(piece) for clip in whole if piece in clip]
            found.append(int(heard[0]) - start)
    return found


def test_training_clips_lie_anywhere_and_others_in_the_middle(folder: Path) -> None:
    data = module(folder)
    batches = take(data, 60)
    assert batches[0]["inputs"].shape == (4, LENGTH)
    assert batches[0]["inputs"].dtype == batches[0]["labels"].dtype == torch.int64
    short, long = (places(data, batches, label) for label in ("short", "long"))
    # all of what is shorter is heard, and a longer one fills its row
    assert 0 <= min(short) < 15
    assert LENGTH - SHORT - 15 < max(short) <= LENGTH - SHORT
    assert LENGTH - LONG <= min(long) < LENGTH - LONG + 50
    assert -50 < max(long) <= 0
    held_out = list(data.val_dataloader())
    assert places(data, held_out, "short") == [(LENGTH - SHORT) // 2]
    assert places(data, held_out, "long") == [-((LONG - LENGTH) // 2)]


def test_clips_may_be_moved_out_of_the_row(folder: Path) -> None:
    data = module(folder, shift=100 / RATE)
    batches = take(data, 60)
    assert -100 <= min(places(data, batches, "short")) < -70
    assert LENGTH - SHORT + 70 < max(places(data, batches, "short")) <= LENGTH - SHORT + 100
    silent = torch.cat([batch["inputs"][batch["labels"] == 0] for batch in batches]) == SILENCE
    assert 70 < silent.sum(1).max() <= 100


def test_samples_may_be_floats(folder: Path) -> None:
    plain, floats = module(folder), module(folder, encoding="float")
    assert (plain.vocab_size, floats.vocab_size) == (256, None)
    assert plain.counts == {"train": [5, 5], "val": [1, 1]}
    assert (plain.num_classes, plain.classes) == (2, ["long", "short"])
    for a, b in zip(take(plain, 3), take(floats, 3), strict=True):
        assert b["inputs"].shape == (4, LENGTH, 1)
        assert b["inputs"].dtype == torch.float32
        assert np.array_equal(plain.waveform.encode(b["inputs"][..., 0].numpy()), a["inputs"].numpy())
        assert torch.equal(a["labels"], b["labels"])


def test_unlabelled_clips_are_all_read_for_a_model_to_label(folder: Path) -> None:
    data = module(folder, labels=None, classes=["a", "b", "c"], test="*/1.wav")
    names = [f"{label}/{take}.wav" for label in ("long", "short") for take in range(6)]
    assert data.names() == names
    assert (data.classes, data.num_classes, list(data.samples)) == (["a", "b", "c"], 3, ["test"])
    rows = torch.cat([batch["inputs"] for batch in data.predict_dataloader()])
    labelled = module(folder, valid="*/0.wav", test="*/[2-5].wav")
    assert labelled.names() == [name for name in names if name[-5] not in "01"]
    held_out = torch.cat([batch["inputs"] for batch in labelled.predict_dataloader()])
    assert torch.equal(held_out, rows[[names.index(name) for name in labelled.names()]])


VARIED = {"shift": 0.01, "speed": 0.2, "equalise": 6.0, "noise": 10.0, "gain": 6.0, "polarity": True}


def test_a_position_is_all_it_takes_to_go_on(folder: Path) -> None:
    whole = take(module(folder, **VARIED), 8)
    resumed = module(folder, **VARIED)
    resumed.load_state_dict({"position": 12, "vocabulary": None})
    helped = take(module(folder, num_workers=2, **VARIED), 8)
    for a, b in zip(whole[3:] + whole, take(resumed, 5) + helped, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    # a clip is another on the next pass, and held-out ones stay what they are
    first, second = (module(folder, **VARIED).samples["train"].read(0, pass_)["codes"] for pass_ in (0, 1))
    assert not np.array_equal(first, second)
    plain, varied = (list(module(folder, **options).val_dataloader()) for options in ({}, VARIED))
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(plain, varied, strict=True))


def tone(frequency: float, count: int = RATE) -> NDArray[np.float32]:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(count) / RATE)).astype(np.float32)


def vary(x: NDArray[np.float32], times: int = 40, **options: object) -> list[NDArray[np.float32]]:
    augmentation = Augmentation(**options)  # type: ignore[arg-type]
    return [augmentation(x, RATE, np.random.default_rng(i)) for i in range(times)]


def test_what_is_off_changes_nothing() -> None:
    assert not Augmentation()
    assert np.array_equal(vary(tone(440), 1)[0], tone(440))


def test_speed_changes_pitch_and_length_and_nothing_else() -> None:
    pitches = []
    for y in vary(tone(1000), speed=0.25):
        spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y))))
        pitches.append(spectrum.argmax() * RATE / len(y) / 1000)
        assert pitches[-1] * len(y) == pytest.approx(RATE, rel=2e-3)
        assert np.abs(y[100:-100]).max() == pytest.approx(0.3, rel=0.02)
    assert 0.8 <= min(pitches) < 0.84
    assert 1.2 < max(pitches) <= 1.25
    # what would be above half the rate is not heard as something else
    assert min(np.abs(y[200:-200]).max() for y in vary(tone(3900), speed=0.25)) < 0.01


def test_levels_are_what_is_asked_for() -> None:
    x = tone(440)
    gains = [20 * np.log10(np.abs(y).max() / np.abs(x).max()) for y in vary(x, gain=6.0)]
    assert -6 <= min(gains) < -5
    assert 5 < max(gains) <= 6
    signs = [float(np.sign(x @ y)) for y in vary(x, polarity=True)]
    assert 10 < signs.count(-1.0) < 30
    ratios = [10 * np.log10((x @ x) / ((y - x) @ (y - x))) for y in vary(x, noise=10.0)]
    assert 10 <= min(ratios) < 14
    assert 36 < max(ratios) <= 40.01
    for frequency in (60, 500, 3000):
        bands = [20 * np.log10(np.abs(y[500:-500]).max() / 0.3) for y in vary(tone(frequency), equalise=6.0)]
        assert -6.1 <= min(bands) < -2
        assert 2 < max(bands) <= 6.1


def test_silence_and_single_samples_can_be_varied() -> None:
    options = {key: value for key, value in VARIED.items() if key != "shift"}
    for x in (np.zeros(100, dtype=np.float32), np.full(1, 0.5, dtype=np.float32)):
        assert all(np.isfinite(y).all() and len(y) for y in vary(x, **options))


def test_simple_models_are_measured(folder: Path) -> None:
    found = dict(module(folder).baselines())
    assert found["the commonest class, accuracy"] == 0.5
    assert 0 <= found["regression on log-mel spectra, accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 1.5}, r"data.speed: must be 1 at most"),
        ({"speed": -0.1}, r"data.speed: must be 0 or more"),
        ({"gain": -1.0}, r"data.gain: must be 0 or more"),
        ({"shift": -1.0}, r"data.shift: must be 0 seconds or more"),
        ({"labels": None}, r"data.labels: must be given to learn or measure"),
        ({"classes": ["a", "b"]}, r"data.classes: are of unlabelled recordings"),
        ({"encoding": "bits"}, r"data.encoding: must be one of mu-law, linear, float"),
    ],
)
def test_what_cannot_be_is_said(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, **options)
