"""Checkpoints in parts: a file that lacks the tensors that ranks share out, and beside it one with each rank's parts.

The file with the rest is written last and renamed into its place, which makes all of them the checkpoint; whatever a
kill leaves before that is a folder that nothing names, and goes with the next checkpoint.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# beside a checkpoint, the folder of all parts; and within it, what stands for a tensor that is elsewhere
FOLDER, PART = "shards", "part"


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """A checkpoint with what is sharded replaced by its number, and this rank's parts in that order."""
    leaves, tree = tree_flatten(checkpoint)
    parts: list[Tensor] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, DTensor):
            leaves[i] = {PART: len(parts)}
            parts.append(leaf.to_local())
    return tree_unflatten(leaves, tree), parts


def host_copy(x: Any, gather: Callable[[DTensor], Any] | None = None) -> Any:
    """A copy of tensors and plain values, in the memory of the host; what were one tensor are one again.

    Args:
        x: dicts, lists and tuples of them.
        gather: makes the copy of a tensor that is shared out.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(x: Any) -> Any:
        if isinstance(x, DTensor) and gather is not None:
            return gather(x)
        if not isinstance(x, Tensor):
            return x
        place = _place(x)
        if place not in copies or not x.numel():
            # from a GPU into pinned memory, so that copies do not wait for one another
            copies[place] = x.detach().to("cpu", non_blocking=True, copy=True)
        return copies[place]

    whole = tree_map(copy, x)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return whole


def reserve(x: Any) -> None:
    """Get the pinned memory that `host_copy` of x will take, and leave it to be taken: that alone needs seconds."""
    tensors = {_place(leaf): leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor) and leaf.is_cuda}
    # all of it at once, so that no two are the same memory
    _ = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors.values()]


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: what has one place is one tensor."""
    return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype


def join(checkpoint: dict[str, Any], ranks: list[list[Tensor]]) -> dict[str, Any]:
    """The inverse of `split`, from the parts of all ranks: whole tensors (fully_shard divides them by rows)."""

    def is_part(x: Any) -> bool:
        return isinstance(x, dict) and x.keys() == {PART}

    leaves, tree = tree_flatten(checkpoint, is_leaf=is_part)
    whole = [torch.cat([parts[x[PART]] for parts in ranks]) if is_part(x) else x for x in leaves]
    return tree_unflatten(whole, tree)


def part_files(checkpoint: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The files with the parts of a checkpoint that lies in `folder`, by rank; none of one that is whole."""
    shards = checkpoint.get(FOLDER)
    if shards is not None:
        for rank in range(shards["ranks"]):
            yield folder / FOLDER / Path(shards["folder"]).name / part_name(rank)


def part_name(rank: int) -> str:
    return f"{rank:05}.parts"


def remove_unnamed(folder: Path, checkpoints: list[Path], read: Callable[[Path], dict[str, Any]]) -> None:
    """Remove the parts that none of the checkpoints of a folder names."""
    named = {read(path).get(FOLDER, {}).get("folder") for path in checkpoints if path.exists()}
    for parts in (folder / FOLDER).iterdir():
        if parts.name not in named:
            shutil.rmtree(parts, ignore_errors=True)
