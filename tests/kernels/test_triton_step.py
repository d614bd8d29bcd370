"""The Triton one-token update against the reference."""

import pytest
import torch
from mambazoo.kernels.step import _update_op, selective_state_update
from torch import Tensor

from .problems import DEVICE, Options, Problem, assert_close, double, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]


def step_problem(
    b: int = 2,
    d: int = 6,
    n: int = 4,
    *,
    B: tuple[int, ...] | None = None,
    C: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
) -> Problem:
    shapes = {"u": (b, d), "delta": (b, d), "B": B or (b, n), "C": C or (b, n), "z": (b, d)}
    wide = {"state": (b, d, n), "D": (d,), "delta_bias": (d,)}
    problem = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    problem |= {name: torch.randn(shape) for name, shape in wide.items()}
    problem["A"] = -torch.rand(d, n) - 0.1
    return {name: x.to(DEVICE) for name, x in problem.items() if name not in without}


def compare(p: Problem, tolerance: float = 5e-6, **options: object) -> None:
    """Compare y and the state, whose own memory is written."""
    wide = double({name: x.clone() for name, x in p.items()})
    with torch.no_grad():
        truth = selective_state_update(**wide, **options, backend="reference")  # type: ignore[arg-type]
    state = p["state"]
    y = selective_state_update(**p, **options, backend="triton")  # type: ignore[arg-type]
    assert y.dtype == p["u"].dtype
    assert_close("state", state, wide["state"], 5e-6)
    assert_close("y", y, truth, tolerance)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"without": ("D", "z", "delta_bias")},
        {"B": (2, 3, 4), "C": (2, 3, 4)},
        {"B": (2, 2, 4), "C": (2, 1, 4)},
        {"B": (1, 6, 4)},
        {"C": (1, 6, 4)},
        {"B": (1, 6, 4), "C": (1, 6, 4)},
        {"b": 1, "B": (1, 6, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("softplus", [True, False])
def test_update_matches_reference(softplus: bool, problem: Options, discretization: str) -> None:
    compare(step_problem(**problem), delta_softplus=softplus, discretization=discretization)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 100, 256])
@pytest.mark.parametrize("d", [1, 5, 64, 129])
def test_update_matches_reference_at_any_size(d: int, n: int) -> None:
    compare(step_problem(3, d, n), delta_softplus=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_update_reads_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    compare(step_problem(3, 40, 16, dtype=dtype), tolerance, delta_softplus=True)
    p = step_problem(3, 40, 16, dtype=dtype)
    # constant matrices and steps stay in float32 beside them
    p |= {"delta": torch.randn(40, device=DEVICE), "B": torch.randn(1, 40, 16, device=DEVICE)}
    compare(p, tolerance, delta_softplus=True)


def test_update_reads_slices_and_writes_the_state_where_they_are() -> None:
    b, d, n = 3, 24, 8
    p = step_problem(b, d, n)
    p["u"], p["z"] = torch.randn(b, 2 * d, device=DEVICE).chunk(2, -1)
    p["delta"], p["B"], p["C"] = torch.randn(b, d + 2 * n, device=DEVICE).split([d, n, n], -1)
    p["A"] = -torch.rand(n, d, device=DEVICE).t()
    p["D"] = torch.randn(2 * d, device=DEVICE)[::2]
    around = torch.randn(b + 2, d, n, device=DEVICE)
    outside = around[[0, -1]].clone()
    compare(p | {"state": around[1:-1]}, delta_softplus=True)
    assert torch.equal(around[[0, -1]], outside)
    apart = torch.randn(n, d, b, device=DEVICE).permute(2, 1, 0)
    compare(p | {"state": apart}, delta_softplus=True)


def test_update_reads_views_that_negate() -> None:
    p = step_problem()
    p["A"] = torch.complex(p["A"], p["A"].abs()).conj().imag
    assert p["A"].is_neg()
    compare(p)


def test_update_takes_steps_of_any_size() -> None:
    extremes = [-200.0, -87.0, -30.0, -15.0, -5.0, -1e-3, 0.0, 1e-3, 1.0, 19.9, 20.1, 90.0, 1e4]
    d = len(extremes)
    p = step_problem(1, d, 1, without=("D", "z", "delta_bias", "B", "C", "state"))
    one = torch.ones(1, 1, device=DEVICE)
    delta = torch.tensor([extremes], device=DEVICE)
    truth = torch.nn.functional.softplus(delta.double())
    # with u, B, C and A one, euler adds the step itself to a state of zero
    p |= {"u": torch.ones(1, d, device=DEVICE), "delta": delta, "B": one, "C": one}
    y = selective_state_update(
        **p, state=torch.zeros(1, d, 1, device=DEVICE), delta_softplus=True, backend="triton"
    )
    error = (y.double() - truth).abs() / truth.abs().clamp(min=1e-6)
    assert error.max() < 1e-6


@pytest.mark.parametrize("sign", [-1, 1])
def test_exact_hold_keeps_its_digits_near_zero(sign: int) -> None:
    x = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 1e-2, 0.1, 0.499, 0.501, 1.0, 10.0], device=DEVICE)
    d = len(x)
    one = torch.ones(1, d, device=DEVICE)
    state = torch.zeros(1, d, 1, device=DEVICE)
    selective_state_update(
        state, one, one, sign * x[:, None], one[:, :1], one[:, :1], discretization="zoh", backend="triton"
    )
    wide = sign * x.double()
    truth = torch.where(wide == 0, 1.0, torch.expm1(wide) / wide)
    assert ((state.flatten().double() - truth).abs() / truth).max() < 2e-6


def test_complex_matrices_go_to_the_torch_backend() -> None:
    p = step_problem(2, 6, 4)
    p |= {name: p[name].to(torch.complex64) for name in ("state", "A", "B", "C")}
    compare(p, delta_softplus=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_update_repeats_in_a_captured_graph() -> None:
    p = step_problem(3, 40, 16, dtype=torch.bfloat16)
    state = p["state"].clone()
    truth = [
        selective_state_update(**p | {"state": state}, delta_softplus=True, backend="triton")
        for _ in range(3)
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_state_update(**p, delta_softplus=True, backend="triton")
    for expected in truth:
        graph.replay()
        assert torch.equal(y, expected)
    assert torch.equal(p["state"], state)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore")
def test_update_passes_opcheck(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    p = step_problem(2, 5, 3)
    for D, z in ((None, None), (p["D"], p["z"])):
        B, C = p["B"].unsqueeze(1), p["C"].unsqueeze(1)
        arguments = (p["state"], p["u"], p["delta"], p["A"], B, C, D, z, None, True, "zoh", backend)
        assert set(torch.library.opcheck(_update_op, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore")
def test_update_compiles_and_exports() -> None:
    torch.use_deterministic_algorithms(False)
    p = step_problem(2, 5, 3)

    class Step(torch.nn.Module):
        def forward(self, **p: Tensor) -> tuple[Tensor, Tensor]:
            y = selective_state_update(**p, delta_softplus=True, backend="triton")
            return y, p["state"].clone()

    def run(call: object) -> tuple[Tensor, Tensor]:
        return call(**{name: x.clone() for name, x in p.items()})  # type: ignore[operator]

    truth = run(Step())
    calls = {"compiled": torch.compile(Step(), fullgraph=True, backend="aot_eager")}
    for strict in (False, True):
        with torch.no_grad():
            calls[f"exported, strict {strict}"] = torch.export.export(Step(), (), p, strict=strict).module()
    for name, call in calls.items():
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                y, state = run(call)
            assert torch.equal(y, truth[0]), name
            assert torch.equal(state, truth[1]), name
