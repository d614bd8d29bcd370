"""Runs of several ranks for tests: started as torchrun starts them, watched, and compared."""

import contextlib
import csv
import os
import runpy
import socket
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from mambazoo.zoo.saving import read_checkpoint

STEPS = 16
# gpu takes a GPU a rank
ACCELERATOR = os.environ.get("MAMBAZOO_TEST_ACCELERATOR", "cpu")
at_length = pytest.mark.skipif(
    "MAMBAZOO_TEST_KILLS" not in os.environ, reason="the longer matrix runs with MAMBAZOO_TEST_KILLS=50"
)
OF_THE_MACHINE = ("train/tokens_per_second", "train/data_wait", "train/memory_gib")
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
