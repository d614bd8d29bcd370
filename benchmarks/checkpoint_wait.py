"""How long training waits for each of its checkpoints, and how long each is then being written.

    python benchmarks/checkpoint_wait.py language/pretrain data.paths=... model.backbone.size=mamba-370m \\
        callbacks.checkpoints.every_n_steps=20 trainer.max_steps=45

The arguments are those of `mambazoo fit`. The last checkpoint waits for the one before it to be written, if steps are
few.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from mambazoo.recipes.cli import main
from mambazoo.zoo import saving


def timed_save(self: saving.Checkpoints, trainer: L.Trainer) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    save(self, trainer)
    print(f"step {trainer.global_step}: waited {time.perf_counter() - start:.3f} s", flush=True)


def timed_write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    start = time.perf_counter()
    write(path, fill)
    size = path.stat().st_size / 2**30
    print(f"{path.name}: {size:.2f} GiB written in {time.perf_counter() - start:.3f} s", flush=True)


save, write = saving.Checkpoints.save, saving.write_whole
saving.Checkpoints.save, saving.write_whole = timed_save, timed_write  # type: ignore[assignment, method-assign]

if __name__ == "__main__":
    sys.argv[1:1] = ["fit"]
    main()
