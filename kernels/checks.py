"""What every operator asks of its arguments before anything is launched, in one wording."""

import torch
from torch import Tensor

from .sequences import check_boundaries

DISCRETIZATIONS = ("euler", "zoh")
# what there is arithmetic for: of other dtypes an operator would lose a part without a word
REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = (*REAL, torch.complex64, torch.complex128)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...] = REAL) -> None:
    """Refuse what is no dense tensor in one of `dtypes`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be in one of {wanted}, not {x.dtype}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense, not {x.layout}")


def expect(
    name: str,
    x: Tensor | None,
    device: torch.device,
    *shapes: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] = REAL,
) -> None:
    """Refuse a tensor in another dtype, on another device or in no shape of `shapes`, where None is any size from 1."""
    if x is None:
        return
    check_tensor(name, x, dtypes)
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, not on {device}: move them to one device")
    for shape in shapes:
        if len(shape) == x.ndim and all(
            size == want if want is not None else size > 0 for want, size in zip(shape, x.shape, strict=True)
        ):
            return
    wanted = " or ".join(str(shape).replace("None", "g") for shape in shapes)
    raise ValueError(f"{name} must be {wanted}, not {tuple(x.shape)}")


def check_written(name: str, x: Tensor) -> None:
    """Refuse to write to elements that lie in one place."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(
            f"{name} is expanded, so that its elements share memory, and is written to: clone it"
        )


def check_states(n: int) -> None:
    if not 1 <= n <= 256:
        raise ValueError(f"A has n = {n} states a channel; 1 to 256 are supported")


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
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,))
    if b != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be (s + 1,) beside b = 1, not {tuple(cu_seqlens.shape)} beside b = {b}: "
            "pack the sequences along the length"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, not on {x.device}: move them to one device")
    check_boundaries(cu_seqlens, l)
    return cu_seqlens.shape[0] - 1
