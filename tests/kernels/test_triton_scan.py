"""The Triton scan against the reference, on a GPU where there is one, else interpreted: short chunks make many."""

import pytest
import torch
from mambazoo.kernels.scan import _scan, selective_scan

from .problems import DEVICE, Options, assert_close, double, gradients, needs_triton, scan_problem

pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned")]

ON_GPU = DEVICE == "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 steps where programs are interpreted, so that few steps make several chunks."""
    if needs_triton.args[0]:
        pytest.skip(needs_triton.kwargs["reason"])
    from mambazoo.kernels import scan_triton

    if not ON_GPU:
        monkeypatch.setattr(scan_triton, "_LENGTHS", (8,))


def compare(
    options: Options,
    *,
    bounds: list[int] | None = None,
    tolerance: float = 3e-5,
    change: object = None,
    final: bool = True,
    **flags: object,
) -> None:
    """Compare outputs and every gradient, by name, with the reference in float64."""
    p = scan_problem(**{"dtype": F32, **options})
    if change:
        p = {name: x.detach().requires_grad_() for name, x in change(p).items()}
    cu = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    flags = {"delta_softplus": True, **flags}
    wide = double(p)
    truth, h_truth = selective_scan(
        **wide, return_final_state=True, cu_seqlens=cu, backend="reference", **flags
    )
    here = {name: x.detach().to(DEVICE).requires_grad_() for name, x in p.items()}
    y, h = selective_scan(
        **here,
        return_final_state=final,
        cu_seqlens=None if cu is None else cu.to(DEVICE),
        backend="triton",
        **flags,
    )
    outputs, truths = ([y, h], [truth, h_truth]) if final else ([y], [truth])
    for name, found, expected in zip(("y", "final_state"), outputs, truths, strict=False):
        assert_close(name, found.cpu(), expected, tolerance)
    weights = [torch.randn_like(x) for x in truths]
    found = gradients(outputs, here, [w.to(x) for w, x in zip(weights, outputs, strict=True)])
    for name, expected in gradients(truths, wide, weights).items():
        assert_close(f"d{name}", found[name].cpu(), expected, tolerance)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20, *([63, 64, 100, 257, 1000, 4097] if ON_GPU else [])])
def test_lengths(length: int) -> None:
    compare({"l": length, "d": 33, "n": 4}, tolerance=1e-4 if length > 1000 else 3e-5)


@pytest.mark.parametrize("n", [1, 3, 16, 20, *([64, 100, 256] if ON_GPU else [])])
def test_states(n: int) -> None:
    compare({"l": 11, "d": 64, "n": n})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2},
        {"constant": ("delta", "B", "C")},
        {"constant": ("B",)},
        {"constant": ("C",)},
        {"groups": 2, "B_bias": True},
        {"without": ("D", "z", "delta_bias", "initial_state")},
    ],
    ids=str,
)
def test_variants(options: Options, discretization: str, reverse: bool) -> None:
    compare({"b": 1, "l": 13, "d": 66, **options}, discretization=discretization, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("without", [(), ("initial_state",)], ids=str)
def test_packed_sequences(without: tuple[str, ...], reverse: bool) -> None:
    bounds = [0, 3, 3, 14, 15, 24]
    options = {"b": 1, "l": 24, "d": 40, "sequences": 5, "without": without}
    compare(options, bounds=bounds, reverse=reverse, final=not without)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 2e-2), (F16, 3e-3)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    compare({"l": 20, "d": 64, "n": 16, "dtype": dtype, "without": ("initial_state",)}, tolerance=tolerance)


def test_complex_states_that_nothing_chooses_in_low_precision() -> None:
    # 16 columns in memory, as real states have that go through the matrix units
    constant: Options = {"complex_": True, "constant": ("delta", "B", "C"), "without": ("z",)}
    compare({"b": 1, "l": 10, "d": 64, "n": 8, "dtype": BF16, **constant}, tolerance=2e-2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options", [{"d": 128}, {"d": 768}, {"d": 512, "groups": 2, "without": ("z",)}], ids=str
)
def test_programs_of_several_warps(options: Options, reverse: bool) -> None:
    compare({"b": 1, "l": 10, "n": 16, "dtype": BF16, **options}, tolerance=2e-2, reverse=reverse)


def test_wide_matrices_beside_narrow_inputs() -> None:
    p = scan_problem(b=1, l=20, d=128, n=16, dtype=BF16, without=("initial_state",))
    p = {name: (x.float() if name in "BC" else x).detach().requires_grad_() for name, x in p.items()}
    here = {name: x.detach().to(DEVICE).requires_grad_() for name, x in p.items()}
    y, _ = selective_scan(**here, delta_softplus=True, backend="triton")
    truth, _ = selective_scan(**(wide := double(p)), delta_softplus=True, backend="reference")
    weight = torch.randn_like(y)
    found = gradients([y], here, [weight])
    expected = gradients([truth], wide, [weight.cpu().double()])
    # sums over channels are as exact as what they end up in
    for name in "BC":
        assert_close(f"d{name}", found[name].cpu(), expected[name], 1e-5)


def test_a_gradient_that_jumps_leaves_the_rest_in_single_precision() -> None:
    """The gradient of delta is a running sum over a chunk: its error is a part in 10^7 of the chunk's largest."""
    p = scan_problem(b=1, l=8, d=32, n=4, dtype=F32, without=("initial_state", "z"))
    here = {name: x.detach().to(DEVICE).requires_grad_() for name, x in p.items()}
    wide = double(p)
    weight = torch.randn(1, 8, 32)
    weight[:, -1] *= 1e3
    y, _ = selective_scan(**here, delta_softplus=True, backend="triton")
    truth, _ = selective_scan(**wide, delta_softplus=True, backend="reference")
    (found,) = torch.autograd.grad(y, here["delta"], weight.to(y))
    (expected,) = torch.autograd.grad(truth, wide["delta"], weight.double())
    assert float((found.cpu() - expected)[:, :-1].abs().max()) < 1e-6 * float(expected.abs().max())


def test_unwanted_final_state_leaves_the_rest() -> None:
    compare({"l": 20, "d": 40, "without": ("initial_state",)}, final=False)


@pytest.mark.parametrize("scale", [1e-4, 20.0, 1e4])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_tiny_and_huge_steps(scale: float, discretization: str) -> None:
    def change(p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**p, "delta": torch.rand_like(p["delta"]) * scale, "A": p["A"] * 30}

    compare(
        {"l": 20, "d": 32, "n": 4, "without": ("delta_bias",)},
        change=change,
        delta_softplus=False,
        discretization=discretization,
        tolerance=2e-4,
    )


def test_slices_are_read_in_place() -> None:
    wide = torch.randn(2, 13, 3 * 32, device=DEVICE)
    u, delta, z = wide.split(32, dim=-1)
    A, B = -torch.rand(32, 4, device=DEVICE), torch.randn(2, 13, 8, device=DEVICE)
    arguments = (u, delta, A, *B.split(4, dim=-1), None, z)
    y, _ = selective_scan(*arguments, delta_softplus=True, backend="triton")
    truth, _ = selective_scan(
        *(x if x is None else x.cpu().double() for x in arguments), delta_softplus=True, backend="reference"
    )
    assert_close("y", y.cpu(), truth, 1e-5)


def test_repeats_bitwise() -> None:
    p = {name: x.to(DEVICE) for name, x in scan_problem(l=20, d=40, n=16, dtype=BF16).items()}
    p = {name: x.detach().requires_grad_() for name, x in p.items()}

    def run() -> list[torch.Tensor]:
        y, h = selective_scan(**p, delta_softplus=True, return_final_state=True, backend="triton")
        return [y, h, *torch.autograd.grad(y.float().sum() + h.sum(), list(p.values()))]

    first = run()
    for _ in range(100 if ON_GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(("packed", "complex_"), [(False, False), (True, False), (False, True)])
def test_operator_passes_opcheck(packed: bool, complex_: bool) -> None:
    torch.use_deterministic_algorithms(False)
    sequences = 2 if packed else None
    options = {"sequences": sequences, "complex_": complex_, "B_bias": True}
    p = scan_problem(b=1 if packed else 2, l=9, d=8, n=4, dtype=F32, **options)
    p = {name: x.detach().to(DEVICE).requires_grad_() for name, x in p.items()}
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE) if packed else None
    torch.library.opcheck(_scan.node, (*p.values(), bounds, True, True, False, "euler", "triton"))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"n": 3, "d": 33}, {}),
        ({"n": 8, "groups": 2, "B_bias": True}, {"reverse": True}),
        ({"constant": ("delta", "B", "C")}, {}),
        ({"dtype": BF16, "without": ("D", "z", "delta_bias", "initial_state")}, {"tolerance": 2e-2}),
        *([({"n": 100, "l": 300}, {}), ({"n": 32, "l": 1000}, {"reverse": True})] if ON_GPU else []),
    ],
    ids=str,
)
def test_complex_states(options: Options, flags: Options) -> None:
    compare({"b": 1, "l": 13, "d": 64, "complex_": True, **options}, **flags)


def test_complex_states_of_packed_sequences() -> None:
    bounds = [0, 3, 3, 14, 15, 24]
    compare({"b": 1, "l": 24, "d": 40, "sequences": 5, "complex_": True}, bounds=bounds)


def test_the_exact_hold_of_complex_states_takes_the_torch_back_end() -> None:
    p = {name: x.to(DEVICE) for name, x in scan_problem(complex_=True, dtype=F32).items()}
    found, truth = (
        selective_scan(**p, delta_softplus=True, discretization="zoh", backend=backend)[0]
        for backend in ("triton", "torch")
    )
    assert torch.equal(found, truth)
