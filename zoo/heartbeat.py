"""Ending a run whose ranks wait for one that is stuck, and saying which: each tells where it is, the first listens.

Ranks that wait do so inside PyTorch, where they neither raise nor hear a signal. So two threads go beside each of them:
one tells and reads, through a table that may keep it waiting when the rank that has it is the one that is stuck; the
other counts what is heard, and acts.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import astuple, dataclass
from types import FrameType
from typing import Any, NoReturn

import lightning as L

from .ranks import ranks, table, wait_at_most

# what all processes of such a run leave with: of sysexits.h, what may be tried again
EXIT_CODE = 75
# how many times longer all ranks may stand: one may be saving, or each of them compiling
PATIENCE = 3
# seconds from beat to beat, at most
_EVERY = 2.0
# beats in which every rank has read what the first says: its own, the reader's, and one to be sure
_READ = 3
# what the first rank writes down to have all of them leave
_END = "end"
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself."""

    # how often it has
    beats: int
    # batches that it has begun or ended
    moves: int
    step: int
    host: str
    # where its main thread is
    place: str


class Watch:
    """The threads of one rank, from `start` to `stop`."""

    def __init__(self, trainer: L.Trainer, shared: Any, timeout: float, starter: int | None) -> None:
        self.trainer, self.timeout, self.starter = trainer, timeout, starter
        self.rank = trainer.global_rank
        self._listens_to = range(trainer.world_size if self.rank == 0 else 1)
        self.every = min(_EVERY, timeout / 10)
        self.moves = self.step = 0
        # whether the run is being ended, by this rank or another
        self.ending = False
        self.heard: dict[int, Sign] = {}
        self._known: dict[int, Sign] = {}
        # for how many beats of this rank another has told nothing, has not moved, has not moved and others have
        self._silent, self._still, self._behind = Counter[int](), Counter[int](), Counter[int]()
        self._table, self._over = shared, threading.Event()

    def start(self) -> None:
        for task in (self._tell, self._watch):
            threading.Thread(target=task, daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def judge(self) -> str | None:
        """Take in what has been heard since the last beat; why the run has to end, if it has to."""
        before, self._known = self._known, self.heard
        known, limit = self._known, self.timeout / self.every
        furthest = max((sign.moves for sign in known.values()), default=0)
        for rank in self._listens_to:
            now, last = known.get(rank), before.get(rank)
            stands = now is not None and last is not None and now.moves == last.moves
            behind = stands and now is not None and now.moves < furthest
            self._silent[rank] = self._silent[rank] + 1 if now == last else 0
            self._still[rank] = self._still[rank] + 1 if stands else 0
            self._behind[rank] = self._behind[rank] + 1 if behind else 0
        if lost := [rank for rank in self._listens_to if self._silent[rank] >= limit]:
            return "\n".join(
                f"{self._name(rank)} has not been heard of for {self.timeout:,g} s, since "
                + (f"it was {_where(known[rank])}" if rank in known else "the run started")
                for rank in lost
            )
        if stuck := [rank for rank in self._listens_to if self._behind[rank] >= limit]:
            return "\n".join(
                f"{self._name(rank)} has not moved for {self.timeout:,g} s, while others wait for it: it is "
                f"{_where(known[rank])}"
                for rank in stuck
            )
        if self.rank == 0 and min(self._still.values()) >= PATIENCE * limit:
            places = (f"\n  {self._name(rank)} is {_where(known[rank])}" for rank in self._listens_to)
            return f"no rank has moved for {PATIENCE * self.timeout:,g} s:{''.join(places)}"
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank}" + (f" on {self.heard[rank].host}" if rank in self.heard else "")

    def _tell(self) -> None:
        beats, host = 0, socket.gethostname()
        while not self._over.wait(self.every):
            beats += 1
            # a table that is gone tells nothing, which is counted as the silence of the first rank
            with contextlib.suppress(RuntimeError):
                sign = Sign(beats, self.moves, self.step, host, place())
                self._table.set(str(self.rank), json.dumps(astuple(sign)))
                if self.rank == 0 and self.ending:
                    self._table.set(_END, "")
                elif self._table.check([_END]):
                    self.ending = True
                    return
                told = [str(rank) for rank in self._listens_to if self._table.check([str(rank)])]
                self.heard = {int(key): Sign(*json.loads(self._table.get(key))) for key in told}

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            if not self.ending and (problem := self.judge()):
                self.ending = True
                # of those who miss the first rank, one on each machine
                if self.rank == 0 or self.trainer.local_rank == (1 if self.trainer.node_rank == 0 else 0):
                    self._say(problem)
            if self.ending:
                self._leave()

    def _say(self, problem: str) -> None:
        if bar := self.trainer.progress_bar_callback:
            bar.on_exception(self.trainer, self.trainer.lightning_module, RuntimeError(problem))
        run = self.trainer.default_root_dir
        print(
            f"mambazoo: {problem}\nthe run ends; go on, from its last checkpoint, with\n  mambazoo resume {run}",
            file=sys.stderr,
            flush=True,
        )

    def _leave(self) -> NoReturn:
        time.sleep(_READ * self.every)
        if self.starter is not None:
            # which ends this rank with itself, unless it is the one that is stuck
            time.sleep(_READ * self.every)
            if os.getppid() == self.starter:
                os.kill(self.starter, signal.SIGKILL)
        if (launcher := self.trainer.strategy.launcher) is not None:
            # a process that was stopped hears nothing else
            launcher.kill(signal.SIGKILL)
        os._exit(EXIT_CODE)


class Heartbeat(L.Callback):
    """End a run that waits for a rank, with EXIT_CODE, and say once which it is and how to go on.

    A rank is lost if nothing is heard of it for `timeout` seconds: it was stopped, or its machine is gone. It is stuck
    if it has not moved for as long, and others have since. Where none moves nobody can be blamed, and they may be at
    work: that ends the run after PATIENCE times as long.

    Time is counted in beats of the rank that listens, so that one which was stopped itself, and goes on, blames nobody.

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        if timeout <= 0:
            raise ValueError(f"callbacks.heartbeat.timeout: must be above 0 seconds, not {timeout}")
        self.timeout = timeout
        # the process that started this rank, where that is the first itself
        self.starter: int | None = None
        self._watch: Watch | None = None
        self._watches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if ranks() == 1:
            return
        # what waits in PyTorch raises, or aborts, after this has had its say
        wait_at_most((PATIENCE + 1) * self.timeout)
        self._watches += 1
        self._watch = Watch(trainer, table(f"heartbeat-{self._watches}"), self.timeout, self.starter)
        self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._watch is None:
            return
        if self._watch.ending:
            # ranks that leave let others fail; all has been said
            threading.Event().wait()
        # the others may leave before this one, which may have a checkpoint to write
        self._watch.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._move(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._move(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._move(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._move(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._move(trainer)

    def _move(self, trainer: L.Trainer) -> None:
        if self._watch is not None:
            self._watch.moves += 1
            self._watch.step = trainer.global_step


def place() -> str:
    """Where the main thread is: its innermost function, and the one of this package that called it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    own = frame
    while own is not None and not own.f_globals.get("__name__", "").startswith(_PACKAGE):
        own = own.f_back
    return " of ".join(dict.fromkeys(_line(found) for found in (frame, own) if found is not None))


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_qualname} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def _where(sign: Sign) -> str:
    return f"in step {sign.step + 1}, in {sign.place}"
