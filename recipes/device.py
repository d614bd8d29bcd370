"""Where a trained model computes, and in what precision."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from ..zoo.task import Task

Model = TypeVar("Model", bound="Task")


def to_device(model: Model, device: str | None) -> Model:
    """The model, ready to use, on the device of that name; without one on a GPU where there is one.

    Raises:
        ValueError: when there is no such device.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device: a model cannot be put on {device!r} ({reason})") from None


def to_write(model: Model, device: str | None) -> Model:
    """The model on a device, to draw tokens one by one: a step reads all weights, which on a GPU become bfloat16.

    Raises:
        ValueError: when there is no such device.
    """
    import torch

    from ..zoo.optim import cast

    model = to_device(model, device)
    if precision(model.device) == "bfloat16":
        cast(model, torch.bfloat16)
    return model


def precision(device: "torch.device") -> str:
    """What a model computes in on a device, beside what it keeps in float32."""
    return "bfloat16" if device.type == "cuda" else "float32"


def autocast(device: "torch.device") -> AbstractContextManager[None]:
    """Have a model compute in that precision."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == "bfloat16")
