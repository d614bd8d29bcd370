"""Recordings in batches: where windows lie, what is predicted, how recordings are split and labelled, and resumed."""

import itertools
import logging
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from mambazoo.datamodules.audio import AudioDataModule
from numpy.typing import NDArray
from torch import Tensor

RATE, SILENCE, IGNORE = 8000, 128, -100
# by name: how many samples; the digit is a class, the word a speaker, and the last number that of the take
SIZES = {
    f"{digit}_{speaker}_{take}.wav": 150 + 10 * i
    for i, (digit, speaker, take) in enumerate(itertools.product((3, 7), ("ann", "bob", "cy"), (0, 1)))
}


@cache
def draw(name: str) -> NDArray[np.int16]:
    """Noise, no thirty codes of which occur twice."""
    return np.random.default_rng(list(name.encode())).integers(-9000, 9000, SIZES[name]).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sounds")
    for name in SIZES:
        soundfile.write(root / name, draw(name), RATE)
    return root


def module(path: Path | str, **options: object) -> AudioDataModule:
    values = {"sample_rate": RATE, "length": 64, "batch_size": 4, **options}
    data = AudioDataModule(str(path), **values)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def take(data: AudioDataModule, count: int) -> list[dict[str, Tensor]]:
    return [
        data.on_after_batch_transfer(batch, 0) for batch in itertools.islice(data.train_dataloader(), count)
    ]


def codes(data: AudioDataModule) -> dict[str, bytes]:
    return {name: data.waveform.read(draw(name)).tobytes() for name in SIZES}


def find(data: AudioDataModule, targets: Tensor) -> tuple[str, int]:
    """Which recording the targets of a row are from, and where they begin."""
    row = bytes(target for target in targets.tolist() if target != IGNORE)
    [found] = [(name, whole.find(row)) for name, whole in codes(data).items() if row in whole]
    return found


def names(data: AudioDataModule, split: str) -> set[str]:
    """The recordings that are in a split."""
    whole = {bytes(draw(name)): name for name in SIZES}
    part = data.parts[split]
    return {
        name
        for start, end in zip(part.starts, part.ends, strict=True)
        for samples, name in whole.items()
        if bytes(part.sequence.array[start:end]) in samples
    }


def test_inputs_are_one_sample_behind_targets(folder: Path) -> None:
    data = module(folder, valid="*_0.wav")
    starts = Counter()
    for batch in take(data, 200):
        assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
        assert batch["inputs"].shape == batch["targets"].shape == (4, 64)
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            name, start = find(data, targets)
            assert name.endswith("_1.wav")
            assert torch.equal(inputs[1:], targets[:-1])
            assert inputs[0] == (codes(data)[name][start - 1] if start else SILENCE)
            starts[name, start] += 1
    # every training recording, from its first window to its last
    assert {name for name, _ in starts} == {name for name in SIZES if name.endswith("_1.wav")}
    for name in ("3_ann_1.wav", "7_cy_1.wav"):
        mine = [start for other, start in starts if other == name]
        assert min(mine) < 5
        assert SIZES[name] - 64 - 5 < max(mine) <= SIZES[name] - 64


def test_held_out_samples_are_targets_once(folder: Path) -> None:
    for options in ({"valid": "*_0.wav"}, {"valid": 0.3, "by_time": True}):
        data = module(folder, **options)
        seen: Counter[tuple[str, int]] = Counter()
        for batch in data.val_dataloader():
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
                name, start = find(data, targets)
                count = int((targets != IGNORE).sum())
                assert targets[:count].min() >= 0
                assert inputs[count:].unique().tolist() in ([], [SILENCE], [int(targets[count - 1])])
                first = 0 if options["valid"] == "*_0.wav" else SIZES[name] - round(0.3 * SIZES[name])
                # what is before a held-out end has been trained on, and is not shown
                assert inputs[0] == (SILENCE if start == first else codes(data)[name][start - 1])
                seen.update((name, start + i) for i in range(count))
        assert set(seen.values()) == {1}
        assert len(seen) == data.parts["val"].sizes.sum() > 0


def test_time_divides_every_recording(folder: Path) -> None:
    data = module(folder, valid=0.2, test=0.1, by_time=True)
    train, val, test = (data.parts[split] for split in ("train", "val", "test"))
    assert np.array_equal(train.ends, val.starts)
    assert np.array_equal(val.ends, test.starts)
    assert train.sizes.tolist() == [
        size - round(size * 0.1) - round(size * 0.2) for _, size in sorted(SIZES.items())
    ]


def test_windows_may_lie_end_to_end(folder: Path) -> None:
    data = module(folder, valid="*_0.wav", random_crops=False, batch_size=1)
    windows = len(data.samples["train"])
    rows = [batch["targets"][0] for batch in take(data, 2 * windows)]
    passes = [[find(data, row) for row in rows[i : i + windows]] for i in (0, windows)]
    expected = {(name, at) for name in SIZES if name.endswith("_1.wav") for at in range(0, SIZES[name], 64)}
    assert set(passes[0]) == set(passes[1]) == expected
    assert passes[0] != passes[1]


SPLITS = [
    ({"valid": "*_0.wav"}, "val", {name for name in SIZES if "_0." in name}),
    ({"valid": ["7_cy_1.wav", "3_ann_?.wav"]}, "val", {"7_cy_1.wav", "3_ann_0.wav", "3_ann_1.wav"}),
    ({"valid": "ann", "speaker": r"_(\w+)_"}, "val", {name for name in SIZES if "ann" in name}),
    ({"valid": "LIST"}, "val", {"3_bob_0.wav", "7_bob_0.wav", "7_bob_1.wav"}),
    ({"train": "3_*", "valid": "7_ann_0.wav"}, "train", {name for name in SIZES if name[0] == "3"}),
    ({"valid": "7_*", "test": "3_bob_*"}, "test", {"3_bob_0.wav", "3_bob_1.wav"}),
]


@pytest.mark.parametrize(("options", "split", "expected"), SPLITS)
def test_recordings_are_held_out_by_name(
    folder: Path, tmp_path: Path, options: dict[str, str], split: str, expected: set[str]
) -> None:
    listed = tmp_path / "valid.txt"
    listed.write_text("3_bob_0.wav\n\n7_bob_*.wav\n")
    data = module(folder, **{key: str(listed) if it == "LIST" else it for key, it in options.items()})
    assert names(data, split) == expected
    others = [names(data, other) for other in data.parts if other != split]
    assert all(not expected & other for other in others)
    if "train" not in options:
        assert expected.union(*others) == set(SIZES)


def test_a_fraction_is_of_speakers_or_recordings(folder: Path) -> None:
    data = module(folder, valid=0.3, test=0.3, speaker=r"_(\w+)_")
    speakers = [{name.split("_")[1] for name in names(data, split)} for split in ("train", "val", "test")]
    assert sorted(map(tuple, speakers)) == [("ann",), ("bob",), ("cy",)]
    data = module(folder, valid=0.25)
    assert [len(names(data, split)) for split in ("train", "val")] == [9, 3]
    # a fraction is of what names leave
    data = module(folder, valid=0.01, test="*_0.wav")
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [5, 1, 6]


def test_equal_recordings_are_on_one_side(tmp_path: Path) -> None:
    for name in list(SIZES)[::2]:
        for copy in ("first", "second"):
            soundfile.write(tmp_path / f"{copy}_{name}", draw(name), RATE)
    data = module(tmp_path, valid=0.5)
    contents = [
        {bytes(part.sequence.array[a:b]) for a, b in zip(part.starts, part.ends, strict=True)}
        for part in (data.parts["train"], data.parts["val"])
    ]
    assert [len(found) for found in contents] == [3, 3]
    assert not contents[0] & contents[1]


def test_equal_recordings_in_two_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copied, *others = list(SIZES)[:6]
    for file, name in [("copy.wav", copied), *((name, name) for name in (copied, *others))]:
        soundfile.write(tmp_path / file, draw(name), RATE)
    for options, held_out, other in (
        ({"valid": "copy.wav"}, "valid", "train"),
        ({"valid": copied, "test": "copy.wav"}, "test", "valid"),
        ({"valid": 0.2, "test": "copy.wav", "by_time": True}, "test", "train"),
        ({"valid": "3_bob_*", "train": [copied, others[0]], "test": "copy.wav"}, "test", "train"),
    ):
        caplog.clear()
        module(tmp_path, **options)
        assert caplog.messages == [
            f"1 recordings of data.{held_out} have the same samples as ones of data.{other}: "
            f"copy.wav = {copied}; hold out other ones"
        ]
    caplog.clear()
    for options in ({"valid": 0.3}, {"valid": 0.3, "by_time": True}, {"valid": ["copy.wav", copied]}):
        module(tmp_path, **options)
    assert caplog.messages == []


def test_a_list_is_text(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "valid.txt"
    listed.write_bytes("3_ann_0.wav\ncaf\xe9.wav\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^data.valid: .*valid.txt is no text in UTF-8 \(.*\); save it as that$"
    ):
        module(folder, valid=str(listed))


def test_labels_come_with_windows(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "".join(f"{name},{name[0]}\n" for name in SIZES if "cy" not in name))
    for labels in (r"^(\d)_", str(table)):
        with caplog.at_level(logging.INFO, logger="mambazoo"):
            data = module(folder, labels=labels, valid="*_0.wav")
        assert (data.classes, data.num_classes) == (["3", "7"], 2)
        for batch in [*take(data, 20), *data.val_dataloader()]:
            for targets, label in zip(batch["targets"], batch["labels"], strict=True):
                assert find(data, targets)[0][0] == data.classes[label]
    # a table leaves out what it does not name
    assert data.counts == {"train": [2, 2], "val": [2, 2]}
    assert "train: 4 recordings, 0.1 s (3 2, 7 2; majority 0.5000)" in caplog.text
    assert "labels" not in take(module(folder), 1)[0]


def test_a_position_is_all_it_takes_to_go_on(folder: Path) -> None:
    options = {"labels": r"^(\d)", "valid": "*_0.wav"}
    whole = take(module(folder, **options), 6)
    resumed = module(folder, **options)
    resumed.load_state_dict({"position": 8, "vocabulary": None})
    helped = take(module(folder, num_workers=2, **options), 6)
    for a, b in zip(whole[2:] + whole, take(resumed, 4) + helped, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(whole[0]["inputs"], take(module(folder, seed=1, **options), 1)[0]["inputs"])


def test_codes_travel_as_bytes_and_draw_no_global_number(folder: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batch = next(iter(module(folder).train_dataloader()))
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (torch.uint8, torch.int16)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_what_a_model_must_know_is_there_from_the_start(folder: Path) -> None:
    data = AudioDataModule(str(folder), sample_rate=RATE, encoding="linear", labels=r"_(\w+)_")
    assert (data.vocab_size, data.num_classes) == (256, 3)
    assert data.vocabulary == {
        "kind": "waveform", "encoding": "linear", "levels": 256, "sample_rate": RATE,
        "classes": ["ann", "bob", "cy"],
    }  # fmt: skip
    assert data.describe() == (
        "12 recordings of 3 classes in 0.0 MB, linear at 8000 Hz, batches of 8 x 16384 samples"
    )
    assert AudioDataModule(str(folder)).num_classes is None


def test_simple_models_are_measured(folder: Path) -> None:
    found = dict(module(folder, valid="*_0.wav").baselines())
    assert set(found) == {
        "Markov model of order 0, bits per sample", "Markov model of order 1, bits per sample",
        "linear prediction from 32 samples, bits per sample",
    }  # fmt: skip
    # there is nothing to learn of noise but which codes there are
    assert all(5 < bits < 8.1 for bits in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 1.5}, "data.valid: a fraction must be between 0 and 1"),
        ({"valid": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"valid": "3_an_0.wav"}, "data.valid: no recording is called '3_an_0.wav'; is it 3_ann_0.wav?"),
        ({"valid": "dan", "speaker": r"_(\w+)_"}, "data.valid: no recording or speaker is called 'dan'"),
        ({"valid": "*"}, "data.train: there is not a recording in it"),
        ({"valid": ["3_*"], "test": "*_ann_0.wav"}, "data.test: 3_ann_0.wav is in data.valid too"),
        ({"valid": "none.txt"}, "data.valid: there is no file none.txt"),
        ({"valid": 0.001, "by_time": True}, "data.valid: there is not a recording in it"),
        ({"speaker": "("}, "data.speaker: '.' is no regular expression"),
        ({"speaker": "ann"}, "data.speaker: put what is meant in 'ann' between parentheses"),
        ({"speaker": "(ann)"}, r"data.speaker: '\(ann\)' finds nothing in 3_bob_0.wav"),
        ({"labels": "folder"}, "data.labels: 3_ann_0.wav is in no folder"),
        ({"labels": "none.csv"}, "data.labels: there is no file none.csv"),
        ({"encoding": "float"}, "data.encoding: the next sample is one of 256 codes"),
        ({"length": 0}, "data.length: must be 1 or more"),
        ({"sample_rate": 10}, "data.sample_rate: must be 1000 to 768000"),
        ({"trim_silence": -3.0}, "data.trim_silence: must be decibels above 0"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_what_cannot_be_is_said(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(folder, **options)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,label\na,b\n", "line 1: has to name the columns file and label"),
        ("file,label\n3_ann_0.wav,x\n3_ann_9.wav,y\n", "line 3: no recording is called '3_ann_9.wav'"),
        ("file,label\n3_ann_0.wav,\n", "line 2: the label is empty"),
        ("file,label\n3_ann_0.wav\n", "line 2: the label is empty"),
        ("file,label\n3_ann_0.wav,x\n3_ann_0.wav,y\n", "line 3: 3_ann_0.wav has two labels, x and y"),
        ("file,label\n3_ann_0.wav,x\n", "all sequences have the label 'x'"),
        ("file,label\n", "labels.csv: there is no row in it"),
        ('file,label\n"3_ann', "is no table of text"),
    ],
)
def test_a_table_of_labels_is_checked(folder: Path, tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        module(folder, labels=str(tmp_path / "labels.csv"))


def test_the_digits_are_split_as_always(data: Path) -> None:
    digits = data / "audio" / "fsdd_4speakers_flac.zip"
    served = module(digits, valid="*_[0-4].flac", labels=r"/(\d)_", speaker=r"_([a-z]+)_")
    assert served.counts == {"train": [180] * 10, "val": [20] * 10}
    assert served.majority["val"] == 0.1


def test_who_goes_on_with_changed_data_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = module(folder).state_dict()
    # one recording is another
    shutil.copytree(folder, tmp_path / "sounds")
    name = next(iter(SIZES))
    soundfile.write(tmp_path / "sounds" / name, draw(name)[::-1], RATE)
    for changed, data in (
        (True, module(tmp_path / "sounds")),
        (False, module(folder)),
        (False, module(folder, num_workers=2, batch_size=2)),
        (True, module(folder / "*_ann_*.wav")),
    ):
        data.trainer = SimpleNamespace(training=True, is_global_zero=True)  # type: ignore[assignment]
        caplog.clear()
        data.load_state_dict(state)
        assert ("the data are others" in caplog.text) is changed
    # a checkpoint of before tells nothing
    data.load_state_dict({"position": 8})
    assert data.position == 8
