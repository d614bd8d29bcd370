"""Which rank a run waits for, by what ranks tell of themselves; test_parallel_ends.py has runs that end for it."""

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist
from mambazoo.zoo.heartbeat import PATIENCE, Heartbeat, Sign, Watch, place

# beats of the rank that listens in its timeout
LIMIT = 10


class Ranks:
    """Three ranks that tell where they are, and the watch of one that listens."""

    def __init__(self, listener: int = 0) -> None:
        trainer: Any = SimpleNamespace(global_rank=listener, world_size=3)
        self.watch = Watch(trainer, None, timeout=float(LIMIT), starter=None)
        self.beats, self.moves = [0] * 3, [0] * 3

    def pass_(self, beats: int, silent: tuple[int, ...] = (), moving: tuple[int, ...] = ()) -> list[str]:
        """Let time pass; what the listener objects to."""
        problems = []
        for _ in range(beats):
            for rank in range(3):
                self.beats[rank] += rank not in silent
                self.moves[rank] += rank in moving
            self.watch.heard = {
                rank: Sign(self.beats[rank], self.moves[rank], 7, f"node{rank}", "read (data.py:3)")
                for rank in range(3)
                if self.beats[rank] and (self.watch.rank == 0 or rank == 0)
            }
            problems += [problem for problem in [self.watch.judge()] if problem]
        return problems


def test_a_rank_that_tells_nothing_is_lost() -> None:
    ranks = Ranks()
    assert ranks.pass_(3 * LIMIT, moving=(0, 1, 2)) == []
    assert ranks.pass_(LIMIT - 1, silent=(2,)) == []
    # it was only slow
    assert ranks.pass_(3) == []
    *_, last = ranks.pass_(LIMIT, silent=(1, 2))
    assert last.splitlines() == [
        f"rank {rank} on node{rank} has not been heard of for 10 s, since it was in step 8, in read (data.py:3)"
        for rank in (1, 2)
    ]


def test_a_rank_that_never_told_anything_is_lost() -> None:
    *_, last = Ranks().pass_(LIMIT, silent=(1,))
    assert last == "rank 1 has not been heard of for 10 s, since the run started"


def test_a_rank_that_others_wait_for_is_stuck() -> None:
    ranks = Ranks()
    # what one does alone between two batches keeps the others in the same one
    assert ranks.pass_(PATIENCE * LIMIT) == []
    # it need not be first to go on
    assert ranks.pass_(1, moving=(0, 1)) == ranks.pass_(LIMIT - 2) == []
    assert ranks.pass_(1, moving=(2,)) == ranks.pass_(LIMIT) == []
    *_, last = ranks.pass_(LIMIT, moving=(0, 1))
    assert last.startswith(
        "rank 2 on node2 has not moved for 10 s, while others wait for it: it is in step 8"
    )


def test_ranks_that_all_stand_are_given_longer_and_all_named() -> None:
    ranks = Ranks()
    ranks.pass_(5, moving=(0, 1, 2))
    assert ranks.pass_(PATIENCE * LIMIT - 1) == []
    [problem] = ranks.pass_(1)
    assert problem.startswith("no rank has moved for 30 s:\n  rank 0 on node0 is in step 8, in read")
    assert len(problem.splitlines()) == 4


def test_the_others_listen_to_the_first_alone() -> None:
    ranks = Ranks(listener=2)
    assert ranks.pass_(2 * PATIENCE * LIMIT, silent=(1,)) == []
    *_, last = ranks.pass_(LIMIT, silent=(0, 1))
    assert last.startswith("rank 0 on node0 has not been heard of for 10 s")


def test_a_rank_that_fails_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambazoo.zoo.heartbeat.ranks", lambda: 3)
    monkeypatch.setattr("mambazoo.zoo.heartbeat.wait_at_most", lambda seconds: None)
    monkeypatch.setattr("mambazoo.zoo.heartbeat.table", lambda name: dist.HashStore())
    ended = threading.Event()
    monkeypatch.setattr(Watch, "_leave", lambda watch: ended.set())
    monkeypatch.setattr(Watch, "_say", lambda watch, problem: None)
    heartbeat, trainer = Heartbeat(0.2), cast(Any, SimpleNamespace(global_rank=0, world_size=3))
    for fails in (True, False):
        heartbeat.setup(trainer, trainer, "fit")
        if fails:
            heartbeat.on_exception(trainer, trainer, FloatingPointError())
        # the others have left
        assert ended.wait(1 if fails else 60) is not fails
    heartbeat.teardown(trainer, trainer, "fit")


def test_a_place_is_a_line_and_what_of_this_package_called_it() -> None:
    assert place().startswith("place (heartbeat.py:")


def test_a_timeout_is_some_time() -> None:
    with pytest.raises(ValueError, match=r"callbacks.heartbeat.timeout: must be above 0 seconds, not 0"):
        Heartbeat(0)
