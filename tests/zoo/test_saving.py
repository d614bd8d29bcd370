"""Checkpoints on disk: whole or not at all, found when damaged, never run."""

import errno
import itertools
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from mambazoo.zoo.journal import Journal, read_journal, rewind_journal
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.randomness import random_states, set_random_states
from mambazoo.zoo.saving import (
    AtomicCheckpointIO,
    Checkpoints,
    newest_checkpoint,
    read_checkpoint,
    write_whole,
)
from mambazoo.zoo.sharding import FullySharded
from mambazoo.zoo.shards import host_copy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.data import DataLoader

# how often writing is killed; 100 when it is to be sure
KILLS = int(os.environ.get("MAMBAZOO_TEST_KILLS", 10))


def save(path: Path, step: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(100)}, "global_step": step}, path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\); what was there before is whole"):
        save(path, 2)
    assert read_checkpoint(path)["global_step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_crash_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"whole"))

    def crash(file: object) -> None:
        file.write(b"ha")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, crash)
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    for step, name in enumerate(("best.ckpt", "previous.ckpt", "last.ckpt")):
        save(tmp_path / name, step)
        os.utime(tmp_path / name, (step, step))
    assert newest_checkpoint(tmp_path) == (tmp_path / "last.ckpt", [])
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[: len(content) // 2])
    path, problems = newest_checkpoint(tmp_path)
    assert path == tmp_path / "previous.ckpt"
    assert "not a whole one" in problems[0]
    for name in ("best.ckpt", "previous.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        newest_checkpoint(tmp_path)


def save_for_ever(folder: Path, kind: str) -> None:
    """Write a checkpoint after the other, as training does, until killed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    strategy = FullySharded(kind)
    strategy.checkpoint_io = AtomicCheckpointIO()
    checkpoints = Checkpoints(str(folder), 1)
    for step in itertools.count(1):
        weights = distribute_tensor(torch.full((30_000,), float(step)), mesh)
        state = {"state_dict": {"w": weights}, "global_step": step}
        connector = SimpleNamespace(dump_checkpoint=lambda weights_only, state=state: state)
        trainer = SimpleNamespace(strategy=strategy, is_global_zero=True, _checkpoint_connector=connector)
        checkpoints.save(trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_kill_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path: Path, kind: str) -> None:
    draw, newest = random.Random(0), 0
    for _ in range(KILLS):
        writer = os.fork()
        if not writer:
            try:
                save_for_ever(tmp_path, kind)
            finally:
                os._exit(1)
        while not (tmp_path / "last.ckpt").exists():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.1)
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL
        path, problems = newest_checkpoint(tmp_path)
        assert (path.name, problems) == ("last.ckpt", [])
        checkpoint = read_checkpoint(path)
        assert (checkpoint["state_dict"]["w"] == checkpoint["global_step"]).all()
        newest = max(newest, checkpoint["global_step"])
        path.unlink()
        if (tmp_path / "previous.ckpt").exists():
            # what a kill between two files would leave to go on from
            assert newest_checkpoint(tmp_path)[0].name == "previous.ckpt"
    assert newest > 1


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("kind", ["torch", "pickle", "text", "foreign"])
def test_code_and_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    # a user's setting must not open a hole
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "x.ckpt"
    if kind == "torch":
        torch.save({"state_dict": {}, "bomb": Bomb()}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "text":
        path.write_text("hello")
    else:
        torch.save([1, 2, 3], path)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_random_states_come_back_through_a_checkpoint(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    draw()
    torch.save({"state_dict": {}, "random": random_states()}, tmp_path / "x.ckpt")
    expected = draw()
    assert draw() != expected
    set_random_states(read_checkpoint(tmp_path / "x.ckpt")["random"])
    assert draw() == expected


def train(folder: Path, *callbacks: L.Callback, validate: int = 3) -> None:
    """Six steps of a tiny model."""
    model = LanguageModel({"d_model": 16, "n_layers": 1}, vocab_size=20, optimizer={"schedule": "constant"})
    rows = [torch.randint(20, (2, 9)) for _ in range(6)]
    batches = DataLoader([{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in rows], batch_size=None)
    trainer = L.Trainer(
        max_steps=6, accelerator="cpu", logger=Journal(str(folder)), log_every_n_steps=1,
        val_check_interval=validate, callbacks=list(callbacks), plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, batches, batches)


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_logged_before_it_is_saved(tmp_path: Path) -> None:
    steps = []

    class Watched(Checkpoints):
        def save(self, trainer: L.Trainer) -> None:
            assert read_journal(tmp_path)["train/loss"][-1][0] == trainer.global_step
            steps.append(trainer.global_step)
            super().save(trainer)

    train(tmp_path, Watched(str(tmp_path), 2))
    assert steps == [2, 3, 4, 6]
    logged = [step for step, _ in read_journal(tmp_path)["train/loss"]]
    assert logged == [1, 2, 3, 4, 5, 6]


class Weights(L.Callback):
    """The weights after each step, and what is called then."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.seen: dict[int, Tensor] = {}
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen[trainer.global_step] = next(pl_module.parameters()).detach().clone()
        self.after(trainer.global_step)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, whole = threading.Event(), write_whole

    def slow(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        assert go_on.wait(60)
        whole(path, write)

    def after(step: int) -> None:
        if step == 5:
            assert not (tmp_path / "last.ckpt").exists()
            go_on.set()

    monkeypatch.setattr("mambazoo.zoo.saving.write_whole", slow)
    weights = Weights(after)
    train(tmp_path, weights, Checkpoints(str(tmp_path), 4), validate=6)
    for name, step in (("previous.ckpt", 4), ("last.ckpt", 6)):
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint["global_step"] == step
        assert torch.equal(next(iter(checkpoint["state_dict"].values())), weights.seen[step])
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_training_stops_where_a_checkpoint_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    weights = Weights()
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path, weights, Checkpoints(str(tmp_path), 2), validate=6)
    assert 2 <= max(weights.seen) <= 4


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_fails_leaves_what_it_was_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, sync = threading.Event(), os.fsync

    def slow(handle: int) -> None:
        assert go_on.wait(60)
        # longer than it takes to leave
        time.sleep(0.5)
        sync(handle)

    def after(step: int) -> None:
        if step == 5:
            go_on.set()
            raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(FloatingPointError):
        train(tmp_path, Weights(after), Checkpoints(str(tmp_path), 4), validate=6)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


def test_a_copy_shares_what_was_shared() -> None:
    weight = torch.randn(3, 4)
    copy = host_copy({"embedding": weight, "head": weight.detach(), "part": weight[1:], "step": 3})
    assert copy["embedding"] is copy["head"]
    weight.zero_()
    assert copy["embedding"].all()
    assert copy["part"].shape == (2, 4)
    assert copy["step"] == 3


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_training_on_changes_no_copy_of_one_rank(tmp_path: Path, kind: str) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        strategy = FullySharded(kind)
        strategy.checkpoint_io = AtomicCheckpointIO()
        weight = distribute_tensor(torch.ones(3, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        checkpoint = {"state_dict": {"weight": weight, "bias": torch.ones(3)}, "global_step": 1}
        write, finish = strategy.writes(checkpoint, tmp_path / "last.ckpt")
        for tensor in checkpoint["state_dict"].values():
            tensor.zero_()
        write()
        finish()
    finally:
        dist.destroy_process_group()
    assert all(x.all() for x in read_checkpoint(tmp_path / "last.ckpt")["state_dict"].values())


def test_the_journal_is_rewound_to_a_checkpoint(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    for step in range(5):
        journal.log_metrics({"train/loss": 0.1 + step, "epoch": 0}, step)
        if step % 2:
            journal.log_metrics({"val/loss": step}, step)
    # a kill in the middle of a row
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,train/lo")
    assert read_journal(tmp_path)["val/loss"] == [(2, 1.0), (4, 3.0)]
    rewind_journal(tmp_path, 4)
    series = read_journal(tmp_path)
    assert series["train/loss"] == [(step + 1, 0.1 + step) for step in range(4)]
    assert series["val/loss"] == [(2, 1.0)]
