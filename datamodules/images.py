"""Pictures in grey, as in Long Range Arena's Image task: CIFAR-10 read pixel after pixel (2011.04006, 2.2)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cache import digest_of_files
from .class_folders import Labelled, find_in_classes
from .classes import sort_classes
from .labelled_rows import Rows, check_fraction, lot, one_row
from .pixels import PixelsDataModule, side_of

# a row of CIFAR-10's binary version: the class, and 32 x 32 pixels in red, then in green, then in blue
_SIDE, _ROW = 32, 1 + 3 * 32 * 32
_CIFAR = {"train": "data_batch_*.bin", "test": "test_batch.bin"}
_CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# how light red, green and blue are, of 65,536 (ITU-R BT.601)
_LUMA = np.array([19595, 38470, 7471])


class ImageDataModule(PixelsDataModule):
    """Pictures of a folder, in grey.

    Args:
        folder: cifar-10-batches-bin, the unpacked binary version of CIFAR-10 (the Python version is not read: it is
            pickled, and to open what is pickled is to run it); or any folder of train/CLASS/NAME.png and, for a test,
            test/CLASS/NAME.png.
        length: pixels of a picture, a square number. Greater pictures are made as small by averaging, where a whole
            number of pixels becomes one.
        valid: which part of the pictures to train on is held out; equal ones are on one side.
        encoding: see PixelsDataModule.
        batch_size, num_workers, seed: see DataModule.
    """

    def __init__(
        self,
        folder: str,
        length: int = 1024,
        valid: float = 0.1,
        encoding: str = "float",
        batch_size: int = 50,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_fraction(valid)
        self.folder, self.valid = Path(folder).expanduser(), valid
        self.batches = {split: sorted(self.folder.glob(pattern)) for split, pattern in _CIFAR.items()}
        self.files = {} if self.batches["train"] else _find(self.folder)
        labels = [file.label for files in self.files.values() for file in files]
        super().__init__(
            sort_classes(labels) if labels else _CIFAR_CLASSES,
            encoding,
            length,
            batch_size,
            num_workers,
            seed,
        )

    def describe(self) -> str:
        return f"pictures of {self.num_classes} classes, batches of {self.batch_size} x {self.length} pixels"

    def digest(self) -> str:
        batches = [path for paths in self.batches.values() for path in paths]
        files = [file.path for files in self.files.values() for file in files]
        names = [path.relative_to(self.folder).as_posix() for path in batches + files]
        return digest_of_files(f"images 1 {self.length} {self.valid} {names}", batches + files)

    def make_rows(self) -> Iterator[tuple[str, Rows]]:
        side = side_of(self.length)
        for split in ("train", "test"):
            for where, picture, label in self._read(split):
                pixels = _shrink(_grey(picture), side, where).reshape(-1)
                held_out = split == "train" and lot(pixels.tobytes()) < self.valid
                yield "val" if held_out else split, one_row(pixels, label)

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield from super().baselines()
        yield "regression on pixels, accuracy", self.pixel_accuracy()

    def _read(self, split: str) -> Iterator[tuple[Path, NDArray[np.uint8], int]]:
        """Where each picture of a split is from, its colours (height, width, 3), and its class."""
        for path in self.batches[split]:
            for row in _read_batch(path):
                yield path, row[1:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0), int(row[0])
        for path, label in self.files.get(split, ()):
            yield path, _read_png(path), self.classes.index(label)


def _find(folder: Path) -> dict[str, list[Labelled]]:
    """The PNG files of a folder.

    Raises:
        FileNotFoundError, ValueError: when there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.folder: there is no folder {folder}")
    files = find_in_classes(folder, ".png")
    if "train" in files:
        return files
    if (folder / "data_batch_1").is_file():
        raise ValueError(
            f"data.folder: {folder} is the Python version of CIFAR-10, which is pickled and could run anything when "
            "it is opened; give the binary version, cifar-10-batches-bin"
        )
    raise ValueError(
        f"data.folder: {folder} has neither data_batch_1.bin to data_batch_5.bin of CIFAR-10 nor train/CLASS/NAME.png"
    )


def _read_batch(path: Path) -> NDArray[np.uint8]:
    """The rows of a file of CIFAR-10 (n, 3073): class, red, green, blue."""
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % _ROW:
        raise ValueError(
            f"{path}: is not whole; it has to be rows of {_ROW} bytes, and has {len(content)} bytes"
        )
    rows = content.reshape(-1, _ROW)
    if rows[:, 0].max() >= len(_CIFAR_CLASSES):
        raise ValueError(f"{path}: there is a class {rows[:, 0].max()} in it; is it CIFAR-10's?")
    return rows


def _read_png(path: Path) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How light each pixel is (height, width)."""
    return ((picture @ _LUMA + (1 << 15)) >> 16).astype(np.uint8)


def _shrink(picture: NDArray[np.uint8], side: int, where: Path) -> NDArray[np.uint8]:
    """A picture of side x side pixels, each the mean of as many."""
    height, width = picture.shape
    if height != width or height % side:
        raise ValueError(
            f"{where}: {width} x {height} pixels do not become {side} x {side}; give squares of as many or of a "
            f"multiple, or another data.length than {side * side}"
        )
    k = height // side
    return np.rint(picture.reshape(side, k, side, k).mean((1, 3))).astype(np.uint8)
