"""Checkpoints that survive anything: written whole or not at all, and found again when the newest is damaged.

Training goes on while one is written: it waits for a copy in the memory of the host alone. Lightning 2.6 waits for the
disk, writes through a second file system's temporary folder and a copy, which a kill or a full disk cuts short, and
restores a run whose validation was due as if that had happened. All three are mended here.
"""

import errno
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .ranks import most_over_ranks, together
from .shards import host_copy, join, part_files, reserve
from .stopping import StoppedError

LAST, PREVIOUS, BEST = NAMES = "last.ckpt", "previous.ckpt", "best.ckpt"


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside path, flush it and rename it: path is never half a file.

    Raises:
        OSError: when the disk is full or the folder cannot be written; what was at path before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else errno.EIO
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        raise OSError(
            code, f"{path} could not be written ({reason}); what was there before is whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_part(path: Path, parts: list[torch.Tensor]) -> None:
    """Write a rank's parts of a checkpoint (shards.py) into a folder that all ranks make.

    Raises:
        OSError: see `write_whole`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(parts, file))
    sync_folder(path.parent.parent)


def read_checkpoint(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a trainer's checkpoint, whole or in parts, as a whole one; see `read_tensors`.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when a file is damaged, is something else, or holds objects that only code could load.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    checkpoint = read_tensors(path, mmap=mmap)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} holds no model: it has no state_dict")
    parts = []
    for file in part_files(checkpoint, path.parent):
        if not file.exists():
            raise ValueError(f"{path} is in parts, and {file} is not there")
        parts.append(read_tensors(file, mmap=mmap))
    return join(checkpoint, parts) if parts else checkpoint


def read_tensors(path: Path, *, mmap: bool = False) -> Any:
    """Read what torch.save wrote: tensors and plain values only, never code; with mmap, pages when they are used.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, is something else, or holds objects that only code could load.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    # a torch file is a zip archive, whose table of contents comes last: a file cut short has none
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a checkpoint, or not a whole one: {path.stat().st_size} bytes")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors and plain values, and is not loaded otherwise: {detail}"
        ) from None
    for leaf in tree_leaves(loaded):
        if isinstance(leaf, Tensor) and not _has_its_numbers(leaf):
            raise ValueError(
                f"{path} is damaged: a tensor in it is {tuple(leaf.shape)}, and not that many numbers"
            )
    return loaded


def _has_its_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has as many numbers in memory as its shape says, as an expanded view has not."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def newest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run that can be read, and why newer ones cannot.

    Raises:
        FileNotFoundError: when none is left.
    """
    problems = []
    found = [folder / name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
        else:
            return path, problems
    detail = f" ({'; '.join(problems)})" if problems else ""
    raise FileNotFoundError(f"{folder} holds no whole checkpoint{detail}")


def make_last(path: Path) -> None:
    """Have a run go on from one of its checkpoints: it is the last then, and a damaged one is not kept or named."""
    if path.name != LAST:
        _second_name(path, path.with_name(LAST))


class AtomicCheckpointIO(CheckpointIO):
    """The trainer's way to the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Keep the last checkpoint, the one before it, and the best by a metric of validation.

    A checkpoint is taken after an optimiser step, before the validation that may be due at it, and written while
    training goes on; a run resumed from there makes that validation up, so that nothing is lost to a kill in between.
    The best is a second name of the file that was last when it was validated: free, and good to go on from too.

    Args:
        folder: where to write.
        every_n_steps: optimiser steps between checkpoints; one is also written before each validation.
        monitor: the metric that decides what is best.
        mode: "min" or "max".
    """

    def __init__(self, folder: str, every_n_steps: int, monitor: str = "val/loss", mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoints.mode: must be min or max, not {mode!r}")
        self.folder, self.every_n_steps, self.monitor, self.mode = Path(folder), every_n_steps, monitor, mode
        self.best: float | None = None
        # whether validation was due when the checkpoint was taken, and has not been since
        self.owed = False
        # this rank's part of a checkpoint on its way to the disk, and what is to be done when all ranks have written
        self._writing: tuple[Future[None], Callable[[], None]] | None = None
        # whether that checkpoint is the best
        self._is_best = False
        # whether there is memory for the first, or it is being found
        self._prepared = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "owed": self.owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.owed = state["best"], state["owed"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if (
            isinstance(trainer.val_check_interval, int)
            and trainer.val_check_interval % trainer.accumulate_grad_batches
        ):
            raise ValueError(
                f"trainer.val_check_interval: counts batches and must be a multiple of accumulate_grad_batches, "
                f"{trainer.accumulate_grad_batches}, not {trainer.val_check_interval}"
            )
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            # what a kill left half written is as large as a checkpoint
            for path in self.folder.glob(".*.ckpt.*.tmp"):
                path.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.owed:
            return
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self._settle(wait=False)
        if not self._prepared:
            self._prepared = True
            self._prepare(trainer)
        step, last = trainer.global_step, trainer.global_step >= trainer.max_steps
        interval = trainer.val_check_batch
        self.owed = last or (interval is not None and (trainer.fit_loop.total_batch_idx + 1) % interval == 0)
        if last:
            # Lightning validates once more before it stops
            trainer.should_stop = True
        if self.owed or trainer.should_stop or step % self.every_n_steps == 0:
            # Lightning logs a step after this: a kill in between would lose rows that no resumed run writes again
            trainer._logger_connector.update_train_step_metrics()
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.owed:
            return
        self.owed = False
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ValueError(
                f"callbacks.checkpoints.monitor: validation measures no {self.monitor!r}; "
                f"it measures {', '.join(sorted(trainer.callback_metrics))}"
            )
        now = float(value)
        better = self.best is None or (now < self.best if self.mode == "min" else now > self.best)
        if better and math.isfinite(now):
            self.best = now
            self._is_best = trainer.is_global_zero
            if self._writing is None:
                self._name_best()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(wait=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, StoppedError):
            # raised by all ranks at once
            self._settle(wait=True)
        elif self._writing is not None:
            # by this rank alone: nobody knows what the others do
            self._writing[0].exception()

    def save(self, trainer: L.Trainer) -> None:
        """Take a checkpoint and begin to write it as the last; the one that was last becomes the previous.

        Raises:
            OSError: when the checkpoint before this one could not be written, by any of the ranks.
        """
        self._settle(wait=True)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        # not by the trainer, which leaves the other ranks waiting where the disk of the first is full
        write, finish = writes(trainer.strategy, checkpoint, self.folder / LAST)

        def begin() -> None:
            if trainer.is_global_zero and (self.folder / LAST).exists():
                _second_name(self.folder / LAST, self.folder / PREVIOUS)
            write()

        self._writing = self._writer.submit(begin), finish

    def _prepare(self, trainer: L.Trainer) -> None:
        """Let memory for the first checkpoint be found while training goes on; there is an optimiser's state by now."""
        strategy = trainer.strategy
        if (
            strategy.is_global_zero
            and strategy.root_device.type == "cuda"
            and not hasattr(strategy, "writes")
        ):
            states = [dict(optimizer.state) for optimizer in trainer.optimizers]
            kept = [list(state.values()) for state in states]
            self._writer.submit(reserve, [strategy.lightning_module_state_dict(), kept])

    def _settle(self, *, wait: bool) -> None:
        """End the writing of a checkpoint once all ranks have written; with wait, wait for them."""
        if self._writing is None:
            return
        written, finish = self._writing
        if not wait and most_over_ranks(not written.done()):
            return
        self._writing = None
        together(written.result)
        together(finish)
        self._name_best()

    def _name_best(self) -> None:
        if self._is_best:
            _second_name(self.folder / LAST, self.folder / BEST)
        self._is_best = False

    @cached_property
    def _writer(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "checkpoint")


def writes(
    strategy: Any, checkpoint: dict[str, Any], path: Path
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What this rank has to write of a checkpoint, and what to do when all ranks have: a copy, safe to train on beside.

    Every rank has to ask for it; what is returned may be called from another thread.
    """
    if hasattr(strategy, "writes"):
        return strategy.writes(checkpoint, path)
    if not strategy.is_global_zero:
        return nothing, nothing
    copy = host_copy(checkpoint)
    return lambda: strategy.checkpoint_io.save_checkpoint(copy, path), nothing


def nothing() -> None:
    """What a rank does that has nothing to write."""


def _second_name(file: Path, name: Path) -> None:
    """Give a file another name, replacing what had it."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:
        # not every file system knows links
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)
    sync_folder(name.parent)
