"""What every operator asks of its arguments before anything is launched, in one wording."""

import torch
from torch import Tensor

from .sequences import check_boundaries

DISCRETIZATIONS = ("euler", "zoh")


def expect(name: str, x: Tensor | None, device: torch.device, *shapes: tuple[int | None, ...]) -> None:
    """Refuse a tensor on another device or whose shape is none of `shapes`, where None stands for any size from 1."""
    if x is None:
        return
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, not on {device}: move them to one device")
    for shape in shapes:
        if len(shape) == x.ndim and all(
            size == want if want is not None else size > 0 for want, size in zip(shape, x.shape, strict=True)
        ):
            return
    wanted = " or ".join(str(shape).replace("None", "g") for shape in shapes)
    raise ValueError(f"{name} must be {wanted}, not {tuple(x.shape)}")


def check_discretization(discretization: str) -> None:
    if discretization not in DISCRETIZATIONS:
        raise ValueError(
            f"discretization must be one of {', '.join(DISCRETIZATIONS)}, not {discretization!r}"
        )


def count_sequences(cu_seqlens: Tensor | None, x: Tensor) -> int:
    """How many sequences x (b, l, d) holds: b, or s by boundaries (s + 1,) that rise from 0 to l.

    Raises:
        ValueError: when they are no boundaries of x.
    """
    b, l, _ = x.shape
    if cu_seqlens is None:
        return b
    if b != 1 or cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be int32 (s + 1,) beside b = 1, not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} "
            f"beside b = {b}: pack the sequences along the length"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, not on {x.device}: move them to one device")
    check_boundaries(cu_seqlens, l)
    return cu_seqlens.shape[0] - 1
