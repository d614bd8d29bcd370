"""Classes: what recordings are labelled with, the order of labels, and how often each occurs."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike

FOLDER = "folder"
TABLES = (".csv", ".tsv")


def sort_classes(labels: Iterable[str]) -> list[str]:
    """Each of the labels once, in order, numbers by their value.

    Raises:
        ValueError: when there are not two.
    """
    classes = set(labels)
    if len(classes) < 2:
        raise ValueError(
            f"data.paths: all sequences have the label {''.join(classes)!r}; a classifier needs two"
        )
    numbers = all(label.isascii() and label.isdigit() for label in classes)
    return sorted(classes, key=lambda label: (int(label) if numbers else 0, label))


def count_classes(numbers: ArrayLike, classes: list[str]) -> tuple[list[int], float, str]:
    """How many there are of each class, the share of the commonest, and both in words."""
    counts = np.bincount(np.asarray(numbers, dtype=np.int64), minlength=len(classes)).tolist()
    majority = max(counts) / sum(counts)
    words = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
    return counts, majority, f"{words}; majority {majority:.4f}"


def label_recordings(names: list[str], labels: str) -> dict[str, str]:
    """The label of each recording that has one: its folder, what a regular expression finds, or a table's.

    Args:
        labels: "folder"; a regular expression whose first group, found in the name, is the label; or a .csv or .tsv
            with the columns file and label, where a file is a name or the end of one after a "/".

    Raises:
        ValueError: for a name that has no folder or that the expression does not find, for a table that is none, and
            for files in it that there are not.
    """
    if labels.lower().endswith(TABLES):
        return _from_table(names, Path(labels).expanduser())
    if labels == FOLDER:
        found = {name: PurePosixPath(name).parent.name for name in names}
        problem = "is in no folder, which would be its label; give the folder that holds its folder"
    else:
        found = find_groups(names, labels, "data.labels")
        problem = ""
    for name, label in found.items():
        if not label:
            raise ValueError(f"data.labels: {name} {problem or 'has an empty label'}")
    return found


def find_groups(names: list[str], given: str, key: str) -> dict[str, str]:
    """What the first group of a regular expression matches in each name.

    Raises:
        ValueError: when it is no expression with a group, or finds nothing in a name.
    """
    compiled, found = expression(given, key), {}
    for name in names:
        match = compiled.search(name)
        if match is None or match[1] is None:
            raise ValueError(f"{key}: {given!r} finds nothing in {name}")
        found[name] = match[1]
    return found


def expression(given: str, key: str) -> re.Pattern[str]:
    """A regular expression with a group.

    Raises:
        ValueError: when it is none.
    """
    try:
        compiled = re.compile(given)
    except re.error as error:
        raise ValueError(f"{key}: {given!r} is no regular expression ({error})") from None
    if compiled.groups < 1:
        raise ValueError(f"{key}: put what is meant in {given!r} between parentheses, as in (\\d)_")
    return compiled


def _from_table(names: list[str], path: Path) -> dict[str, str]:
    ends: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        for i in range(len(parts)):
            ends.setdefault("/".join(parts[i:]), []).append(name)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            if not {"file", "label"} <= set(rows.fieldnames or ()):
                raise ValueError(f"{path}, line 1: has to name the columns file and label")
            found: dict[str, str] = {}
            for row in rows:
                at, given, label = f"{path}, line {rows.line_num}", row["file"], (row["label"] or "").strip()
                # an exact name is no part of another
                matches = [given] if given in ends.get(given, ()) else ends.get(given, [])
                if len(matches) != 1:
                    many = "several recordings are" if matches else "no recording is"
                    raise ValueError(f"{at}: {many} called {given!r}")
                if not label:
                    raise ValueError(f"{at}: the label is empty")
                if found.setdefault(matches[0], label) != label:
                    raise ValueError(f"{at}: {given} has two labels, {found[matches[0]]} and {label}")
    except FileNotFoundError:
        raise FileNotFoundError(f"data.labels: there is no file {path}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no table of text ({error})") from None
    if not found:
        raise ValueError(f"{path}: there is no row in it")
    return found
