"""Which implementation of an operator runs: the one place that asks."""

import os

import torch

BACKENDS = ("torch", "reference")


def choose(device: torch.device, requested: str | None) -> str:
    """Name the back end for tensors on a device: `requested`, else MAMBAZOO_BACKEND, else the fastest there is."""
    name = requested or os.environ.get("MAMBAZOO_BACKEND") or "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return name
