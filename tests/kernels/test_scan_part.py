"""The scan of parts is the scan of the whole, outputs and every gradient, on every back end."""

from itertools import pairwise

import pytest
import torch
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.scan_part import selective_scan_part
from torch import Tensor

from .problems import DEVICE, Options, assert_close, needs_triton, scan_problem


class Before:
    """The parts of one scan, worked on in their order forward and backward from the last."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.state, self.asked = A.detach(), None, None

    def part(self) -> "Before":
        one = Before(self.A)
        one.shared = self
        return one

    def start(self, end: Tensor, total: Tensor) -> Tensor:
        start = torch.zeros_like(end) if self.shared.state is None else self.shared.state
        self.decay = torch.exp(total.unsqueeze(-1) * self.A)
        self.shared.state = self.decay * start + end
        return start

    def end_gradient(self, d_start: Tensor) -> Tensor:
        d_end = torch.zeros_like(d_start) if self.shared.asked is None else self.shared.asked
        self.shared.asked = self.decay.conj() * d_end + d_start
        return d_end


ROWS = ("u", "delta", "B", "C", "z")


def split(p: dict[str, Tensor], time: slice) -> dict[str, Tensor]:
    return {name: x[:, time] if name in ROWS and x.ndim > 2 else x for name, x in p.items()}


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance", "cuts"),
    [
        ("torch", torch.float64, 1e-12, (0, 40)),
        ("torch", torch.float64, 1e-12, (0, 13, 40)),
        ("torch", torch.float32, 3e-5, (0, 8, 9, 40)),
        pytest.param("triton", torch.float32, 3e-5, (0, 8, 9, 18), marks=needs_triton),
    ],
)
def test_parts_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, tolerance: float, cuts: tuple[int, ...]
) -> None:
    if backend == "triton" and DEVICE == "cpu":
        from mambazoo.kernels import scan_triton

        monkeypatch.setattr(scan_triton, "_LENGTHS", (8,))
    options: Options = {"b": 2, "l": cuts[-1], "d": 3, "n": 4}
    p = {name: x.detach().to(DEVICE, dtype) for name, x in scan_problem(**options).items()}
    p.pop("initial_state", None)
    # steps so small that a state lives through all parts
    p["delta"] -= 2
    whole = {name: x.clone().requires_grad_() for name, x in p.items()}
    here = {name: x.clone().requires_grad_() for name, x in p.items()}
    y, _ = selective_scan(**whole, delta_softplus=True, backend=backend)
    dy = torch.randn_like(y)
    y.backward(dy)

    others = Before(p["A"])
    pieces = [slice(*bounds) for bounds in pairwise(cuts)]
    outputs = [
        selective_scan_part(
            **split(here, piece), delta_softplus=True, neighbours=others.part(), backend=backend
        )
        for piece in pieces
    ]
    assert_close("y", torch.cat(outputs, 1), y, tolerance)
    for output, piece in reversed(list(zip(outputs, pieces, strict=True))):
        output.backward(dy[:, piece])
    for name, x in whole.items():
        assert_close(f"d{name}", here[name].grad, x.grad, tolerance)
