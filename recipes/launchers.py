"""Ranks that something else has started, torchrun or SLURM, and what they agree on before there is a trainer."""

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any


def cluster() -> Any:
    """What started the ranks of this run, as Lightning sees it; None where this process starts them itself."""
    # a look at the environment spares the import
    if not any(name.startswith(("TORCHELASTIC_", "SLURM_")) for name in os.environ):
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: tuple[Any, ...] = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)


def is_first() -> bool:
    """Whether this is the first rank, or starts the others."""
    environment = cluster()
    return int(os.environ.get("LOCAL_RANK", 0) if environment is None else environment.global_rank()) == 0


def first_says(what: str, say: Callable[[], str]) -> str:
    """What `say` returns on the first rank, on all of them.

    Raises:
        ValueError: on the others, when the first rank failed to say it.
    """
    environment = cluster()
    if environment is None or environment.world_size() == 1:
        return say()
    store, key = _store(), f"mambazoo/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if not is_first():
        told = store.get(key).decode()
        if not told:
            raise ValueError("the first rank could not start the run; its message says why")
        return str(told[1:])
    told = ""
    try:
        told = "=" + say()
    finally:
        store.set(key, told)
    return told[1:]


@functools.cache
def _store() -> Any:
    """A table that all ranks read: torchrun has one at the port that it gives, else the first rank at the next."""
    from torch import distributed as dist

    environment, kept = cluster(), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(  # type: ignore[attr-defined]
        environment.main_address,
        environment.main_port + (0 if kept else 1),
        is_master=is_first() and not kept,
        wait_for_workers=False,
        # a corpus may take hours to prepare
        timeout=timedelta(days=1),
    )
