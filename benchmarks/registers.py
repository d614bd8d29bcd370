"""Compile every Triton kernel for a GPU that need not be there; print its registers and what it spills:

python benchmarks/registers.py [ARCHITECTURE]

A kernel is compiled as the operator that is called launches it, at the widths of `mambazoo bench` and a few rows, which
change no kernel. Spills are the instructions that store to a thread's local memory or load from it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from mambazoo.kernels import backend
from mambazoo.kernels.conv import causal_conv1d, causal_conv1d_update
from mambazoo.kernels.cross_entropy import linear_cross_entropy
from mambazoo.kernels.norm import rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.step import selective_state_update
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16, F32, C64 = torch.bfloat16, torch.float32, torch.complex64
# b, l, d and n; what the matrices are; flags. The first is what the bench times most, the last is B2S6
SCANS: dict[str, dict[str, Any]] = {
    "bf16, n = 16": {"dtype": BF16},
    "fp32, n = 16": {"dtype": F32},
    "bf16, packed": {"dtype": BF16, "bounds": [0, 100, 512]},
    "bf16, n = 64": {"dtype": BF16, "n": 64},
    "bf16, n = 256": {"dtype": BF16, "n": 256},
    "bf16, exact hold": {"dtype": BF16, "discretization": "zoh"},
    "fp32, constant delta, B and C": {"dtype": F32, "constant": True},
    "bf16, bias on B": {"dtype": BF16, "B_bias": True},
    "complex, n = 8, 8 groups, bias on B": {
        "dtype": BF16, "d": 256, "n": 8, "matrix": C64, "groups": 8, "B_bias": True,
    },
}  # fmt: skip


class Absent:
    """A GPU to compile for and not to run on, as Triton asks for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> GPUTarget:
        # no number: what is compiled for it is kept apart from what runs
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def dump(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels_of(call: Callable[[], Any], target: GPUTarget) -> dict[str, Any]:
    """The kernels that a call would launch, by name, compiled."""
    found = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if "OPERAND" in options:
            # chosen for the CPU that the tensors are on
            options["OPERAND"] = tl.bfloat16
        found[kernel.__name__] = run(kernel, *args, grid=grid, warmup=True, **options)

    # the tensors are on a CPU, where no kernel could run
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(driver, "_active", Absent(target)),
        patch.object(backend, "launching_on", lambda x: nullcontext()),
        patch.object(backend, "choose", lambda *args, **options: "triton"),
    ):
        call()
    return found


def row(of: str, name: str, kernel: Any) -> str:
    registers = dump(kernel.asm["cubin"], "-res-usage").split("REG:")[1].split()[0]
    # /*0010*/  @!P0 LDG.E.128 R4, [R2.64] ;  /* its encoding */
    lines = [
        line.split("*/", 1)[1].split()
        for line in dump(kernel.asm["cubin"], "-sass").splitlines()
        if ";" in line
    ]
    opcodes = [next(word for word in line if word[0] != "@") for line in lines]
    spills = sum(opcode.split(".")[0] in ("STL", "LDL") for opcode in opcodes)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return f"| {of} | `{name}` | {warps} | {registers} | {spills} | {shared} | {len(opcodes):,} |"


def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(outputs, inputs, [torch.zeros_like(y) for y in outputs])


def scan(
    dtype: torch.dtype,
    d: int = 2048,
    n: int = 16,
    matrix: torch.dtype | None = None,
    groups: int | None = None,
    bounds: list[int] | None = None,
    B_bias: bool = False,
    constant: bool = False,
    discretization: str = "euler",
    b: int = 1,
    l: int = 512,
) -> None:
    selective = (d, n) if constant else (b, l, n) if groups is None else (b, l, groups, n)
    wide = matrix or F32
    given: dict[str, Any] = {name: random(b, l, d, dtype=dtype) for name in ("u", "delta", "z")}
    given |= {name: random(*selective, dtype=F32 if constant else matrix or dtype) for name in ("B", "C")}
    given |= {"A": random(d, n, dtype=wide), "D": random(d), "delta_bias": random(d)}
    if constant:
        given["delta"] = random(d)
    if B_bias:
        given["B_bias"] = random(d, n, dtype=wide)
    y, _ = selective_scan(
        **given, delta_softplus=True, discretization=discretization, backend="triton",
        cu_seqlens=None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
    )  # fmt: skip
    backward([y], list(given.values()))


def conv(dtype: torch.dtype) -> None:
    x, weight, bias = random(8, 512, 2048, dtype=dtype), random(2048, 4), random(2048)
    backward([causal_conv1d(x, weight, bias, activation="silu", backend="triton")[0]], [x, weight, bias])


def norm(dtype: torch.dtype, d: int) -> None:
    x, residual, weight = random(16, 64, d, dtype=dtype), random(16, 64, d), random(d)
    backward(list(rms_norm(x, weight, residual=residual, backend="triton")), [x, residual, weight])


def step(dtype: torch.dtype, n: int) -> None:
    d = 1536
    u, vector, B = (
        torch.zeros(size, dtype=kind) for size, kind in (((1, d), dtype), ((d,), F32), ((1, n), dtype))
    )
    state, A = torch.zeros(1, d, n), torch.zeros(d, n)
    selective_state_update(state, u, u, A, B, B, vector, u, vector, True, backend="triton")
    window, weight = torch.zeros(1, 3, d, dtype=dtype), torch.zeros(d, 4, dtype=dtype)
    causal_conv1d_update(u, window, weight, vector, activation="silu", backend="triton")


def loss() -> None:
    y, head = random(16, 64, dtype=BF16), random(50280, 64)
    linear_cross_entropy(y, head, torch.zeros(16, dtype=torch.int64), backend="triton")


CALLS: dict[str, Callable[[], Any]] = {
    **{f"scan, {of}": partial(scan, **options) for of, options in SCANS.items()},
    "convolution, bf16, d = 2048": partial(conv, BF16),
    "convolution, fp32, d = 2048": partial(conv, F32),
    "norm with residual, bf16, d = 768": partial(norm, BF16, 768),
    "norm with residual, bf16, d = 4096": partial(norm, BF16, 4096),
    "one token, bf16, d = 1536, n = 16": partial(step, BF16, 16),
    "loss, bf16, 50,280 words": loss,
}


def main() -> None:
    architecture = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    print(f"sm_{architecture}, torch {torch.__version__}, triton {triton.__version__}\n")
    print(
        "| of | kernel | warps | registers | spills | shared bytes | instructions |\n|---|---|---|---|---|---|---|"
    )
    for of, call in CALLS.items():
        for name, kernel in kernels_of(call, GPUTarget("cuda", architecture, 32)).items():
            print(row(of, name, kernel), flush=True)


if __name__ == "__main__":
    main()
