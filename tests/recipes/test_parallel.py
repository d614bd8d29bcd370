"""Runs of several ranks: the losses of one, checkpoints for any number of them, kills at any moment."""

import csv
import os
import random
import runpy
import signal
import socket
import time
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mambazoo.zoo.saving import read_checkpoint

STEPS = 16
# how often a run is killed; 50 and more when it is to be sure
KILLS = int(os.environ.get("MAMBAZOO_TEST_KILLS", 4))
context = get_context("forkserver")
context.set_forkserver_preload(["torch", "lightning", "matplotlib.figure", "mambazoo.recipes.train"])


class Run:
    """A command in as many processes as it has ranks, started as torchrun starts them."""

    def __init__(self, folder: Path, ranks: int, *arguments: str, before: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.output = folder / "output.txt"
        environment = {"OMP_NUM_THREADS": "1", "MAMBAZOO_CACHE": os.environ["MAMBAZOO_CACHE"]}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
    common = {
        "model": {"backbone": {"d_model": 16, "n_layers": 2}, "optimizer": {"lr": 3e-3, "warmup_steps": 5}},
        "trainer": {
            "accelerator": "cpu", "max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 14,
            "log_every_n_steps": 1, "limit_val_batches": 2,
        },
        "callbacks": {"checkpoints": {"every_n_steps": 4}},
    }  # fmt: skip
    data = {
        "language": {"paths": str(folder / "texts"), "length": 64},
        # 15 % of the bases are targets, and never as many on one rank as on the other
        "genomics": {"paths": str(folder / "genome.fa"), "length": 64, "objective": "masked"},
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
    """The log of a run, but for its speed."""
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] != "train/tokens_per_second"]
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


@pytest.mark.parametrize("name", ["language", "genomics"])
def test_two_ranks_lose_what_one_loses(folder: Path, recipes: dict[str, Path], name: str) -> None:
    double = "trainer.precision=64-true"
    one = fit(folder / f"{name}-one", recipes[name], 1, double)
    two = fit(folder / f"{name}-two", recipes[name], 2, double, "trainer.strategy=ddp")
    assert_close(two, one, 1e-9)
