"""Pathfinder: the class is what joins the circles, and nothing simpler tells it; pictures are drawn the same again."""

from typing import Any

import numpy as np
import pytest
import torch
from mambazoo.datamodules import pathfinder
from mambazoo.datamodules.baselines import regression_accuracy
from mambazoo.datamodules.pathfinder import PathfinderDataModule, Room, Scenery
from numpy.typing import NDArray

SMALL: dict[str, Any] = {"length": 256, "dashes": 4, "distractors": 1, "rows": 60, "held_out_rows": 20}


def build(**values: Any) -> PathfinderDataModule:
    data = PathfinderDataModule(**{"batch_size": 8, **SMALL, **values})
    data.prepare_data()
    data.setup("fit")
    return data


def pictures(data: PathfinderDataModule, split: str) -> list[bytes]:
    return [
        data.samples[split].read(i, 0)["tokens"].tobytes() + bytes([data.samples[split].read(i, 0)["label"]])
        for i in range(len(data.samples[split]))
    ]


@pytest.fixture(scope="module")
def drawn() -> dict[str, NDArray[Any]]:
    """Many of the arena's pictures, and where their lines and circles are."""
    found: dict[str, list[NDArray[Any]]] = {"lines": [], "circles": [], "pictures": [], "labels": []}
    ink = pathfinder._ink

    def watched(lines: Any, circles: Any, side: int) -> Any:
        found["lines"].append(lines)
        found["circles"].append(circles)
        return ink(lines, circles, side)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathfinder, "_ink", watched)
        for seed in range(20):
            rows, labels = Scenery(32, 14, 5).draw(np.random.default_rng(seed), 512)
            found["pictures"].append(rows)
            found["labels"].append(labels)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_circles_stand_at_the_ends_of_one_path_or_of_two(drawn: dict[str, NDArray[Any]]) -> None:
    lines, circles, labels = (drawn[name] for name in ("lines", "circles", "labels"))
    paths = lines[:, :14], lines[:, 14:28]
    ends = np.stack([end for path in paths for end in (path[:, 0, 0], path[:, -1, 1])], axis=1)
    at = (np.abs(ends[:, :, None] - circles[:, None]).sum(-1) == 0).any(2)
    assert (at.sum(1) == 2).all()
    one = at[:, :2].all(1) | at[:, 2:].all(1)
    assert (one == labels).all()
    assert labels.mean() == 0.5


def test_paths_go_on_and_touch_no_other(drawn: dict[str, NDArray[Any]]) -> None:
    lines = drawn["lines"]
    assert lines.shape[1:] == (14 + 14 + 5 * 4, 2, 2)
    assert not np.isnan(lines[:, :28]).any()
    assert np.nanmin(lines) > 2
    assert np.nanmax(lines) < 30
    for path in (lines[:, :14], lines[:, 14:28]):
        gaps = np.linalg.norm(path[:, 1:, 0] - path[:, :-1, 1], axis=-1)
        np.testing.assert_allclose(gaps, pathfinder.GAP)
        along = path[:, :, 1] - path[:, :, 0]
        cosines = (along[:, 1:] * along[:, :-1]).sum(-1) / pathfinder.DASH**2
        assert cosines.min() > np.cos(pathfinder.TURN) - 1e-9
    ones, others = lines[:, :14].reshape(-1, 28, 2), lines[:, 14:28].reshape(-1, 28, 2)
    apart = np.linalg.norm(ones[:, :, None] - others[:, None], axis=-1)
    # as far as the map of free places knows it, in cells of half a pixel
    assert apart.min() > pathfinder.CLEARANCE - 2 * 0.5 * np.sqrt(2)


def test_pictures_are_bright_where_circles_are(drawn: dict[str, NDArray[Any]]) -> None:
    rows, circles = drawn["pictures"], drawn["circles"]
    assert rows.dtype == np.uint8
    assert rows.shape[1:] == (32, 32)
    for i in range(2):
        y, x = circles[:, i].astype(int).T
        assert (rows[np.arange(len(rows)), y, x] == 255).all()
    # dashes on a dark ground
    assert (rows == 0).mean() > 0.5
    assert (rows.reshape(len(rows), -1) > 80).sum(1).min() > 20


def test_nothing_simple_tells_the_class(drawn: dict[str, NDArray[Any]]) -> None:
    rows, circles, labels = drawn["pictures"], drawn["circles"], drawn["labels"]
    lots = np.random.default_rng(0).permutation(len(rows))
    half = len(rows) // 2
    middle = circles.mean(1) - 16
    features = {
        "ink": np.stack([(rows > level).sum((1, 2)) for level in (0, 80, 160)], axis=1),
        "distance": np.linalg.norm(circles[:, 0] - circles[:, 1], axis=1)[:, None],
        "middle": np.linalg.norm(middle, axis=1)[:, None],
        "places": np.sort(circles, axis=1).reshape(-1, 4),
        "pixels": rows.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64),
    }
    for name, values in features.items():
        values = values.astype(np.float32)
        train, held_out = ((values[part], labels[part]) for part in (lots[:half], lots[half:]))
        # of 850 held out, the deviation of a guess is 1.7 %
        assert abs(regression_accuracy(train, held_out, 2, 1e-3) - 0.5) < 0.06, name


def test_pictures_are_the_same_again_and_none_is_in_two_splits() -> None:
    data = build()
    found = {split: pictures(data, split) for split in ("train", "val", "test")}
    assert [len(found[split]) for split in found] == [60, 20, 20]
    assert len({picture for split in found.values() for picture in split}) == 100
    assert data.majority == {"train": 0.5, "val": 0.5, "test": 0.5}
    assert pictures(build(seed=3), "train") == found["train"]
    assert pictures(build(draw_seed=3), "train") != found["train"]


def test_pixels_are_numbers_or_tokens() -> None:
    floats, tokens = (build(encoding=encoding) for encoding in ("float", "tokens"))
    assert (floats.vocab_size, tokens.vocab_size, floats.num_classes) == (None, 256, 2)
    one, other = (
        data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0) for data in (floats, tokens)
    )
    assert one["inputs"].shape == (8, 256, 1)
    assert (one["inputs"].dtype, other["inputs"].dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(one["inputs"][..., 0], other["inputs"] / 127.5 - 1)
    assert (one["inputs"].min(), one["inputs"].max()) == (-1, 1)
    assert torch.equal(one["labels"], other["labels"])


def test_the_arenas_numbers_are_the_defaults() -> None:
    data = PathfinderDataModule()
    assert (data.length, data.counts) == (1024, {"train": 160_000, "val": 20_000, "test": 20_000})


def test_a_path_ends_where_there_is_no_room() -> None:
    room = Room(32, 3)
    room.free[1] = False
    path = room.wind(np.random.default_rng(0), 5)
    assert np.isnan(path[1]).all()
    assert not np.isnan(path[[0, 2], 0]).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 1000}, "data.length: must be the pixels of a square picture, as 1024"),
        ({"encoding": "bytes"}, "data.encoding: must be one of float, tokens, not 'bytes'"),
        ({"dashes": 2}, "data.dashes: must be 3 or more"),
        ({"distractors": -1}, "data.distractors"),
        ({"held_out_rows": 0}, "data.rows, data.held_out_rows"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathfinderDataModule(**{**SMALL, **values})


def test_paths_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "_BLOCK", 16)
    with pytest.raises(ValueError, match=r"data\.dashes: two paths of 30 do not fit into 16 x 16 pixels"):
        build(dashes=30)
