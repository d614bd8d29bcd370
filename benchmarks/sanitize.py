"""Run every Triton kernel forward and backward on small problems, for the checkers of memory and of races:

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
compute-sanitizer --tool racecheck python benchmarks/sanitize.py
"""

from typing import Any

import torch
from mambazoo.kernels.conv import causal_conv1d, causal_conv1d_update
from mambazoo.kernels.cross_entropy import linear_cross_entropy
from mambazoo.kernels.norm import rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.step import selective_state_update
from torch import Tensor

BOUNDS = [0, 30, 30, 97, 300]
# d, n, groups, and what else there is
SCANS: list[tuple[int, int, int | None, dict[str, Any]]] = [
    (256, 16, None, {}),
    (33, 5, 3, {"discretization": "zoh", "reverse": True}),
    (64, 16, None, {"cu_seqlens": BOUNDS}),
    (64, 64, None, {}),
    (64, 16, 2, {"B_bias": True}),
    (64, 8, 2, {"B_bias": True, "complex": True}),
    (48, 32, None, {"complex": True, "reverse": True}),
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def backward(outputs: list[Tensor], inputs: list[Tensor]) -> None:
    for gradient in torch.autograd.grad(outputs, inputs, [torch.randn_like(y) for y in outputs]):
        assert gradient.isfinite().all()


def scan(dtype: torch.dtype, d: int, n: int, groups: int | None, options: dict[str, Any]) -> None:
    options = dict(options)
    state = torch.complex64 if options.pop("complex", False) else torch.float32
    matrix = state if state.is_complex else dtype
    bounds = options.pop("cu_seqlens", None)
    b, l = (1, BOUNDS[-1]) if bounds else (2, 300)
    selective = (b, l, n) if groups is None else (b, l, groups, n)
    A = -torch.rand(d, n, device="cuda") - 0.1
    given: dict[str, Any] = {name: random(b, l, d, dtype=dtype) for name in ("u", "delta", "z")}
    given |= {"D": random(d), "delta_bias": random(d)}
    given |= {"B": random(*selective, dtype=matrix), "C": random(*selective, dtype=matrix)}
    given["A"] = (torch.complex(A, torch.randn_like(A)) if state.is_complex else A).requires_grad_()
    given["initial_state"] = random(len(bounds) - 1 if bounds else b, d, n, dtype=state)
    if options.pop("B_bias", False):
        given["B_bias"] = random(d, n, dtype=state)
    if bounds:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    y, h = selective_scan(**given, delta_softplus=True, return_final_state=True, backend="triton", **options)
    assert h is not None
    backward([y, h], list(given.values()))


def others(dtype: torch.dtype) -> None:
    constant: dict[str, Any] = {
        "delta": random(64),
        "B": random(64, 16),
        "C": random(64, 16),
        "D": random(64),
    }
    A = (-torch.rand(64, 16, device="cuda") - 0.1).requires_grad_()
    u = random(2, 130, 64, dtype=dtype)
    y, _ = selective_scan(u, A=A, **constant, delta_softplus=True)
    backward([y], [u, A, *constant.values()])

    x, weight, bias = random(2, 133, 72, dtype=dtype), random(72, 4), random(72)
    before = random(2, 3, 72, dtype=dtype)
    y, after = causal_conv1d(
        x, weight, bias, activation="silu", initial_state=before, return_final_state=True
    )
    assert after is not None
    backward([y, after], [x, weight, bias, before])
    row, bounds = (
        random(1, 133, 72, dtype=dtype),
        torch.tensor([0, 10, 133], dtype=torch.int32, device="cuda"),
    )
    backward([causal_conv1d(row, weight, bias, cu_seqlens=bounds)[0]], [row, weight, bias])

    stream, scale, gate = random(2, 133, 72), random(72), random(2, 133, 72, dtype=dtype)
    y, summed = rms_norm(x, scale, residual=stream)
    backward([y, summed], [x, stream, scale])
    backward([rms_norm(x, scale, gate=gate)[0]], [x, gate, scale])

    with torch.no_grad():
        rows = [random(3, 72, dtype=dtype) for _ in range(3)]
        state, A = torch.randn(3, 72, 16, device="cuda"), -torch.rand(72, 16, device="cuda")
        B, C = random(3, 16, dtype=dtype), random(3, 16, dtype=dtype)
        selective_state_update(state, rows[0], rows[1], A, B, C, random(72), rows[2], random(72), True)
        causal_conv1d_update(rows[0], random(3, 3, 72, dtype=dtype), weight, bias, activation="silu")

    hidden, head = random(300, 64, dtype=dtype), random(1003, 64)
    loss, _ = linear_cross_entropy(hidden, head, torch.randint(1003, (300,), device="cuda"))
    backward([loss], [hidden, head])


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for problem in SCANS:
            scan(dtype, *problem)
        others(dtype)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
