"""The selective scan's back ends against the reference: outputs, states and every gradient, by name."""

import pytest
import torch
from mambazoo.kernels import scan_torch
from mambazoo.kernels.scan import _scan, selective_scan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .problems import Options, Problem, assert_close, double, gradients, scan_problem

pytestmark = pytest.mark.usefixtures("poisoned")

BACKENDS = ["torch"]


def check(problem: Problem, backend: str, tolerance: float, **options: object) -> None:
    """Compare y, the last state and all gradients with the reference in double precision."""
    options = {"delta_softplus": True, "return_final_state": True, **options}
    truth, h_truth = selective_scan(**(wide := double(problem)), **options, backend="reference")
    y, h = selective_scan(**problem, **options, backend=backend)
    assert h is not None
    assert h_truth is not None
    assert_close("y", y, truth, tolerance)
    assert_close("final_state", h, h_truth, tolerance)
    weights = [torch.randn_like(truth), torch.randn_like(h_truth)]
    found = gradients([y, h], problem, [w.to(x.dtype) for w, x in zip(weights, (y, h), strict=True)])
    for name, expected in gradients([truth, h_truth], wide, weights).items():
        assert found[name].dtype == problem[name].dtype
        assert_close(f"d{name}", found[name], expected, tolerance)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few steps and rows, so that short problems cross many of them."""
    monkeypatch.setattr(scan_torch, "_SHORTEST", 4)
    monkeypatch.setitem(scan_torch._TILE, "cpu", 200)
    monkeypatch.setitem(scan_torch._STEP, "cpu", 30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
def test_scan_matches_reference_at_length(backend: str, length: int) -> None:
    check(scan_problem(l=length, d=7), backend, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "problem",
    [
        {},
        {"groups": 2},
        {"groups": 6},
        {"n": 1},
        {"n": 5, "complex_": True},
        {"constant": ("delta", "B", "C")},
        {"constant": ("B",), "groups": 3},
        {"constant": ("C",), "complex_": True},
        {"groups": 2, "B_bias": True},
        {"groups": 6, "B_bias": True, "complex_": True},
        {"without": ("D", "z", "delta_bias", "initial_state")},
        {"without": ("z",)},
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_tiles")
def test_every_variant_matches_reference(
    backend: str, discretization: str, reverse: bool, problem: Options
) -> None:
    check(scan_problem(**problem), backend, 1e-10, discretization=discretization, reverse=reverse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 13],
        [0, 3, 3, 9, 10, 13],
        [0, 1, 12, 24],
        [0, 5, 6, 7, 12, 12, 18, 20, 24],
        [0, 6, 6, 12, 17, 18, 24],
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_tiles")
def test_packed_sequences_match_reference(
    backend: str, bounds: list[int], complex_: bool, reverse: bool
) -> None:
    problem = scan_problem(b=1, l=bounds[-1], sequences=len(bounds) - 1, complex_=complex_)
    check(problem, backend, 1e-10, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), reverse=reverse)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_low_precision_inputs_match_reference(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    check(scan_problem(l=100, d=8, n=16, dtype=dtype), backend, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 60.0])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_tiny_and_huge_steps_match_reference(backend: str, scale: float, discretization: str) -> None:
    # decays from nearly one to underflow
    problem = scan_problem(l=50, dtype=torch.float32)
    problem["delta"] = (problem["delta"].detach().abs() * scale).requires_grad_()
    check(problem, backend, 1e-5, delta_softplus=False, discretization=discretization)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_gradcheck(backend: str) -> None:
    problem = scan_problem(b=1, l=7, d=4, n=2, complex_=True, sequences=3)
    bounds = torch.tensor([0, 2, 2, 7], dtype=torch.int32)

    def call(*tensors: torch.Tensor) -> object:
        named = dict(zip(problem, tensors, strict=True))
        return selective_scan(
            **named,
            delta_softplus=True,
            return_final_state=True,
            cu_seqlens=bounds,
            discretization="zoh",
            backend=backend,
        )

    assert torch.autograd.gradcheck(call, tuple(problem.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_after_chunk_equals_whole(backend: str) -> None:
    p = scan_problem(l=29, without=("initial_state",))
    whole, last = selective_scan(**p, return_final_state=True, backend=backend)
    state, parts = None, []
    for start, end in ((0, 10), (10, 11), (11, 29)):
        own = {name: x[:, start:end] if x.ndim == 3 else x for name, x in p.items()}
        y, state = selective_scan(**own, initial_state=state, return_final_state=True, backend=backend)
        parts.append(y)
    assert_close("y", torch.cat(parts, 1), whole, 1e-12)
    assert_close("state", state, last, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_equals_flip_scan_flip(backend: str) -> None:
    p = scan_problem(l=29)
    options: Options = {"delta_softplus": True, "return_final_state": True, "backend": backend}
    y, state = selective_scan(**p, reverse=True, **options)
    flipped = {name: x.flip(1) if x.ndim == 3 and name != "initial_state" else x for name, x in p.items()}
    z, last = selective_scan(**flipped, **options)
    assert_close("y", y, z.flip(1), 1e-12)
    assert_close("state", state, last, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bitwise(backend: str) -> None:
    p = scan_problem(b=3, l=200, d=40, n=16, dtype=torch.float32)

    def run() -> list[torch.Tensor]:
        y, h = selective_scan(
            **p, delta_softplus=True, return_final_state=True, deterministic=True, backend=backend
        )
        return [y, *torch.autograd.grad(y.sum() + h.sum(), list(p.values()))]

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                # an expanded tensor takes no memory of its own
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_never_holds_all_states() -> None:
    b, l, d, n = 1, 4096, 64, 64
    p = {name: x.detach() for name, x in scan_problem(b=b, l=l, d=d, n=n, dtype=torch.float32).items()}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "B_bias", "initial_state")
    arguments = (*(p.get(name) for name in names), None, True, False, "euler")
    with LargestTensor() as largest:
        y, h, kept = scan_torch.scan_fwd(*arguments)
        scan_torch.scan_bwd(y, h, kept, *arguments)
    assert b * l * d <= largest.numel <= max(scan_torch._TILE["cpu"], 4 * b * l * d)
    assert largest.numel < b * l * d * n / 8


@pytest.mark.parametrize(
    "problem",
    [{}, {"complex_": True, "B_bias": True}, {"without": ("D", "z", "delta_bias", "initial_state")}],
)
@pytest.mark.filterwarnings("ignore")
def test_operator_passes_opcheck(problem: Options) -> None:
    torch.use_deterministic_algorithms(False)
    p = scan_problem(dtype=torch.float32, **problem)
    tensors = [p.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    tensors += [p.get(name) for name in ("B_bias", "initial_state")]
    results = torch.library.opcheck(_scan.node, (*tensors, None, True, True, False, "euler", "torch"))
    assert set(results.values()) == {"SUCCESS"}


def test_an_unwanted_state_is_none() -> None:
    assert selective_scan(**scan_problem())[1] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.randn(2, 13)}, "u must be"),
        ({"u": torch.ones(2, 13, 6, dtype=torch.int64)}, "u must be"),
        ({"A": torch.randn(6, 4, dtype=torch.bfloat16)}, "A must be"),
        ({"A": torch.randn(5, 4)}, "A must be"),
        ({"A": torch.randn(6, 300), "B": torch.randn(2, 13, 300), "C": torch.randn(2, 13, 300)}, "n = 300"),
        ({"delta": torch.randn(2, 13, 5)}, "delta must be"),
        ({"B": torch.randn(2, 12, 4)}, "B must be"),
        ({"B": torch.randn(2, 13, 4, 4)}, "B has 4 groups"),
        ({"C": torch.randn(2, 13, 4, dtype=torch.complex64)}, "C must be real"),
        ({"B": torch.randn(2, 13, 2, 4), "C": torch.randn(2, 13, 3, 4)}, "B has 2 groups and C has 3"),
        ({"z": torch.randn(2, 13, 7)}, "z must be"),
        ({"D": torch.randn(7)}, "D must be"),
        ({"B_bias": torch.randn(6, 5)}, "B_bias must be"),
        ({"B_bias": torch.randn(6, 4, dtype=torch.float64)}, "B_bias must be"),
        ({"B_bias": torch.randn(6, 4), "B": torch.randn(6, 4)}, "B_bias must come beside a selective B"),
        ({"initial_state": torch.randn(3, 6, 4)}, "initial_state must be"),
        ({"initial_state": torch.randn(2, 6, 4, dtype=torch.float64)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 13], dtype=torch.int32)}, "cu_seqlens must be"),
        ({"discretization": "bilinear"}, "discretization must be"),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"z": torch.randn(2, 13, 6, device="meta")}, "z is on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {name: x.detach() for name, x in scan_problem(dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [[0, 5, 12], [1, 13], [0, 7, 5, 13]])
def test_wrong_boundaries_are_named(bounds: list[int]) -> None:
    p = scan_problem(b=1, without=("initial_state",))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to l = 13"):
        selective_scan(**p, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
