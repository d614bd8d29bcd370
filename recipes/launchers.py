"""Ranks that something else has started, torchrun or SLURM, and what they agree on before there is a trainer."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

# kept, since the others may read what the first rank says for as long as it lives
_stores: dict[str, Any] = {}


def cluster() -> Any:
    """What started the ranks of this run, as Lightning sees it; None where this process starts them itself."""
    # a look at the environment spares the import
    if not any(name.startswith(("TORCHELASTIC_", "SLURM_")) for name in os.environ):
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: tuple[Any, ...] = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)


def first_says(what: str, say: Callable[[], str]) -> str:
    """What `say` returns on the first rank, on all of them."""
    environment = cluster()
    if environment is None or environment.world_size() == 1:
        return say()
    from torch import distributed as dist

    first = environment.global_rank() == 0
    # torchrun keeps a store at the port that it gives; elsewhere the next one is the first rank's for this
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _stores[what] = dist.TCPStore(  # type: ignore[attr-defined]
        environment.main_address,
        environment.main_port + (0 if kept else 1),
        is_master=first and not kept,
        wait_for_workers=False,
        timeout=timedelta(minutes=10),
    )
    key = f"mambazoo/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if first:
        store.set(key, say())
    return str(store.get(key).decode())
