"""What the ranks of a run tell each other beside gradients: sums, decisions, states. One process is one rank."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# decisions are made by hosts, which must not wait for a GPU
_hosts: tuple[Any, Any] | None = None


def ranks() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient; every rank has to ask for it."""
    if ranks() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a floating-point tensor over all ranks, without gradient; every rank has to ask for it."""
    return sum_over_ranks(x) / ranks() if ranks() > 1 else x


def most_over_ranks(number: int) -> int:
    """The greatest of the ranks' numbers, agreed on between the hosts alone."""
    if ranks() == 1:
        return number
    x = torch.tensor(number)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_host_group())
    return int(x)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on each of them."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def together(act: Callable[[], Any]) -> None:
    """Do what may fail for want of disk on one rank alone, and fail on all of them then.

    Raises:
        OSError: that of the first rank that failed.
    """
    problem: OSError | None = None
    try:
        act()
    except OSError as error:
        problem = error
    if ranks() > 1:
        found = gather_objects(None if problem is None else (problem.errno, problem.strerror or str(problem)))
        failed = next((rank for rank in found if rank is not None), None)
        if failed is not None and problem is None:
            problem = OSError(*failed)
    if problem is not None:
        raise problem


def table(name: str) -> Any:
    """A table of texts that all ranks read and write, by the connection of this call: no collective waits for it."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )
    # torchrun keeps its own when it starts the ranks again
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"mambazoo/{name}/{again}", store)  # type: ignore[attr-defined]


def wait_at_most(seconds: float) -> None:
    """How long this rank waits for others in a collective, of whichever group; every rank has to say so."""
    _host_group()
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _host_group() -> Any:
    """All ranks, on a back end that needs no device."""
    global _hosts
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if _hosts is None or _hosts[0] is not world:
        _hosts = (world, dist.new_group(backend="gloo"))
    return _hosts[1]
