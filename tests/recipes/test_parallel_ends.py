"""Runs of several ranks end as one, whatever happens to one of them: a signal, a hang, a loss, a full disk."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mambazoo.zoo.heartbeat import EXIT_CODE
from mambazoo.zoo.saving import newest_checkpoint, read_checkpoint

from .several import Run, assert_same, at_length, options

# ranks that the command starts itself, all in a session of their own
LAUNCHES = """
import os, sys
from lightning.pytorch.strategies.launchers import subprocess_script
os.setsid()
subprocess_script._basic_subprocess_cmd = lambda: [sys.executable, "-m", "mambazoo", *sys.argv[1:]]
"""
counts_processes = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def wait_until(true: Callable[[], object], output: Path) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


@counts_processes
@pytest.mark.parametrize("moment", ["the other starts", "the other imports", "both set up"])
def test_a_signal_before_the_first_step_leaves_no_process(
    folder: Path, recipes: dict[str, Path], moment: str
) -> None:
    place = folder / moment.replace(" ", "-")
    arguments = ("trainer.devices=2", "trainer.strategy=ddp", "data.num_workers=1")
    started = Run(place, 1, "fit", str(recipes["genomics"]), *arguments, before=LAUNCHES)
    [first] = started.processes

    def others() -> list[int]:
        return [pid for pid in alive(first.pid) if pid != first.pid]

    def reached() -> bool:
        if moment == "both set up":
            return any((place / "runs/genomics/1").glob("events.*"))
        found = others()
        return bool(found) and (moment == "the other starts" or "libtorch" in maps(found[0]))

    def maps(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    wait_until(reached, started.output)
    os.kill(first.pid, signal.SIGTERM)
    first.join(90)
    # by the signal itself, or by the command after its step; a shell says 143 of either
    assert first.exitcode in (-signal.SIGTERM, 143), started.output.read_text()
    wait_until(lambda: not alive(first.pid), started.output)


# so that a run is not over before it is stopped
SLOW = """
import time
from mambazoo.datamodules.base import Ordered
read = Ordered.__getitem__
def slowly(self, number):
    time.sleep(0.02)
    return read(self, number)
Ordered.__getitem__ = slowly
"""


@counts_processes
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_stopped_is_named_and_the_run_goes_on(
    folder: Path, recipes: dict[str, Path], whole: dict[tuple[str, int], Path], rank: int
) -> None:
    place = folder / f"stopped-{rank}"
    arguments = options(2, "trainer.strategy=ddp", "callbacks.heartbeat.timeout=4")
    started = Run(place, 1, "fit", str(recipes["genomics"]), *arguments, before=LAUNCHES + SLOW)
    run, [first] = place / "runs" / "genomics" / "1", started.processes
    started.wait_for_step(run, 1)
    # the command itself is the first rank, and started the other
    [other] = [pid for pid in alive(first.pid) if pid != first.pid]
    started.wait_for_step(run, 5)
    os.kill(other if rank else first.pid, signal.SIGSTOP)
    text = started.finish(-signal.SIGKILL if rank == 0 else EXIT_CODE)
    assert f"mambazoo: rank {rank} on {socket.gethostname()} has not been heard of for 4 s" in text
    assert text.rstrip().endswith("mambazoo resume runs/genomics/1")
    wait_until(lambda: not alive(first.pid), started.output)
    if rank == 1:
        Run(place, 2, "resume", str(run)).finish()
        assert_same(run, whole["genomics", 2])


# data of the second rank that never comes
ASLEEP = """
import os, time
from mambazoo.datamodules.base import Ordered
read = Ordered.__getitem__
def wait(self, number):
    if os.environ["RANK"] == "1" and number >= 40:
        time.sleep(1000)
    return read(self, number)
Ordered.__getitem__ = wait
"""


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=at_length) for name in ("fsdp2", "context"))]
)
def test_a_rank_whose_data_never_comes_is_named(
    folder: Path, recipes: dict[str, Path], strategy: str
) -> None:
    place = folder / f"asleep-{strategy}"
    arguments = options(2, f"trainer.strategy={strategy}", "callbacks.heartbeat.timeout=4")
    started = Run(place, 2, "fit", str(recipes["genomics"]), *arguments, before=ASLEEP)
    text = started.finish(EXIT_CODE, EXIT_CODE)
    assert f"rank 1 on {socket.gethostname()} has not moved for 4 s, while others wait for it" in text
    assert "in wait (<string>:7)" in text
    assert text.count("mambazoo resume runs/genomics/1") == 1
    assert "Traceback" not in text


NOT_FINITE = """
import os
from mambazoo.zoo.genomics import GenomeModel
loss = GenomeModel.training_loss
def training_loss(self, batch):
    bad = os.environ.get("RANK") == "1" and self.global_step == 5
    return loss(self, batch) * (float("nan") if bad else 1)
GenomeModel.training_loss = training_loss
"""


def test_a_loss_of_one_rank_that_is_not_finite_stops_all_with_a_message(
    folder: Path, recipes: dict[str, Path]
) -> None:
    place, stop = folder / "not-finite", "model.optimizer.anomaly=stop"
    arguments = options(2, stop, "trainer.strategy=ddp")
    text = Run(place, 2, "fit", str(recipes["genomics"]), *arguments, before=NOT_FINITE).finish(1, 0)
    run = Path("runs/genomics/1")
    # 16 samples a step
    assert text.count("mambazoo: step 6: the loss is not finite (nan); its batch, samples 80 to 95, is") == 1
    assert text.rstrip().endswith(f"mambazoo resume {run} model.optimizer.anomaly=skip")
    assert "Traceback" not in text
    assert read_checkpoint(place / run / "checkpoints" / "last.ckpt")["global_step"] == 4
    text = Run(place, 1, "replay", str(run), "--step", "6").finish()
    assert "step 6, samples 80 to 95, with the weights after step 4" in text


FULL = """
import errno, os, stat
fsync, calls = os.fsync, []
def full(handle):
    calls.append(handle)
    if os.environ["RANK"] == "1" and len(calls) > 5 and stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(handle)
os.fsync = full
"""


def test_one_ranks_full_disk_ends_all_with_a_message(folder: Path, recipes: dict[str, Path]) -> None:
    place = folder / "full"
    arguments = options(2, "trainer.strategy=fsdp2-sharded", "callbacks.checkpoints.every_n_steps=1")
    text = Run(place, 2, "fit", str(recipes["genomics"]), *arguments, before=FULL).finish(1, 1)
    assert "No space left on device); what was there before is whole" in text
    assert "Traceback" not in text
    path, problems = newest_checkpoint(place / "runs" / "genomics" / "1" / "checkpoints")
    assert path.name == "last.ckpt"
    assert problems == []
