"""Training, validation and test parts of recordings: by names, by speaker, by lot, or by time.

No recording is in two of them, except by time, where the held-out part is the end of each and shares no sample with
what comes before. Of several speakers hold out whole ones: a voice that was heard in training measures memory.
"""

import difflib
import hashlib
import itertools
import logging
from fnmatch import fnmatchcase
from pathlib import Path

from .classes import find_groups
from .recordings import Recordings

log = logging.getLogger(__name__)

# a fraction, or names of recordings or speakers, globs, or .txt files of them
Selection = float | str | list[str]
KEYS = {"train": "data.train", "val": "data.valid", "test": "data.test"}
# from where to where in all samples
Places = list[tuple[int, int]]
# of recordings that are in two splits, so many are named
_NAMED = 5


def split_recordings(
    recordings: Recordings,
    train: str | list[str] | None,
    valid: Selection,
    test: Selection | None,
    *,
    speaker: str | None = None,
    by_time: bool = False,
) -> dict[str, Places]:
    """The places of "train", "val" and, if asked for, "test" among all samples, each recording's own.

    Without `train`, all that is not held out is trained on. A fraction is one of the speakers where there are any, else
    of the recordings, at least one, drawn by their names, recordings that are equal together; or by time it is the last
    part of each recording, test after validation. It is taken from what the names leave. A warning names equal
    recordings in two splits.

    Raises:
        ValueError: for a name or glob that matches nothing, a recording that is selected twice, a fraction that takes
            all or a split that has nothing.
    """
    chosen = {"train": train, "val": valid, "test": test}
    speakers = {} if speaker is None else find_groups(recordings.names, speaker, "data.speaker")
    named = {
        split: _select(recordings, speakers, [given] if isinstance(given, str) else given, KEYS[split])
        for split, given in chosen.items()
        if isinstance(given, str | list)
    }
    _refuse_overlap(recordings, named)
    held = {i for split, indices in named.items() if split != "train" for i in indices}
    rest = [i for i in named.get("train", range(len(recordings))) if i not in held]
    fractions = {split: given for split, given in chosen.items() if isinstance(given, float | int)}
    bounds = recordings.places
    if by_time:
        # equal recordings are cut at the same place
        groups = {"train": rest}
        splits = _cut([bounds[i] for i in rest], fractions)
    else:
        groups = _draw(recordings, speakers, rest, fractions)
        splits = {split: [bounds[i] for i in indices] for split, indices in groups.items()}
    _warn_of_leaks(recordings, named | groups)
    splits |= {split: [bounds[i] for i in indices] for split, indices in named.items() if split != "train"}
    for split, places in splits.items():
        if not places:
            raise ValueError(
                f"{KEYS[split]}: there is not a recording in it; hold out less, give more, or hold out by time"
            )
    return {split: splits[split] for split in KEYS if split in splits}


def _select(recordings: Recordings, speakers: dict[str, str], given: list[str], key: str) -> list[int]:
    """The recordings that names, globs and lists of them mean."""
    items = []
    for item in given:
        if item.endswith(".txt"):
            path = Path(item).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"{key}: there is no file {item}")
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{key}: {item} is no text in UTF-8 ({error.reason}); save it as that"
                ) from None
            items += [line.strip() for line in lines if line.strip()]
        else:
            items.append(item)
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(recordings.names):
        by_name.setdefault(name, []).append(i)
        if name in speakers:
            by_name.setdefault(speakers[name], []).append(i)
    found: set[int] = set()
    for item in items:
        matches = by_name.get(item) or [
            i for name, indices in by_name.items() if fnmatchcase(name, item) for i in indices
        ]
        # what was left out since it cannot be read is no mistake of the list
        if not matches and item not in recordings.skipped:
            near = difflib.get_close_matches(item, list(by_name), 1)
            hint = f"; is it {near[0]}?" if near else f"; there is {recordings.names[0]}"
            raise ValueError(f"{key}: no recording{' or speaker' * bool(speakers)} is called {item!r}{hint}")
        found.update(matches)
    return sorted(found)


def _refuse_overlap(recordings: Recordings, named: dict[str, list[int]]) -> None:
    owners: dict[int, str] = {}
    for split, indices in named.items():
        for i in indices:
            if (owner := owners.setdefault(i, split)) != split:
                raise ValueError(f"{KEYS[split]}: {recordings.names[i]} is in {KEYS[owner]} too")


def _warn_of_leaks(recordings: Recordings, groups: dict[str, list[int]]) -> None:
    """Name the recordings of a split whose samples are those of one of another."""
    for first, second in itertools.combinations([split for split in KEYS if split in groups], 2):
        seen = {recordings.digests[i]: recordings.names[i] for i in groups[first]}
        twice = [
            f"{recordings.names[i]} = {seen[recordings.digests[i]]}"
            for i in groups[second]
            if recordings.digests[i] in seen
        ]
        if twice:
            more = f" and {len(twice) - _NAMED} more" if len(twice) > _NAMED else ""
            log.warning(
                "%d recordings of %s have the same samples as ones of %s: %s%s; hold out other ones",
                len(twice), KEYS[second], KEYS[first], ", ".join(twice[:_NAMED]), more,
            )  # fmt: skip


def _draw(
    recordings: Recordings, speakers: dict[str, str], rest: list[int], fractions: dict[str, float]
) -> dict[str, list[int]]:
    """Recordings drawn by speaker, or by name, for each fraction; the others are for training."""
    groups: dict[str, list[int]] = {}
    # of recordings that are equal the first one's name decides
    names = dict(zip(reversed(recordings.digests), reversed(recordings.names), strict=True))
    for i in rest:
        group = speakers.get(recordings.names[i]) or names[recordings.digests[i]]
        groups.setdefault(group, []).append(i)
    order = sorted(groups, key=lambda group: hashlib.blake2b(group.encode(), digest_size=8).digest())
    splits = {}
    for split, fraction in fractions.items():
        count = max(1, round(fraction * len(groups)))
        splits[split] = sorted(i for group in order[:count] for i in groups[group])
        order = order[count:]
    return {"train": sorted(i for group in order for i in groups[group]), **splits}


def _cut(places: Places, fractions: dict[str, float]) -> dict[str, Places]:
    """Each recording cut into its first part, for training, and its last, for validation and then test."""
    splits: dict[str, Places] = {"train": [], **{split: [] for split in fractions}}
    for start, end in places:
        size, stop = end - start, end
        for split in ("test", "val"):
            if split in fractions:
                cut = max(start, stop - round(size * fractions[split]))
                splits[split].append((cut, stop))
                stop = cut
        splits["train"].append((start, stop))
    return {split: [(a, b) for a, b in found if a < b] for split, found in splits.items()}
