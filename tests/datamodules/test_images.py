"""Pictures in grey: CIFAR-10's binary files and folders of PNG give the same pixels; what is pickled is not opened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mambazoo.datamodules.images import ImageDataModule
from numpy.typing import NDArray
from PIL import Image


def build(folder: Path, **values: Any) -> ImageDataModule:
    data = ImageDataModule(str(folder), **{"batch_size": 4, **values})
    data.prepare_data()
    data.setup("fit")
    return data


def read(data: ImageDataModule, *splits: str) -> list[tuple[str, bytes]]:
    samples = [data.samples[split].read(i, 0) for split in splits for i in range(len(data.samples[split]))]
    return sorted((data.classes[sample["label"]], sample["tokens"].tobytes()) for sample in samples)


def colours(path: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    """The class and the colours (32, 32, 3) of every picture of a file."""
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073)
    return [(int(row[0]), row[1:].reshape(3, 32, 32).transpose(1, 2, 0)) for row in rows]


def test_the_binary_version_of_cifar_is_read_in_grey(cifar: Path) -> None:
    data = build(cifar)
    assert data.classes[:2] == ["airplane", "automobile"]
    grey = {
        split: sorted(
            (data.classes[label], np.asarray(Image.fromarray(picture).convert("L")).tobytes())
            for path in sorted(cifar.glob(pattern))
            for label, picture in colours(path)
        )
        for split, pattern in (("train", "data_batch_*"), ("test", "test_batch*"))
    }
    assert read(data, "train", "val") == grey["train"]
    assert read(data, "test") == grey["test"]
    assert 0 < len(data.samples["val"]) < 10
    batch = next(iter(data.train_dataloader()))
    assert batch["inputs"].shape == (4, 1024, 1)
    assert "lengths" not in batch


def test_folders_of_png_are_read(cifar: Path, tmp_path: Path) -> None:
    expected = build(cifar, valid=0.2)
    for split, pattern in (("train", "data_batch_*"), ("test", "test_batch*")):
        for path in cifar.glob(pattern):
            for i, (label, picture) in enumerate(colours(path)):
                file = tmp_path / "png" / split / expected.classes[label] / f"{path.stem}_{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
    data = build(tmp_path / "png", valid=0.2)
    assert data.classes == expected.classes
    for split in ("train", "val", "test"):
        assert read(data, split) == read(expected, split)


def test_equal_pictures_are_on_one_side(cifar: Path) -> None:
    (cifar / "data_batch_3.bin").write_bytes((cifar / "data_batch_1.bin").read_bytes())
    data = build(cifar, valid=0.3)
    assert not set(read(data, "train")) & set(read(data, "val"))


def test_greater_pictures_are_averaged(cifar: Path) -> None:
    large, small = (build(cifar, length=length).samples["test"] for length in (1024, 256))
    for i in range(20):
        means = large.read(i, 0)["tokens"].reshape(16, 2, 16, 2).mean((1, 3))
        assert np.abs(means - small.read(i, 0)["tokens"].reshape(16, 16)).max() <= 0.5
    with pytest.raises(ValueError, match=r"32 x 32 pixels do not become 12 x 12"):
        build(cifar, length=144)


def test_what_is_pickled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="is the Python version of CIFAR-10, which is pickled"):
        ImageDataModule(str(tmp_path))


def test_what_is_no_picture_is_refused(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.folder: there is no folder"):
        ImageDataModule(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither data_batch_1\.bin"):
        ImageDataModule(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"data\.valid: a fraction must be between 0 and 1"):
        ImageDataModule(str(cifar), valid=1.0)
    for label in "ab":
        (tmp_path / "png" / "train" / label).mkdir(parents=True)
        (tmp_path / "png" / "train" / label / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png: cannot be read as a picture"):
        build(tmp_path / "png")
    batch = cifar / "data_batch_2.bin"
    batch.write_bytes(b"\x0b" + batch.read_bytes()[1:])
    with pytest.raises(ValueError, match="there is a class 11 in it"):
        build(cifar)
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: is not whole"):
        build(cifar)
