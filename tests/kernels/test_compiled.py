"""Kernels compiled for GPUs that are not there."""

import importlib.util
import os
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)


@pytest.fixture
def registers() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "registers.py"
    spec = importlib.util.spec_from_file_location("registers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _without_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("_without_nvidia")
def test_kernels_compile_for_amd(registers: ModuleType) -> None:
    target = registers.GPUTarget("hip", "gfx942", 64)
    calls = [
        call
        for of, call in registers.CALLS.items()
        if not of.startswith("scan") or of.endswith("bf16, n = 16")
    ]
    found = [kernel for call in calls for kernel in registers.kernels_of(call, target).values()]
    assert len(found) > 15
    assert all(kernel.asm["hsaco"] for kernel in found)


@pytest.mark.usefixtures("_without_nvidia")
def test_no_kernel_is_compiled_anew_for_a_length(registers: ModuleType) -> None:
    target = registers.GPUTarget("hip", "gfx942", 64)
    calls = [
        partial(registers.scan, torch.bfloat16, b=b, l=l) for b, l in ((1, 512), (3, 517), (1, 1), (2, 4097))
    ]
    first, *others = [registers.kernels_of(call, target) for call in calls]
    assert len(first) == 7
    for other in others:
        # a row of one chunk has no states to find
        assert [name for name, kernel in other.items() if kernel is not first[name]] == []


def test_a_kernel_has_a_row_of_registers_and_spills(registers: ModuleType) -> None:
    target = registers.GPUTarget("cuda", 90, 32)
    kernels = registers.kernels_of(registers.CALLS["one token, bf16, d = 1536, n = 16"], target)
    rows = [registers.row("a token", name, kernel) for name, kernel in kernels.items()]
    assert [row.split("|")[2].strip() for row in rows] == ["`_update_kernel`", "`_conv_update_kernel`"]
    for row in rows:
        registers_used, spills = (int(cell) for cell in row.split("|")[4:6])
        assert 16 < registers_used < 256
        assert spills == 0
