"""The command, and recipes for runs of several ranks with what they come to when nothing interrupts them."""

import logging
import os
import random
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from .command import Command, Result, call
from .several import ACCELERATOR, STEPS, fit


@pytest.fixture
def mambazoo(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Command:
    """Run the command in the folder of the test, which is empty at first."""
    monkeypatch.chdir(tmp_path)
    # what a command says of its data is not said in the tests after it
    caplog.set_level(logging.getLogger("mambazoo").level, "mambazoo")

    def run(*arguments: str) -> Result:
        code, captured = call(*arguments), capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # the server that forks the ranks imports before it is told where from
        here = str(Path(__file__).resolve().parents[2] / ".path")
        patch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("OMP_NUM_THREADS", "1")
        # what a test before this one ran in this process
        patch.delenv("MAMBAZOO_RUN", raising=False)
        forkserver.ensure_running()
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def whole(folder: Path, recipes: dict[str, Path]) -> dict[tuple[str, int], Path]:
    """Runs that nothing interrupts, by recipe and ranks, as they are asked for."""

    class Whole(dict[tuple[str, int], Path]):
        def __missing__(self, key: tuple[str, int]) -> Path:
            name, ranks = key
            self[key] = fit(folder / f"whole-{name}-{ranks}", recipes[name], ranks)
            return self[key]

    return Whole()
