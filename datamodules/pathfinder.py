"""Pathfinder: are two circles the ends of one dashed path (Linsley et al., 1805.08315; Long Range Arena, 2.2)?

Two long paths of dashes wind through a picture, among shorter ones that distract; no two touch. Two circles stand at
both ends of one path (class 1), or each at an end of another (class 0). The picture is read pixel after pixel.

    o - - - .      - -         o - - - .      - -
              :                          :
        - - - o   - - .            - - - .   - - o
      -             - -          -             - -
            1                          0

The pictures are the arena's in kind (paths of 14 dashes, 32 x 32 pixels), not in detail: they are
drawn here anew, by rules of our own, so that what a model reaches on them is not what it reaches on the arena's. In one
respect they are stricter. A drawing is kept only if two ends of one path and two ends of both paths lie alike, as far
from each other and their middle as far from the picture's; then it is the class alone that says which two get circles.
So the ink, the distance of the circles and where they are tell nothing. That a path leaves its circle towards the
other one somewhat more often than not is left as it is: it belongs to the task.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .labelled_rows import Rows
from .order import mix
from .pixels import PixelsDataModule, side_of

# pixels: a dash, the gap behind it, half its width, and a circle's radius
DASH, GAP, HALF_WIDTH, RADIUS = 1.25, 1.75, 0.4, 1.5
# pixels: how near a dash may come to another path, and any to the edge
CLEARANCE, MARGIN = 2.5, 2.0
# how far a path turns from one dash to the next, at most; how many ways on are tried, and how often a path is begun
TURN, TRIES, ATTEMPTS = math.pi / 3, 12, 4
# by how many pixels the ends of one path may be nearer than those of two, to each other or to the edge
TOLERANCE = 1.5
# pictures that are begun at a time; another number gives other pictures
_BLOCK = 1 << 9
# blocks without a picture, after which there will be none
_PATIENCE = 20
# cells of the map of free places, along a pixel
_FINE = 2
# where it is looked for room along a way on: at the ends of a dash, and beyond
_ALONG, _DASH = np.array([0, DASH, DASH + 1.5, DASH + 3, DASH + 4.5]), 2
# pixels round the middle of what is drawn
_REACH = 3
_WINDOW = np.mgrid[-_REACH : _REACH + 1, -_REACH : _REACH + 1].reshape(2, -1).T
_EDGE = _REACH + 1

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class PathfinderDataModule(PixelsDataModule):
    """Pictures of paths, as drawn above; the numbers of pictures and their size are those of Long Range Arena.

    Args:
        length: pixels of a picture, a square number.
        dashes: of a long path.
        distractors: how many short paths there are, of up to a third as many dashes.
        rows: how many there are to train on; as many of either class.
        held_out_rows: how many to validate on, and to test on.
        draw_seed: of the pictures; `seed` is that of their order alone.
        encoding: see PixelsDataModule.
        batch_size, num_workers, seed: see DataModule.
    """

    def __init__(
        self,
        length: int = 1024,
        dashes: int = 14,
        distractors: int = 5,
        rows: int = 160_000,
        held_out_rows: int = 20_000,
        draw_seed: int = 0,
        encoding: str = "float",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(["two paths", "one path"], encoding, length, batch_size, num_workers, seed)
        if dashes < 3:
            raise ValueError(f"data.dashes: must be 3 or more, not {dashes}")
        if distractors < 0:
            raise ValueError(f"data.distractors: must be 0 or more, not {distractors}")
        if rows < 1 or held_out_rows < 1:
            raise ValueError(
                f"data.rows, data.held_out_rows: must be 1 or more, not {rows} and {held_out_rows}"
            )
        self.scenery = Scenery(side_of(length), dashes, distractors)
        self.counts = {"train": rows, "val": held_out_rows, "test": held_out_rows}
        self.draw_seed = draw_seed

    def describe(self) -> str:
        return f"{sum(self.counts.values())} pictures of paths, batches of {self.batch_size} x {self.length}"

    def digest(self) -> str:
        values = [
            self.scenery.side,
            self.scenery.dashes,
            self.scenery.distractors,
            self.counts,
            self.draw_seed,
        ]
        return f"pathfinder 1 {json.dumps(values)}"

    def baselines(self) -> Iterator[tuple[str, float]]:
        yield from super().baselines()
        yield "regression on pixels, accuracy", self.pixel_accuracy()

    def make_rows(self) -> Iterator[tuple[str, Rows]]:
        block, idle = 0, 0
        for split, count in self.counts.items():
            left = count
            while left:
                random = np.random.Generator(np.random.SFC64(mix(self.draw_seed, block)))
                pictures, labels = self.scenery.draw(random, _BLOCK)
                block, idle = block + 1, 0 if len(labels) else idle + 1
                if idle == _PATIENCE:
                    raise ValueError(
                        f"data.dashes: two paths of {self.scenery.dashes} do not fit into {self.scenery.side} x "
                        f"{self.scenery.side} pixels; give fewer, or a greater data.length"
                    )
                pictures, labels = pictures[:left], labels[:left]
                left -= len(labels)
                yield split, Rows(pictures.reshape(-1), np.full(len(labels), self.length), labels)


@dataclass(frozen=True)
class Scenery:
    """What is in a picture: its side in pixels, the dashes of a long path, and the number of short ones."""

    side: int
    dashes: int
    distractors: int

    def draw(self, random: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Those of `count` pictures that come out: (n, side, side), and whether one path has both circles (n,)."""
        room = Room(self.side, count)
        paths: list[Floats] = []
        for _ in range(2):
            path, whole = room.wind_whole(random, self.dashes)
            room, paths = room.select(whole), [*(other[whole] for other in paths), path[whole]]
            room.take(_ends(paths[-1]), RADIUS + CLEARANCE / 2)
        one, two, alike = _alike(random, np.concatenate([_ends(path) for path in paths], axis=1), self.side)
        # as many pictures of either class
        kept = np.flatnonzero(alike)[: alike.sum() // 2 * 2]
        room, labels = room.select(kept), np.arange(len(kept)) % 2
        short = [room.wind(random, max(1, self.dashes // 3)) for _ in range(self.distractors)]
        lines = np.concatenate([*(path[kept] for path in paths), *short], axis=1)
        circles = np.where(labels[:, None, None] == 1, one[kept], two[kept])
        return _ink(lines, circles, self.side), labels


def _ends(path: Floats) -> Floats:
    """Both ends (n, 2, 2) of paths (n, k, 2, 2)."""
    return np.stack([path[:, 0, 0], path[:, -1, 1]], axis=1)


def _alike(random: np.random.Generator, ends: Floats, side: int) -> tuple[Floats, Floats, Flags]:
    """Of both ends of both paths (n, 4, 2), two of one path and two of both that lie alike, by lot.

    Returns both pairs (n, 2, 2), and where there are such (n,).
    """
    same, across = ends[:, [(0, 1), (2, 3)]], ends[:, [(0, 2), (0, 3), (1, 2), (1, 3)]]
    alike = np.ones((len(ends), 2, 4), bool)
    apart = [pairs[:, :, 0] - pairs[:, :, 1] for pairs in (same, across)]
    astray = [pairs.mean(2) - side / 2 for pairs in (same, across)]
    for one, two in (apart, astray):
        lengths = np.linalg.norm(one, axis=-1)[:, :, None], np.linalg.norm(two, axis=-1)[:, None]
        alike &= np.abs(lengths[0] - lengths[1]) < TOLERANCE
    chosen = (random.random(alike.shape) * alike).reshape(len(ends), 8).argmax(1)
    rows = np.arange(len(ends))
    return same[rows, chosen // 4], across[rows, chosen % 4], np.any(alike, axis=(1, 2))


class Room:
    """Which places are still free, in many pictures side by side. Places are (row, column) in pixels."""

    def __init__(self, side: int, count: int) -> None:
        self.side = side
        self.free = np.ones((count, _FINE * side, _FINE * side), bool)

    def select(self, rows: NDArray[Any]) -> "Room":
        """A copy of the room in some of the pictures."""
        chosen = Room(self.side, 0)
        chosen.free = self.free[rows]
        return chosen

    def wind_whole(self, random: np.random.Generator, count: int) -> tuple[Floats, Flags]:
        """As `wind`, but begun again where a path ends early; and where there is a whole one (n,)."""
        paths = np.full((len(self.free), count, 2, 2), np.nan)
        for _ in range(ATTEMPTS):
            rows = np.flatnonzero(np.isnan(paths[:, -1, 0, 0]))
            trial = self.select(rows)
            paths[rows] = trial.wind(random, count)
            whole = ~np.isnan(paths[rows, -1, 0, 0])
            self.free[rows[whole]] = trial.free[whole]
        return paths, ~np.isnan(paths[:, -1, 0, 0])

    def wind(self, random: np.random.Generator, count: int) -> Floats:
        """A path in each picture, from wherever there is room to where there is none, or to its last dash.

        Returns the start and the end of every dash (n, count, 2, 2), NaN where there is none.
        """
        path = np.full((len(self.free), count, 2, 2), np.nan)
        rows, heading = np.arange(len(self.free)), np.empty(0)
        for number in range(count):
            lots = random.random((3, len(rows), TRIES))
            if number == 0:
                starts, headings = self.side * lots[:2].transpose(1, 2, 0), 2 * np.pi * lots[2]
            else:
                start = path[rows, number - 1, 1] + GAP * _unit(heading)
                starts, headings = (
                    start[:, None].repeat(TRIES, 1),
                    heading[:, None] + TURN * (2 * lots[2] - 1),
                )
            ways = starts[:, :, None] + _ALONG[:, None] * _unit(headings)[:, :, None]
            free = self.has_room(rows, ways)
            room = np.all(free[..., :_DASH], axis=-1)
            # of the ways on, the one that is free the farthest
            best = (room * (1 + free.cumprod(-1).sum(-1))).argmax(1)
            # a dash starts in the clearance of the one before it, which is therefore taken only now
            if number:
                self.take(path[rows, number - 1], CLEARANCE, rows)
            going = room.any(1)
            chosen = np.flatnonzero(going), best[going]
            rows, heading = rows[going], headings[chosen]
            path[rows, number, 0], path[rows, number, 1] = ways[chosen][:, 0], ways[chosen][:, _DASH - 1]
        self.take(path[rows, -1], CLEARANCE, rows)
        return path

    def has_room(self, rows: NDArray[np.int64], places: Floats) -> Flags:
        """Whether places (n, ..., 2) in some of the pictures (n,) are free and inside."""
        inside = ((places > MARGIN) & (places < self.side - MARGIN)).all(-1)
        cells = np.clip(places * _FINE, 0, _FINE * self.side - 1).astype(np.int64)
        rows = rows.reshape(-1, *[1] * (places.ndim - 2))
        return inside & self.free[rows, cells[..., 0], cells[..., 1]]

    def take(self, places: Floats, clearance: float, rows: NDArray[np.int64] | None = None) -> None:
        """Leave nothing free near places (n, k, 2)."""
        rows = np.arange(len(self.free)) if rows is None else rows
        near = _disc(_FINE * clearance)
        cells = np.clip((places * _FINE).astype(np.int64)[:, :, None] + near, 0, _FINE * self.side - 1)
        self.free[rows[:, None, None], cells[..., 0], cells[..., 1]] = False


def _ink(lines: Floats, circles: Floats, side: int) -> NDArray[np.uint8]:
    """Draw lines (n, k, 2, 2) and circles (n, m, 2): pictures (n, side, side), a pixel as light as it is covered."""
    # with an edge all round, so that nothing is cut while it is drawn
    paper = np.zeros((len(lines), side + 2 * _EDGE, side + 2 * _EDGE))
    dots = circles[:, :, None].repeat(2, axis=2)
    for ends, radius in ((lines, HALF_WIDTH), (dots, RADIUS)):
        for number in range(ends.shape[1]):
            rows = np.flatnonzero(~np.isnan(ends[:, number, 0, 0]))
            start, end = ends[rows, number].transpose(1, 0, 2)
            corner = np.floor((start + end) / 2).astype(np.int64)[:, None] + _WINDOW
            along, pixels = (end - start)[:, None], corner + 0.5 - start[:, None]
            share = (pixels * along).sum(-1) / np.maximum(1e-9, (along**2).sum(-1))
            away = np.linalg.norm(pixels - np.clip(share, 0, 1)[..., None] * along, axis=-1)
            where = rows[:, None], corner[..., 0] + _EDGE, corner[..., 1] + _EDGE
            paper[where] = np.maximum(paper[where], np.clip(radius + 0.5 - away, 0, 1))
    return np.rint(255 * paper[:, _EDGE:-_EDGE, _EDGE:-_EDGE]).astype(np.uint8)


def _disc(radius: float) -> NDArray[np.int64]:
    """All (row, column) (k, 2) no farther than a radius from the middle."""
    reach = int(radius)
    square = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    return square[(square**2).sum(1) <= radius**2]


def _unit(headings: Floats) -> Floats:
    return np.stack([np.sin(headings), np.cos(headings)], axis=-1)
