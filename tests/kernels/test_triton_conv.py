"""The Triton convolution against the reference: outputs and every gradient, whole, packed and token by token."""

import pytest
import torch
from mambazoo.kernels import conv_torch
from mambazoo.kernels.conv import _conv, _conv_update_op, causal_conv1d, causal_conv1d_update
from torch import Tensor

from .problems import DEVICE, Problem, assert_close, double, gradients, needs_triton

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}


def conv_problem(
    b: int = 2,
    l: int = 20,
    d: int = 5,
    k: int = 4,
    *,
    sequences: int | None = None,
    x: torch.dtype = F32,
    weight: torch.dtype = F32,
    state: torch.dtype | None = None,
    without: tuple[str, ...] = (),
) -> Problem:
    problem = {
        "x": torch.randn(b, l, d, dtype=x),
        "weight": torch.randn(d, k, dtype=weight),
        "bias": torch.randn(d, dtype=weight),
        "initial_state": torch.randn(b if sequences is None else sequences, k - 1, d, dtype=state or x),
    }
    return {
        name: tensor.to(DEVICE).requires_grad_() for name, tensor in problem.items() if name not in without
    }


def compare(p: Problem, *, used: tuple[str, ...] = ("y", "final_state"), **options: object) -> None:
    """Compare outputs, then the gradients of those `used`."""
    tolerance = max(TOLERANCE[x.dtype] for x in p.values())
    wide = double(p)
    truth, found = (
        dict(
            zip(
                ("y", "final_state"),
                causal_conv1d(**q, **options, return_final_state=True, backend=backend),  # type: ignore[arg-type]
                strict=True,
            )
        )
        for q, backend in ((wide, "reference"), (p, "triton"))
    )
    for name in truth:
        assert found[name].dtype == p["x"].dtype
        assert_close(name, found[name], truth[name], tolerance)
    # weight and bias are no part of the last inputs
    inputs = {name: x for name, x in p.items() if "y" in used or name in ("x", "initial_state")}
    weights = [torch.randn_like(truth[name]).to(found[name]) for name in used]
    expected = gradients(
        [truth[name] for name in used], {name: wide[name] for name in inputs}, [w.double() for w in weights]
    )
    for name, gradient in gradients([found[name] for name in used], inputs, weights).items():
        assert gradient.dtype == p[name].dtype
        assert_close(f"d{name}", gradient, expected[name], tolerance)


def bounds_of(*lengths: int) -> Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return bounds.to(device=DEVICE, dtype=torch.int32)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 100])
def test_conv_matches_reference(length: int, k: int) -> None:
    compare(conv_problem(1, length, k=k), activation="silu" if length % 2 else None)


@pytest.mark.parametrize("without", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_bias_and_state_may_be_absent(without: tuple[str, ...]) -> None:
    compare(conv_problem(without=without), activation="silu")


@pytest.mark.parametrize("shape", [(7, 1), (9, 5), (3, 16), (5, 9)])
def test_short_rows_share_a_program(shape: tuple[int, int]) -> None:
    compare(conv_problem(*shape, d=3), activation="silu")


@pytest.mark.parametrize("d", [1, 3, 24, 130, 264])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_conv_matches_reference_at_any_width(d: int, dtype: torch.dtype) -> None:
    compare(conv_problem(d=d, x=dtype, weight=dtype), activation="silu")


@pytest.mark.parametrize(
    "dtypes", [{"x": BF16}, {"x": F32, "weight": BF16}, {"x": F16, "weight": F32, "state": F32}], ids=str
)
def test_conv_takes_a_dtype_for_each_tensor(dtypes: dict[str, torch.dtype]) -> None:
    # the initial state is rounded to x's dtype, here beforehand
    p = conv_problem(**dtypes)
    p["initial_state"] = p["initial_state"].detach().to(p["x"].dtype).to(p["initial_state"].dtype)
    p["initial_state"].requires_grad_()
    compare(p, activation="silu")


@pytest.mark.parametrize("used", [("y",), ("final_state",)])
def test_an_output_may_go_unused(used: tuple[str, ...]) -> None:
    compare(conv_problem(), used=used, activation="silu")
    compare(conv_problem(without=("initial_state",)), used=used)


@pytest.mark.parametrize(
    "lengths",
    [
        (20,), (1, 2, 3, 4, 5), (0, 3, 0, 0, 40, 0), (16, 16, 16), (0, 16, 0, 16, 0, 0, 5, 11, 0), (15, 1, 0, 2, 30),
        (1,) * 33, (0, 1, 0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("k", [2, 4])
def test_packed_conv_matches_reference(lengths: tuple[int, ...], state: bool, k: int) -> None:
    p = conv_problem(
        1, sum(lengths), 3, k, sequences=len(lengths), without=() if state else ("initial_state",)
    )
    compare(p, activation="silu", cu_seqlens=bounds_of(*lengths))


def test_packed_sequences_do_not_see_each_other() -> None:
    p = conv_problem(1, 40, without=("initial_state",))
    with torch.no_grad():
        p["x"][:, 18:] = torch.nan
    y, last = causal_conv1d(**p, return_final_state=True, cu_seqlens=bounds_of(18, 22), backend="triton")
    dx = torch.autograd.grad(y[:, :18].sum() + last[:1].sum(), p["x"])[0]
    assert all(x.isfinite().all() for x in (y[:, :18], last[0], dx[:, :18]))


@pytest.mark.parametrize("part", ["first", "second", "transposed", "step"])
def test_conv_reads_parts_of_wider_tensors(part: str) -> None:
    p = conv_problem(without=("x",))
    whole = torch.randn(2, 20, 10, device=DEVICE)
    cuts = {
        "first": whole[..., :5],
        "second": whole[..., 5:],
        "transposed": torch.randn(2, 5, 20, device=DEVICE).mT,
        "step": torch.randn(2, 40, 5, device=DEVICE)[:, ::2],
    }
    compare({**p, "x": cuts[part].detach().requires_grad_()}, activation="silu")


@pytest.mark.parametrize("kind", ["one number", "part"])
def test_a_gradient_may_have_any_strides(kind: str) -> None:
    p = conv_problem()
    whole = torch.ones(()).expand(2, 20, 5) if kind == "one number" else torch.randn(2, 20, 10)
    dy = whole.to(DEVICE)[..., :5]
    truth, _ = causal_conv1d(**(wide := double(p)), activation="silu", backend="reference")
    y, _ = causal_conv1d(**p, activation="silu", backend="triton")
    expected = gradients([truth], wide, [dy.double()])
    for name, gradient in gradients([y], p, [dy]).items():
        assert_close(f"d{name}", gradient, expected[name], 1e-5)


def test_chunk_after_chunk_is_the_whole() -> None:
    p = {name: x.detach() for name, x in conv_problem(l=40, d=3, x=BF16).items()}
    whole, last = causal_conv1d(**p, activation="silu", return_final_state=True, backend="triton")
    state, parts = p["initial_state"], []
    for x in p["x"].split([1, 2, 17, 20], dim=1):
        y, state = causal_conv1d(
            **{**p, "x": x, "initial_state": state},
            activation="silu", return_final_state=True, backend="triton",
        )  # fmt: skip
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


def test_gradients_are_the_same_every_time() -> None:
    p = conv_problem(l=33, d=24)
    y, _ = causal_conv1d(**p, activation="silu", backend="triton")
    once, again = (
        torch.autograd.grad(y.square().sum(), list(p.values()), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_conv_steps_repeat_the_convolution(dtype: torch.dtype, k: int) -> None:
    p = {name: x.detach() for name, x in conv_problem(l=6, k=k, x=dtype, weight=dtype).items()}
    whole, last = causal_conv1d(**p, activation="silu", return_final_state=True, backend="triton")
    # a state and an input that are parts of wider tensors
    cache = torch.full((2, k - 1, 8), torch.nan, dtype=dtype, device=DEVICE)
    state = cache[..., :5]
    state.copy_(p["initial_state"])
    for t in range(6):
        y = causal_conv1d_update(
            p["x"][:, t], state, p["weight"], p["bias"], activation="silu", backend="triton"
        )
        assert_close("y", y, whole[:, t], TOLERANCE[dtype])
    assert torch.equal(state, last)
    assert cache[..., 5:].isnan().all()


def test_a_step_takes_a_state_with_any_strides() -> None:
    x, weight = torch.randn(3, 5, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    state = torch.randn(3, 5, 3, device=DEVICE).mT
    truth_state = state.clone()
    truth = causal_conv1d_update(x, truth_state, weight, backend="reference")
    assert_close("y", causal_conv1d_update(x, state, weight, backend="triton"), truth, 1e-5)
    assert torch.equal(state, truth_state)


def test_other_widths_go_to_the_torch_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = conv_torch.conv_fwd
    monkeypatch.setattr(conv_torch, "conv_fwd", lambda *a: calls.append(len(a)) or forward(*a))
    for k in (1, 5):
        compare(conv_problem(k=k), activation="silu")
        p = {name: x.detach() for name, x in conv_problem(k=k, l=1).items()}
        whole, last = causal_conv1d(**p, return_final_state=True, backend="reference")
        state = p.pop("initial_state")
        y = causal_conv1d_update(p["x"][:, 0], state, p["weight"], p["bias"], backend="triton")
        assert_close("y", y, whole[:, 0], 1e-5)
        assert torch.equal(state, last)
    assert len(calls) == 2


def test_nothing_is_convolved_to_nothing() -> None:
    for b, l, d in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        p = conv_problem(b, l, d)
        y, last = causal_conv1d(**p, return_final_state=True, backend="triton")
        assert y.shape == (b, l, d)
        assert torch.equal(last, torch.cat([p["initial_state"], p["x"]], dim=1)[:, l:])
        for name, gradient in gradients([y, last], p, [torch.ones_like(y), torch.ones_like(last)]).items():
            assert gradient.shape == p[name].shape
            assert gradient.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_operators_pass_opcheck() -> None:
    torch.use_deterministic_algorithms(False)
    p = conv_problem(l=5)
    packed = conv_problem(1, 5, sequences=3)
    calls = [
        (_conv.node, (*p.values(), None, True, True, "triton")),
        (_conv.node, (packed["x"], packed["weight"], None, None, bounds_of(3, 0, 2), False, False, "triton")),
        (_conv.node, (*packed.values(), bounds_of(3, 0, 2), False, True, "triton")),
    ]
    step = [x.detach() for x in (p["x"][:, 0], p["initial_state"], p["weight"], p["bias"])]
    for operator, arguments in [*calls, (_conv_update_op, (*step, True, "triton"))]:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_the_convolution_compiles_in_one_graph() -> None:
    p = conv_problem(1, 9)

    def whole() -> Tensor:
        y, last = causal_conv1d(**p, activation="silu", return_final_state=True, backend="triton")
        return y.sum() + last.square().sum()

    def step(x: Tensor, state: Tensor) -> Tensor:
        return causal_conv1d_update(
            x, state, p["weight"].detach(), p["bias"].detach(), activation="silu", backend="triton"
        )

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    expected = gradients([whole()], p, [torch.ones((), device=DEVICE)])
    for name, gradient in gradients([compiled()], p, [torch.ones((), device=DEVICE)]).items():
        assert torch.equal(gradient, expected[name]), name
    x, state = p["x"][:, 0].detach(), p["initial_state"].detach()
    states = state.clone(), state.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x, states[0]), compiled(x, states[1]))
    assert torch.equal(*states)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory")
@pytest.mark.parametrize("shape", [(3, 262145, 4096), (1, 2097153, 1040), (70000, 8, 4096)], ids=str)
def test_offsets_pass_32_bits(shape: tuple[int, int, int]) -> None:
    b, l, d = shape
    x = torch.randn(1, 1, d, device=DEVICE, dtype=BF16).expand(b, l, d).contiguous().requires_grad_()
    weight = torch.randn(d, 4, device=DEVICE)
    y, _ = causal_conv1d(x, weight, activation="silu", backend="triton")
    # all steps but the first are alike, so the last seven stand for the whole
    own = x[-1:, -7:].detach().requires_grad_()
    truth, _ = causal_conv1d(own, weight, activation="silu", backend="torch")
    assert torch.equal(y[-1, -3:], y[0, -3:])
    assert_close("y", y[-1, -3:], truth[0, -3:], 1e-2)
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    expected = torch.autograd.grad(truth, own, torch.ones_like(truth))[0]
    assert_close("dx", dx[-1, -3:], expected[0, -3:], 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_steps_run_in_a_cuda_graph() -> None:
    x, weight = torch.randn(2, 24, device=DEVICE), torch.randn(24, 4, device=DEVICE)
    state, truth_state = (torch.zeros(2, 3, 24, device=DEVICE) for _ in range(2))
    causal_conv1d_update(x, state.clone(), weight, activation="silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = causal_conv1d_update(x, state, weight, activation="silu")
    for _ in range(5):
        x.normal_()
        graph.replay()
        truth = causal_conv1d_update(x, truth_state, weight, activation="silu", backend="reference")
        assert_close("y", y, truth, 1e-5)
    assert torch.equal(state, truth_state)
