"""Folders of classes, as many data sets come: FOLDER/train/CLASS/FILE, and FOLDER/test/CLASS/FILE to test on."""

from pathlib import Path
from typing import NamedTuple

# beside the classes there may be files of none, as in aclImdb
_UNLABELLED = ("unsup",)


class Labelled(NamedTuple):
    """A file, and the class that its folder is called by."""

    path: Path
    label: str


def find_in_classes(folder: Path, suffix: str) -> dict[str, list[Labelled]]:
    """The files of a suffix in the classes of "train" and "test", those of the two that have some."""
    found = {}
    for split in ("train", "test"):
        paths = sorted(folder.glob(f"{split}/*/*{suffix}"))
        files = [Labelled(path, path.parent.name) for path in paths if path.parent.name not in _UNLABELLED]
        if files:
            found[split] = files
    return found
