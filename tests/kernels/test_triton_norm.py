"""The Triton norm against the reference: outputs and every gradient, in one tensor's dtype and in several."""

import pytest
import torch
from mambazoo.kernels.norm import _norm, rms_norm
from torch import Tensor

from .problems import DEVICE, Problem, assert_close, double, gradients, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}


def norm_problem(
    *shape: int, x: torch.dtype = F32, weight: torch.dtype = F32, **others: torch.dtype | None
) -> Problem:
    dtypes = {"x": x, **others}
    problem = {name: torch.randn(shape, dtype=dtype) for name, dtype in dtypes.items() if dtype is not None}
    problem["weight"] = torch.randn(shape[-1:], dtype=weight)
    return {name: tensor.to(DEVICE).requires_grad_() for name, tensor in problem.items()}


def compare(p: Problem, used: tuple[str, ...] = ("y", "stream"), backend: str = "triton") -> None:
    """Compare outputs, then the gradients of those `used`."""
    tolerance = max(TOLERANCE[x.dtype] for x in p.values())
    truth = dict(zip(("y", "stream"), rms_norm(**(wide := double(p)), backend="reference"), strict=True))
    found = dict(zip(("y", "stream"), rms_norm(**p, backend=backend), strict=True))
    assert found["y"].dtype == p["x"].dtype
    assert found["stream"].dtype == F32
    for name in truth:
        assert_close(name, found[name], truth[name], tolerance)
    inputs = {name: x for name, x in p.items() if name != "weight" or "y" in used}
    wide = {name: wide[name] for name in inputs}
    weights = [torch.randn_like(truth[name]).to(found[name]) for name in used]
    expected = gradients([truth[name] for name in used], wide, [w.double() for w in weights])
    for name, gradient in gradients([found[name] for name in used], inputs, weights).items():
        assert gradient.dtype == p[name].dtype
        assert_close(f"d{name}", gradient, expected[name], tolerance)


@pytest.mark.parametrize("names", [(), ("residual",), ("gate",), ("residual", "gate")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 64), (2, 1, 768)])
def test_norm_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, names: tuple[str, ...]) -> None:
    compare(norm_problem(*shape, x=dtype, **dict.fromkeys(names, dtype)))


@pytest.mark.parametrize("rows", [1, 2, 3, 63, 64, 100])
@pytest.mark.parametrize("d", [1, 3, 24])
def test_norm_matches_reference_at_any_number_of_rows(rows: int, d: int) -> None:
    compare(norm_problem(rows, d, x=BF16, residual=F32))


@pytest.mark.parametrize("d", [1023, 4096, 8192, 8200])
def test_norm_matches_reference_in_wide_rows(d: int) -> None:
    compare(norm_problem(3, d, x=BF16, residual=F32, gate=BF16))


@pytest.mark.parametrize("x", [F32, BF16])
@pytest.mark.parametrize("residual", [F32, BF16, None])
@pytest.mark.parametrize("gate", [F32, BF16, None])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_norm_mixes_dtypes(
    backend: str, x: torch.dtype, residual: torch.dtype | None, gate: torch.dtype | None
) -> None:
    compare(norm_problem(4, 40, x=x, weight=BF16, residual=residual, gate=gate), backend=backend)


@pytest.mark.parametrize("used", [("y",), ("stream",)])
@pytest.mark.parametrize("names", [(), ("residual", "gate")])
def test_norm_with_one_output_used(used: tuple[str, ...], names: tuple[str, ...]) -> None:
    p = norm_problem(6, 40, x=BF16, **dict.fromkeys(names, F32))
    if used == ("stream",):
        p.pop("gate", None)
    compare(p, used)


def test_norm_sums_the_weight_gradient_over_more_rows_than_programs() -> None:
    # rows of 4096 channels take 16 warps each, and there are 4096 warps
    compare(norm_problem(4096 // 16 + 5, 4096, x=BF16, residual=F32))


def test_norm_reads_slices_where_they_are() -> None:
    wide, d = torch.randn(2, 7, 3 * 40, device=DEVICE), 40
    x, residual, gate = wide.chunk(3, dim=-1)
    p = {"x": x, "residual": residual, "gate": gate, "weight": torch.randn(2 * d, device=DEVICE)[::2]}
    compare({name: tensor.detach().requires_grad_() for name, tensor in p.items()})
    transposed = torch.randn(d, 5, device=DEVICE).t().requires_grad_()
    compare({"x": transposed, "weight": p["weight"].detach().requires_grad_()})


def test_norm_takes_gradients_of_any_strides() -> None:
    p = norm_problem(4, 40, x=F32, residual=F32)
    y, stream = rms_norm(**p, backend="triton")
    truth, stream_truth = rms_norm(**(wide := double(p)), backend="reference")
    # a sum's gradient has strides of 0, a transposed product's channels are apart
    right = torch.randn(40, 4, device=DEVICE)
    found = torch.autograd.grad(y.sum() + (stream.t() * right).sum(), list(p.values()))
    expected = torch.autograd.grad(
        truth.sum() + (stream_truth.t() * right.double()).sum(), list(wide.values())
    )
    for name, one, other in zip(p, found, expected, strict=True):
        assert_close(f"d{name}", one, other, 1e-5)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0)])
def test_norm_of_nothing(shape: tuple[int, ...]) -> None:
    p = norm_problem(*shape, x=BF16, residual=F32)
    y, stream = rms_norm(**p, backend="triton")
    (y.sum() + stream.sum()).backward()
    assert y.shape == p["x"].grad.shape == shape  # type: ignore[union-attr]
    assert torch.equal(p["weight"].grad, torch.zeros_like(p["weight"]))  # type: ignore[arg-type]


def test_norm_gradients_are_the_same_bit_for_bit() -> None:
    p = norm_problem(200, 24, x=BF16, residual=F32)
    weights = [torch.randn(200, 24, device=DEVICE).to(dtype) for dtype in (BF16, F32)]
    once, again = (gradients(list(rms_norm(**p, backend="triton")), p, weights) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in p)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore")
def test_norm_passes_opcheck(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    for others in ({}, {"residual": F32}, {"residual": F32, "gate": BF16}):
        for dtype in (F32, BF16):
            p = norm_problem(2, 3, 8, x=dtype, **others)
            arguments = (p["x"], p["weight"], p.get("residual"), p.get("gate"), 1e-5, backend)
            assert set(torch.library.opcheck(_norm.node, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore")
def test_norm_compiles_and_exports() -> None:
    torch.use_deterministic_algorithms(False)
    p = norm_problem(3, 24, x=BF16, residual=F32)

    def call(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, residual=residual, backend="triton")

    truth = call(**p)
    weights = [torch.randn_like(x) for x in truth]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, found = gradients(list(truth), p, weights), gradients(list(compiled(**p)), p, weights)
    assert all(torch.equal(found[name], expected[name]) for name in p)

    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return call(x, weight, residual)

    plain = {name: x.detach() for name, x in p.items()}
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(call(**plain)[0], truth[0])
    for strict in (False, True):
        with torch.no_grad():
            program = torch.export.export(Norm(), (), plain, strict=strict)
        assert torch.equal(program.module()(**plain)[0], truth[0])
