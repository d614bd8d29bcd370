"""Runs of several ranks are exact: they lose what one rank loses, and go on after a kill as if there had been none."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mambazoo.checkpoints.io import from_pretrained
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.saving import newest_checkpoint, read_checkpoint

from .several import STEPS, Run, assert_close, assert_same, at_length, fit, options, weights

# how often a run is killed; 50 and more when it is to be sure
KILLS = int(os.environ.get("MAMBAZOO_TEST_KILLS", 4))
DOUBLE = "trainer.precision=64-true"


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


def test_sharded_runs_refuse_statistics_of_one_rank(folder: Path, recipes: dict[str, Path]) -> None:
    arguments = options(1, "trainer.strategy=fsdp2", "model.backbone.norm=batch")
    text = Run(folder / "batch", 1, "fit", str(recipes["genomics"]), *arguments).finish(2)
    assert "model.backbone.norm, model.filters: with fsdp2 each rank has statistics of its own" in text
    assert "Traceback" not in text


# one rank that starts, one that hands on, one that ends
@pytest.mark.parametrize(("script", "ranks"), [("parts_ranks.py", 3), ("guard_ranks.py", 2)])
def test_what_ranks_assert_together_holds(folder: Path, script: str, ranks: int) -> None:
    path = Path(__file__).resolve().parents[1] / "zoo" / script
    Run(folder / script, ranks, before=path.read_text()).finish()
