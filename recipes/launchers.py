"""Who started the ranks of a run, torchrun, SLURM or this command, and what they agree on before there is a trainer."""

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# the ranks that this command starts find its process here, which is the first of them
_STARTER = "MAMBAZOO_STARTER"


def tie_ranks() -> None:
    """Have no rank outlive the process that started it, whatever ends that, and at whatever moment.

    Called first in every process of a run: until it trains, a signal ends it without a word to the ranks it started,
    which would wait for it half an hour. The system kills them instead (Linux; elsewhere they find out by themselves).
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ[_STARTER] = str(os.getpid())
        return
    parent = starter()
    if parent is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(ctypes.c_int(1), ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        # it ended before this one could ask to be told
        sys.exit(1)


def starter() -> int | None:
    """The process that started this rank and is the first itself; None where that was not this command."""
    started = int(os.environ.get("LOCAL_RANK", 0)) > 0 and _STARTER in os.environ and cluster() is None
    return int(os.environ[_STARTER]) if started else None


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
