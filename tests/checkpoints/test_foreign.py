"""A bidirectional Mamba that others trained, from the package typeseg: its glue is written here, its scan is ours."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mambazoo.kernels.conv import causal_conv1d
from mambazoo.kernels.scan import selective_scan
from torch import Tensor

LAYERS, RANK, N = 6, 16, 16


@pytest.fixture
def weights() -> dict[str, Tensor]:
    found = importlib.util.find_spec("typeseg")
    if found is None or found.origin is None:
        pytest.skip("needs the weights in the package typeseg: pip install typeseg==0.2.7")
    values = np.load(Path(found.origin).parent / "data" / "mamba_al.npz")
    return {name: torch.from_numpy(values[name]).double() for name in values.files}


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}__scale"], weights[f"{name}__bias"], eps=1e-6)


def dense(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}__kernel"] + weights[f"{name}__bias"]


def block(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """x (1, l, d), both directions of the scan over the same inputs, gated and added."""
    u, gate = dense(norm(x, weights, f"{name}__LayerNorm_0"), weights, f"{name}__Dense_0").chunk(2, dim=-1)
    kernel, bias = weights[f"{name}__Conv_0__kernel"].squeeze(1).T, weights[f"{name}__Conv_0__bias"]
    # a window from one before to two after is a causal one, read two later
    u, _ = causal_conv1d(F.pad(u, (0, 0, 0, 2)), kernel.contiguous(), bias, activation="silu")
    u = u[:, 2:].contiguous()
    delta, B, C = dense(u, weights, f"{name}__Dense_1").split([RANK, N, N], dim=-1)
    delta = F.softplus(dense(delta, weights, f"{name}__Dense_2")) + 1e-4
    A, D = -weights[f"{name}__A_log"].exp(), weights[f"{name}__D"]
    y = sum(selective_scan(u, delta, A, B, C, D, reverse=reverse)[0] for reverse in (False, True))
    return x + dense(y * F.silu(gate), weights, f"{name}__Dense_3")


@torch.no_grad()
def test_its_logits_come_out(weights: dict[str, Tensor], data: Path) -> None:
    golden = np.load(data / "reference" / "typeseg_mamba_golden_io.npz")
    # bytes above 127 are one token, what is past a text another
    tokens = torch.from_numpy(golden["tokens"])
    x = weights["Embed_0__embedding"][tokens.clamp(max=128) + (tokens == 256).long()][None]
    for i in range(LAYERS):
        x = block(x, weights, f"CheckpointMambaBlock1D_{i}")
    logits = dense(norm(x, weights, "LayerNorm_0"), weights, "Dense_0")[0]
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits_fp64"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits.float(), torch.from_numpy(golden["logits_onnx"]), rtol=0, atol=2e-5)
