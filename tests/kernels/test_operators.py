"""The convolution, the norm and the one-token update against the reference."""

from collections.abc import Callable

import pytest
import torch
from mambazoo.kernels.conv import _conv, _conv_update_op, causal_conv1d, causal_conv1d_update
from mambazoo.kernels.norm import _norm, rms_norm
from mambazoo.kernels.scan import selective_scan
from mambazoo.kernels.step import _update_op, selective_state_update
from torch import Tensor

from .problems import assert_close, gradients

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = ["torch"]
F64 = torch.float64


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=F64, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_matches_reference(backend: str, k: int, length: int, activation: str | None) -> None:
    p = tensors(x=(2, length, 5), weight=(5, k), bias=(5,), initial_state=(2, k - 1, 5))
    compare_conv(p, backend, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("state", [True, False])
def test_packed_conv_matches_reference(backend: str, k: int, state: bool) -> None:
    p = tensors(x=(1, 9, 5), weight=(5, k), bias=(5,), initial_state=(5, k - 1, 5))
    if not state:
        del p["initial_state"]
    bounds = torch.tensor([0, 1, 1, 6, 8, 9], dtype=torch.int32)
    compare_conv(p, backend, activation="silu", cu_seqlens=bounds)


def compare_conv(p: dict[str, Tensor], backend: str, **options: object) -> None:
    (y, h), (truth, h_truth) = (
        causal_conv1d(**p, **options, return_final_state=True, backend=name)  # type: ignore[arg-type]
        for name in (backend, "reference")
    )
    assert_close("y", y, truth, 1e-12)
    assert_close("final_state", h, h_truth, 1e-12)
    weights = [torch.randn_like(truth), torch.randn_like(h_truth)]
    expected = gradients([truth, h_truth], p, weights)
    for name, gradient in gradients([y, h], p, weights).items():
        assert_close(f"d{name}", gradient, expected[name], 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_steps_repeat_the_convolution(backend: str) -> None:
    p = {name: x.detach() for name, x in tensors(x=(2, 9, 5), weight=(5, 4), bias=(5,)).items()}
    whole, _ = causal_conv1d(**p, activation="silu", backend=backend)
    state = torch.zeros(2, 3, 5, dtype=F64)
    steps = [
        causal_conv1d_update(p["x"][:, t], state, p["weight"], p["bias"], activation="silu", backend=backend)
        for t in range(9)
    ]
    assert_close("y", torch.stack(steps, 1), whole, 1e-12)
    assert torch.equal(state, p["x"][:, -3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [(), ("residual",), ("gate",), ("residual", "gate")])
def test_norm_matches_reference(backend: str, names: tuple[str, ...]) -> None:
    p = tensors(x=(2, 3, 5), weight=(5,), residual=(2, 3, 5), gate=(2, 3, 5))
    p = {name: x for name, x in p.items() if name in ("x", "weight", *names)}
    (y, s), (truth, s_truth) = (rms_norm(**p, backend=name) for name in (backend, "reference"))
    assert_close("y", y, truth, 1e-12)
    assert_close("stream", s, s_truth, 1e-12)
    weights = [torch.randn_like(truth), torch.randn_like(truth)]
    expected = gradients([truth, s_truth], p, weights)
    for name, gradient in gradients([y, s], p, weights).items():
        assert_close(f"d{name}", gradient, expected[name], 1e-11)


def test_norm_keeps_the_stream_in_float32() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    residual = torch.randn(4, 8) + 100
    y, stream = rms_norm(x, torch.ones(8), residual=residual)
    assert y.dtype == torch.bfloat16
    assert torch.equal(stream, x.float() + residual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("kind", ["plain", "groups", "constant", "complex"])
def test_updates_repeat_the_scan(backend: str, discretization: str, kind: str) -> None:
    b, l, d, n = 2, 9, 6, 4
    dtype = torch.complex128 if kind == "complex" else F64
    shapes = {"groups": (b, l, 3, n), "constant": (d, n)}
    u, delta, z = (torch.randn(b, l, d, dtype=F64) for _ in range(3))
    A = -torch.rand(d, n, dtype=dtype) - 0.1
    B, C = (torch.randn(shapes.get(kind, (b, l, n)), dtype=dtype) for _ in range(2))
    D, bias = torch.randn(d, dtype=F64), torch.randn(d, dtype=F64)
    whole, last = selective_scan(
        u, delta, A, B, C, D, z, bias, True, return_final_state=True, discretization=discretization
    )
    state = torch.zeros(b, d, n, dtype=dtype)
    rows = []
    for t in range(l):
        own = (B[None], C[None]) if kind == "constant" else (B[:, t], C[:, t])
        row = selective_state_update(
            state, u[:, t], delta[:, t], A, *own, D, z[:, t], bias, True,
            discretization=discretization, backend=backend,
        )  # fmt: skip
        rows.append(row)
    assert_close("y", torch.stack(rows, 1), whole, 1e-12)
    assert_close("state", state, last, 1e-12)


@pytest.mark.filterwarnings("ignore")
def test_operators_pass_opcheck() -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 9, 5, requires_grad=True)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    state = torch.randn(2, 3, 5)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    calls = [
        (_conv.node, (x, weight, bias, state.clone().requires_grad_(), None, True, True, "torch")),
        (_conv.node, (x[:1].detach().requires_grad_(), weight, None, None, bounds, False, False, "torch")),
        (_norm.node, (x, bias, None, None, 1e-5, "torch")),
        (_norm.node, (x, bias, x, x, 1e-5, "torch")),
        (_conv_update_op, (x[:, 0].detach(), state, weight.detach(), None, True, "torch")),
        (
            _update_op,
            (
                torch.randn(2, 5, 3), torch.randn(2, 5), torch.randn(2, 5), -torch.rand(5, 3),
                torch.randn(2, 1, 3), torch.randn(2, 1, 3), None, None, None, True, "euler", "torch",
            ),
        ),
    ]  # fmt: skip
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_conv1d(torch.randn(2, 5), torch.randn(5, 4)), "x must be"),
        (lambda: causal_conv1d(torch.randn(2, 3, 5), torch.randn(4, 4)), "weight must be"),
        (lambda: causal_conv1d(torch.randn(2, 3, 5), torch.randn(5, 4), torch.randn(4)), "bias must be"),
        (lambda: causal_conv1d(torch.randn(2, 3, 5), torch.randn(5, 4), activation="gelu"), "activation must"),
        (
            lambda: causal_conv1d(torch.randn(2, 3, 5), torch.randn(5, 4), initial_state=torch.randn(2, 4, 5)),
            "initial_state must",
        ),
        (lambda: rms_norm(torch.randn(2, 5), torch.ones(4)), "weight must be"),
        (lambda: rms_norm(torch.randn(2, 5), torch.ones(5), residual=torch.randn(2, 4)), "residual must be"),
        (
            lambda: selective_state_update(
                torch.zeros(2, 6, 4), torch.randn(2, 5), torch.randn(2, 6), -torch.rand(6, 4),
                torch.randn(2, 4), torch.randn(2, 4),
            ),
            "u must be",
        ),
        (
            lambda: selective_state_update(
                torch.zeros(2, 6, 4), torch.randn(2, 6), torch.randn(2, 6), -torch.rand(6, 4),
                torch.randn(3, 4), torch.randn(2, 4),
            ),
            "B must be",
        ),
        (
            lambda: selective_state_update(
                torch.zeros(2, 6, 4), torch.randn(2, 6), torch.randn(2, 6), -torch.rand(6, 4),
                torch.randn(2, 4), torch.randn(2, 4), torch.randn(5),
            ),
            "D must be",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("bounds", [[0, 5], [0, 5, 100], [-8, 10], [0, 7, 5, 10]])
def test_wrong_boundaries_are_named(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to l = 10"):
        causal_conv1d(torch.randn(1, 10, 3), torch.randn(3, 4), cu_seqlens=cu_seqlens)


def test_boundaries_that_changed_are_looked_at_again() -> None:
    x, weight = torch.randn(1, 8, 3), torch.randn(3, 4)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            cu_seqlens = torch.tensor([0, 4, 8], dtype=torch.int32)
            causal_conv1d(x, weight, cu_seqlens=cu_seqlens)
            cu_seqlens.copy_(torch.tensor([0, 2, 5]))
            with pytest.raises(ValueError, match="cu_seqlens must rise"):
                causal_conv1d(x, weight, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_state_in_float32(backend: str) -> None:
    shapes = {"u": (2, 64), "delta": (2, 64), "A": (64, 16), "B": (2, 16), "C": (2, 16)}
    p = {name: torch.randn(shape) for name, shape in shapes.items()}
    states = [torch.zeros(2, 64, 16) for _ in range(2)]
    truth = selective_state_update(states[0], **p, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_state_update(states[1], **p, backend=backend)
    assert_close("y", y, truth, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 3, 5), (2, 3, 0)])
def test_nothing_makes_nothing(shape: tuple[int, int, int], backend: str) -> None:
    b, l, d = shape
    x = torch.randn(shape, requires_grad=True)
    y, _ = causal_conv1d(x, torch.randn(d, 4), activation="silu", backend=backend)
    A, matrix = -torch.rand(d, 4), torch.randn(b, l, 4)
    z, h = selective_scan(x, x, A, matrix, matrix, return_final_state=True, backend=backend)
    (y.sum() + z.sum()).backward()
    assert y.shape == z.shape == x.grad.shape == shape
    assert h.shape == (b, d, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_state_does_not_narrow_the_convolution(backend: str) -> None:
    x, weight = torch.randn(2, 5), torch.randn(5, 4)
    states = [torch.randn(2, 3, 5).bfloat16()] * 2
    y, truth = (
        causal_conv1d_update(x, state.clone(), weight, backend=name)
        for name, state in zip((backend, "reference"), states, strict=True)
    )
    assert_close("y", y, truth, 1e-6)


def scan_of(x: Tensor) -> Tensor:
    matrix = torch.ones(*x.shape[:2], 3, dtype=x.dtype)
    return selective_scan(x, x.abs(), -torch.ones(x.shape[2], 3, dtype=x.dtype), matrix, matrix)[0]


@pytest.mark.parametrize(
    "function",
    [
        scan_of,
        lambda x: causal_conv1d(x, torch.ones(4, 3, dtype=x.dtype), activation="silu")[0],
        lambda x: rms_norm(x, torch.ones(4, dtype=x.dtype))[0],
    ],
    ids=["scan", "conv", "norm"],
)
def test_a_gradient_of_a_gradient_is_refused_and_not_wrong(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 6, 4, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.square().sum().backward()


def test_what_has_no_values_has_shapes() -> None:
    x, bounds = torch.empty(1, 10, 4, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    y, _ = causal_conv1d(x, torch.empty(4, 3, device="meta"), cu_seqlens=bounds)
    matrix = torch.empty(1, 10, 3, device="meta")
    z, _ = selective_scan(y, y, torch.empty(4, 3, device="meta"), matrix, matrix, cu_seqlens=bounds)
    assert rms_norm(z, torch.empty(4, device="meta"))[0].shape == (1, 10, 4)
