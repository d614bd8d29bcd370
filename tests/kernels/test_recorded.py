"""The operators against values and gradients recorded from the reference package's own kernels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambazoo.kernels.conv import causal_conv1d
from mambazoo.kernels.norm import rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.step import selective_state_update
from torch import Tensor

from .problems import DEVICE, assert_close, needs_triton

BACKENDS = ["torch", "reference", pytest.param("triton", marks=needs_triton)]


def moved(x: Tensor | None, backend: str) -> Tensor | None:
    """A tensor where a back end can take it; what comes back goes through .cpu(), and so do gradients."""
    return x.to(DEVICE) if x is not None and backend == "triton" else x


@pytest.fixture
def recorded(data: Path) -> dict[str, Any]:
    return json.loads((data / "reference" / "mamba_reference_cases.json").read_text())


def tensor(value: dict[str, Any]) -> Tensor:
    """A recorded tensor, in the dtype it was recorded in."""
    dtype = getattr(torch, value["dtype"])
    if "data_real" in value:
        return torch.complex(torch.tensor(value["data_real"]), torch.tensor(value["data_imag"])).to(dtype)
    return torch.tensor(value["data"]).to(dtype)


def inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor(value) for name, value in case["inputs"].items()}


def channel_last(name: str, x: Tensor) -> Tensor:
    """Recorded tensors with time have it last."""
    if x.ndim == 3 and name in ("u", "delta", "z", "B", "C", "y"):
        return x.transpose(1, 2)
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def as_complex(x: Tensor) -> Tensor:
    """(b, n, 2 l), real and imaginary parts in turns along the last axis, to (b, n, l)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "softplus", "tolerance"),
    [
        ("minimal", False, 2e-6),
        ("minimal_bf16", False, 2e-2),
        ("minimal_fp16", False, 2e-3),
        ("time_varying_3d", True, 2e-6),
        ("complex_A_packed_BC", False, 2e-6),
        ("grouped_time_varying", True, 2e-6),
        ("full", True, 2e-6),
    ],
)
def test_scan_matches_what_upstream_computed(
    recorded: dict[str, Any], backend: str, case: str, softplus: bool, tolerance: float
) -> None:
    record = recorded["selective_scan"][case]
    raw = inputs(record)
    if case == "complex_A_packed_BC":
        raw["B"], raw["C"] = as_complex(raw["B"]), as_complex(raw["C"])
    given = {name: channel_last(name, x) for name, x in raw.items()}
    y_recorded = channel_last("y", tensor(record["outputs"]["y"]))
    channels = slice(None)
    if case == "grouped_time_varying":
        # recorded for three channels in two groups, of which upstream read the third out of bounds
        channels = slice(0, 2)
        given = {
            name: x[..., channels] if name in ("u", "delta", "delta_bias") else x for name, x in given.items()
        }
        given["A"], y_recorded = given["A"][channels], y_recorded[..., channels]
    given = {name: x.requires_grad_() for name, x in given.items()}
    placed = {name: moved(x, backend) for name, x in given.items()}
    y = selective_scan(**placed, delta_softplus=softplus, backend=backend)[0].cpu()
    assert_close("y", y, y_recorded, tolerance)
    # upstream's gradients of `full` are not numbers, and of the groups' shared tensors hold the third channel
    if case == "full":
        return
    y.sum().backward()
    compared = set()
    for name, value in record["gradients"].items():
        expected = tensor(value)
        if case == "complex_A_packed_BC" and name in ("B", "C"):
            expected = as_complex(expected)
        expected = channel_last(name, expected)
        if case == "grouped_time_varying":
            if name in ("B", "C"):
                continue
            expected = expected[channels] if name in ("A", "delta_bias") else expected[..., channels]
        # of the groups' case, most of upstream's gradients are not numbers
        known = expected.isfinite()
        if known.any():
            assert_close(f"d{name}", given[name].grad[known], expected[known], max(tolerance, 5e-6))
            compared.add(name)
    assert compared >= ({"A"} if case == "grouped_time_varying" else set(record["gradients"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_matches_a_chip_vendors_vector(data: Path, backend: str) -> None:
    case = np.load(data / "reference" / "nvidia_cccl_mamba_selective_scan_fwd_ref.npz")
    v = {
        name: moved(torch.from_numpy(case[name]), backend)
        for name in ("u", "delta", "A", "B", "C", "D", "delta_bias", "out")
    }
    y, _ = selective_scan(
        v["u"].view(1, -1, 1), v["delta"].view(1, -1, 1), v["A"].view(1, 1), v["B"].view(1, 1), v["C"].view(1, 1),
        v["D"], delta_bias=v["delta_bias"], backend=backend,
    )  # fmt: skip
    assert_close("y", y.flatten().cpu(), v["out"].cpu(), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_update_matches_what_upstream_computed(recorded: dict[str, Any], backend: str) -> None:
    record = recorded["selective_state_update"]["baseline_full"]
    v = {name: moved(x, backend) for name, x in inputs(record).items()}
    y = selective_state_update(
        v["state"],
        v["x"],
        v["dt"],
        v["A"],
        v["B"],
        v["C"],
        v["D"],
        v["z"],
        v["dt_bias"],
        True,
        backend=backend,
    )
    assert_close("y", y.cpu(), tensor(record["outputs"]["y"]), 2e-6)
    assert_close("state", v["state"].cpu(), tensor(record["outputs"]["updated_state"]), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["channels_first_silu", "channels_last_identity"])
def test_conv_matches_what_upstream_computed(recorded: dict[str, Any], backend: str, case: str) -> None:
    record = recorded["dw_causal_conv"][case]
    v = inputs(record)
    first = case.startswith("channels_first")
    x = (v["x"].transpose(1, 2) if first else v["x"]).detach().requires_grad_()
    weight = v["weight"].requires_grad_()
    placed = (moved(part, backend) for part in (x, weight, v.get("bias")))
    y = causal_conv1d(*placed, activation="silu" if first else None, backend=backend)[0].cpu()
    expected = tensor(record["outputs"]["y"])
    assert_close("y", y, expected.transpose(1, 2) if first else expected, 2e-6)
    y.sum().backward()
    dx = tensor(record["gradients"]["x"])
    assert_close("dx", x.grad, dx.transpose(1, 2) if first else dx, 5e-6)
    assert_close("dweight", weight.grad, tensor(record["gradients"]["weight"]), 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_matches_what_upstream_computed(recorded: dict[str, Any], backend: str) -> None:
    record = recorded["layer_norms"]["rms_norm"]
    v = {name: x.requires_grad_() for name, x in inputs(record).items()}
    y = rms_norm(moved(v["x"], backend), moved(v["w"], backend), eps=1e-6, backend=backend)[0].cpu()
    assert_close("y", y, tensor(record["outputs"]["y"]), 1e-5)
    y.sum().backward()
    assert_close("dx", v["x"].grad, tensor(record["gradients"]["x"]), 2e-5)
    assert_close("dw", v["w"].grad, tensor(record["gradients"]["w"]), 2e-5)
