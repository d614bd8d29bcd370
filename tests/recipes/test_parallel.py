"""Runs of several ranks: the losses of one, checkpoints for any number of them, kills at any moment."""

import contextlib
import csv
import os
import random
import runpy
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from mambazoo.checkpoints.io import from_pretrained
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.heartbeat import EXIT_CODE
from mambazoo.zoo.saving import newest_checkpoint, read_checkpoint

STEPS = 16
# how often a run is killed; 50 and more when it is to be sure
KILLS = int(os.environ.get("MAMBAZOO_TEST_KILLS", 4))
# gpu takes a GPU a rank
ACCELERATOR = os.environ.get("MAMBAZOO_TEST_ACCELERATOR", "cpu")
at_length = pytest.mark.skipif(
    "MAMBAZOO_TEST_KILLS" not in os.environ, reason="the longer matrix runs with MAMBAZOO_TEST_KILLS=50"
)
OF_THE_MACHINE = ("train/tokens_per_second", "train/data_wait", "train/memory_gib")
DOUBLE = "trainer.precision=64-true"
context = get_context("forkserver")
context.set_forkserver_preload(["torch", "lightning", "matplotlib.figure", "mambazoo.recipes.train"])


def free_ports() -> int:
    """The first of two ports in a row that nobody has: of the ranks' own, and of the table that they start by."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("", port + 1))
                return port


class Run:
    """A command in as many processes as it has ranks, started as torchrun starts them."""

    def __init__(self, folder: Path, ranks: int, *arguments: str, before: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.output = folder / "output.txt"
        environment = {"OMP_NUM_THREADS": "1", "MAMBAZOO_CACHE": str(folder.parent / "cache")}
        port = free_ports()
        values = {"folder": str(folder), "arguments": list(arguments), "before": before}
        self.processes: list[Any] = []
        for rank in range(ranks):
            launched = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
            values["environment"] = {**environment, **(launched if ranks > 1 else {})}
            values["output"] = str(self.output)
            process = context.Process(
                target=runpy.run_path, args=(str(Path(__file__).with_name("rank.py")), dict(values))
            )
            process.start()
            self.processes.append(process)

    def finish(self, *codes: int) -> str:
        """Wait for the ranks, which must leave with these codes, 0 where there is none; return what they printed."""
        for process in self.processes:
            process.join(90)
        text = self.output.read_text()
        found = [process.exitcode for process in self.processes]
        assert found == [*codes, *[0] * (len(found) - len(codes))], text
        return text

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + 90
        path = run / "metrics.csv"
        while time.monotonic() < deadline and all(process.is_alive() for process in self.processes):
            if path.exists() and f"\n{step},train/loss" in path.read_text():
                return
            time.sleep(0.003)
        raise AssertionError(self.output.read_text())

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # the server that forks the ranks imports before it is told where from
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / ".path"))
        patch.setenv("OMP_NUM_THREADS", "1")
        # what a test before this one ran in this process
        patch.delenv("MAMBAZOO_RUN", raising=False)
        forkserver.ensure_running()
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def recipes(folder: Path) -> dict[str, Path]:
    """Small recipes with everything that could disturb a resumed run; 8 samples a batch over all ranks."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(draw.choice(words) for _ in range(150)))
    records = ("".join(draw.choices("ACGT", k=4000)) for _ in range(2))
    (folder / "genome.fa").write_text("".join(f">chr{i}\n{bases}\n" for i, bases in enumerate(records)))
    (folder / "sounds").mkdir()
    for i in range(10):
        sound = np.random.default_rng(i).standard_normal(3000).cumsum()
        soundfile.write(folder / "sounds" / f"{i}.wav", sound / np.abs(sound).max(), 8000)
    common = {
        "model": {"backbone": {"d_model": 16, "n_layers": 2}, "optimizer": {"lr": 3e-3, "warmup_steps": 5}},
        "trainer": {
            "accelerator": ACCELERATOR, "max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 14,
            "log_every_n_steps": 1, "limit_val_batches": 2,
        },
        "callbacks": {"checkpoints": {"every_n_steps": 4}},
    }  # fmt: skip
    data = {
        "language": {"paths": str(folder / "texts"), "length": 64},
        # 15 % of the bases are targets, and never as many on one rank as on the other
        "genomics": {"paths": str(folder / "genome.fa"), "length": 64, "objective": "masked"},
        "audio": {"paths": str(folder / "sounds"), "length": 64},
    }
    found = {}
    for name, values in data.items():
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump({"extends": f"{name}/demo", "data": values, **common}))
    return found


def options(ranks: int, *more: str) -> list[str]:
    """What a run of so many ranks needs to see the same batches."""
    return [f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}", *more]


def curve(run: Path) -> dict[tuple[int, str], float]:
    """The log of a run, but for what it took of the machine."""
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] not in OF_THE_MACHINE]
    return {(int(row["step"]), row["metric"]): float(row["value"]) for row in rows}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def assert_close(run: Path, other: Path, tolerance: float) -> None:
    a, b = curve(run), curve(other)
    assert a.keys() == b.keys()
    for key in a:
        # the logger itself keeps some values in single precision
        limit = tolerance if key[1].startswith("train/") else max(tolerance, 1e-6)
        assert a[key] == pytest.approx(b[key], rel=limit, abs=limit), key


def assert_same(run: Path, other: Path) -> None:
    assert curve(run) == curve(other)
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in b)


def fit(folder: Path, recipe: Path, ranks: int, *more: str) -> Path:
    Run(folder, ranks, "fit", str(recipe), *options(ranks, *more)).finish()
    return folder / "runs" / recipe.stem / "1"


@pytest.fixture(scope="module")
def one(folder: Path, recipes: dict[str, Path]) -> Path:
    """The run of one rank, in double precision."""
    return fit(folder / "one", recipes["genomics"], 1, DOUBLE)


@pytest.mark.parametrize(
    ("ranks", "groups", "strategy"),
    [
        (2, 2, "ddp"),
        (2, 1, "context"),
        pytest.param(4, 2, "context-2", marks=at_length),
        pytest.param(4, 1, "context", marks=at_length),
    ],
)
def test_ranks_lose_what_one_loses(
    folder: Path, recipes: dict[str, Path], one: Path, ranks: int, groups: int, strategy: str
) -> None:
    place = folder / f"{strategy}-of-{ranks}"
    batch = f"data.batch_size={8 // groups}"
    run = fit(place, recipes["genomics"], ranks, DOUBLE, f"trainer.strategy={strategy}", batch)
    assert_close(run, one, 1e-9)
    a, b = weights(run), weights(one)
    assert all(torch.allclose(a[name], b[name], rtol=1e-7, atol=1e-9) for name in b)


@pytest.fixture(scope="module")
def whole(folder: Path, recipes: dict[str, Path]) -> dict[tuple[str, int], Path]:
    """Runs that nothing interrupts, by recipe and ranks, as they are asked for."""

    class Whole(dict[tuple[str, int], Path]):
        def __missing__(self, key: tuple[str, int]) -> Path:
            name, ranks = key
            self[key] = fit(folder / f"whole-{name}-{ranks}", recipes[name], ranks)
            return self[key]

    return Whole()


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_run_of_any_ranks_goes_on_exactly(
    folder: Path, recipes: dict[str, Path], whole: dict[tuple[str, int], Path], kill: int
) -> None:
    draw = random.Random(kill)
    name, ranks = ("genomics", "audio", "language")[kill // 2 % 3], 1 + kill % 2
    place = folder / f"kill-{kill}"
    workers = f"data.num_workers={draw.choice((0, 2))}"
    started = Run(place, ranks, "fit", str(recipes[name]), *options(ranks, workers))
    run = place / "runs" / name / "1"
    started.wait_for_step(run, draw.randrange(4, STEPS))
    # anywhere in what follows: the next step, a batch of several, a validation, a checkpoint half written
    time.sleep(draw.random() * 0.05)
    # the other is left to wait for it, until a launcher ends it too
    started.processes[draw.randrange(ranks)].kill()
    started.kill()
    (run / "summary.json").unlink(missing_ok=True)
    Run(place, ranks, "resume", str(run)).finish()
    assert_same(run, whole[name, ranks])


def test_a_deterministic_run_repeats(
    folder: Path, recipes: dict[str, Path], whole: dict[tuple[str, int], Path]
) -> None:
    run = fit(folder / "deterministic", recipes["genomics"], 1, "trainer.deterministic=true")
    assert_same(run, whole["genomics", 1])


def test_sharded_runs_stop_at_any_ranks_signal_and_go_on_with_any_number(
    folder: Path, recipes: dict[str, Path]
) -> None:
    average = "callbacks.average.decay=0.9"
    common = ["model.backbone.checkpoint_activations=true", "model.backbone.d_mlp=24", average]
    plain = fit(folder / "plain", recipes["genomics"], 1, *common)
    place = folder / "sharded"
    arguments = options(2, *common, "trainer.strategy=fsdp2-sharded")
    started = Run(place, 2, "fit", str(recipes["genomics"]), *arguments)
    run = place / "runs" / "genomics" / "1"
    started.wait_for_step(run, 5)
    os.kill(started.processes[1].pid, signal.SIGTERM)
    assert f"mambazoo resume {Path('runs/genomics/1')}" in started.finish(143)
    checkpoints = run / "checkpoints"
    stopped = read_checkpoint(checkpoints / "last.ckpt")
    assert 5 <= stopped["global_step"] < STEPS
    # one folder of parts for each checkpoint, and none that a checkpoint does not name
    assert len(list((checkpoints / "shards").iterdir())) <= 3
    for ranks, strategy in ((1, "auto"), (4, "fsdp2")):
        again = folder / f"again-{ranks}"
        shutil.copytree(place, again)
        arguments = options(ranks, f"trainer.strategy={strategy}")
        Run(again, ranks, "resume", "runs/genomics/1", *arguments).finish()
        resumed = again / "runs" / "genomics" / "1"
        assert_close(resumed, plain, 2e-4)
        a, b = weights(resumed), weights(plain)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in b)
        # shards are of classes that PyTorch makes, and what is kept is of ours
        for path in (run, resumed, resumed / "model"):
            assert type(from_pretrained(path)) is GenomeModel
    # one that lacks a part is passed over for the one before
    part = next((checkpoints / "shards").glob(f"{stopped['global_step']}-*/00001.parts"))
    part.write_bytes(part.read_bytes()[:100])
    path, problems = newest_checkpoint(checkpoints)
    assert path.name == "previous.ckpt"
    assert part.name in problems[0]


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


def test_sharded_runs_refuse_statistics_of_one_rank(folder: Path, recipes: dict[str, Path]) -> None:
    arguments = options(1, "trainer.strategy=fsdp2", "model.backbone.norm=batch")
    text = Run(folder / "batch", 1, "fit", str(recipes["genomics"]), *arguments).finish(2)
    assert "model.backbone.norm: with fsdp2 each rank has statistics of its own" in text
    assert "Traceback" not in text


# one rank that starts, one that hands on, one that ends
@pytest.mark.parametrize(("script", "ranks"), [("parts_ranks.py", 3), ("guard_ranks.py", 2)])
def test_what_ranks_assert_together_holds(folder: Path, script: str, ranks: int) -> None:
    path = Path(__file__).resolve().parents[1] / "zoo" / script
    Run(folder / script, ranks, before=path.read_text()).finish()


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
