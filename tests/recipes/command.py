"""The command in this process: what running it comes to, and what makes a run of it small."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from mambazoo.recipes.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def call(*arguments: object) -> int:
    """Run the command in this process; return its code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


SMALL = (
    "data.length=32", "data.batch_size=2", "trainer.accelerator=cpu", "trainer.max_steps=6",
    "trainer.val_check_interval=3", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1",
    "model.optimizer.lr=0.01", "model.optimizer.warmup_steps=0",
)  # fmt: skip
