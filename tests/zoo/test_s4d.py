"""The time-invariant mixer: its convolution, recurrence and scan are one map, started as S4D is."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from mambazoo.kernels.scan import selective_scan
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig, S4DConfig
from mambazoo.zoo.mamba import Mamba
from mambazoo.zoo.optim import cast, decays, is_state_space
from mambazoo.zoo.s4d import S4D

VARIANTS: list[dict[str, Any]] = [
    {},
    {"block": "s4", "a_init": "s4d-inv"},
    {"a_init": "s4d-real", "discretization": "euler"},
    {"block": "s4", "a_init": "s4d-real"},
    {"d_state": 2, "d_conv": 2, "expand": 1, "discretization": "euler"},
]


def build(values: dict[str, Any], d_model: int = 12) -> S4D:
    return S4D(d_model, S4DConfig(**values)).double()


@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
@pytest.mark.parametrize("values", VARIANTS, ids=str)
@torch.no_grad()
def test_convolution_recurrence_and_scan_are_one_map(values: dict[str, Any], length: int) -> None:
    mixer = build(values).eval()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    convolved, last = mixer(x, state=mixer.init_state(2))
    torch.testing.assert_close(mixer(x)[0], convolved, rtol=0, atol=1e-12)
    packed = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    scanned, scanned_last = mixer(x.view(1, -1, 12), state=mixer.init_state(2), cu_seqlens=packed)
    torch.testing.assert_close(scanned.view_as(x), convolved, rtol=0, atol=1e-12)
    torch.testing.assert_close(scanned_last.ssm, last.ssm, rtol=0, atol=1e-12)
    state, rows = mixer.init_state(2), []
    for t in range(length):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), convolved, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.ssm, last.ssm, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.conv, last.conv, rtol=0, atol=1e-12)


@pytest.mark.parametrize("a_init", ["s4d-lin", "s4d-inv", "s4d-real"])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_the_core_is_the_scan_with_nothing_chosen_gradients_too(a_init: str, discretization: str) -> None:
    mixer = build({"a_init": a_init, "discretization": discretization, "block": "s4"})
    u = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)
    delta, A, C = mixer.state_space()
    scanned, _ = selective_scan(
        u, delta, A, torch.ones_like(A), C, mixer.D, discretization=discretization, backend="reference"
    )
    weight, inputs = torch.randn_like(scanned), [u, *mixer.parameters(recurse=False)]
    expected = torch.autograd.grad((scanned * weight).sum(), inputs)
    convolved, _ = mixer.convolve(u)
    torch.testing.assert_close(convolved, scanned, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((convolved * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("a_init", ["s4d-lin", "s4d-real"])
def test_a_state_is_handed_on_with_its_gradients(a_init: str) -> None:
    mixer = build({"a_init": a_init, "block": "s4"})
    u = torch.randn(2, 37, 12, dtype=torch.float64, requires_grad=True)
    before = torch.randn_like(mixer.init_state(2).ssm).requires_grad_()
    delta, A, C = mixer.state_space()
    expected = selective_scan(
        u, delta, A, torch.ones_like(A), C, mixer.D, discretization="zoh", backend="reference",
        initial_state=before, return_final_state=True,
    )  # fmt: skip
    inputs, weights = [u, before, mixer.A_log, mixer.dt_bias], [torch.randn_like(x) for x in expected]
    gradients = []
    for outputs in (mixer.convolve(u, before), expected):
        loss = sum((w.conj() * x).real.sum() for w, x in zip(weights, outputs, strict=True))
        gradients.append(torch.autograd.grad(loss, inputs))
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_it_is_a_mamba_that_selects_nothing() -> None:
    config = BackboneConfig.from_dict(
        {"mamba": {"selective": [], "a_init": "s4d-lin", "discretization": "zoh"}}
    )
    mamba, mixer = Mamba(12, config.mamba).double(), build({})
    weights = mamba.state_dict()
    # all ones; in S4D it is part of C
    B = weights.pop("B").unflatten(-1, (-1, 2))
    B[..., 1] = 0
    mamba.get_parameter("B").copy_(B.flatten(-2))
    mixer.load_state_dict(weights)
    x = torch.randn(2, 50, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], mamba(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("values", [{"block": "s4"}, {"a_init": "s4d-real"}], ids=str)
def test_a_walk_is_the_convolution_of_each_packed_sequence_gradients_too(values: dict[str, Any]) -> None:
    mixer, bounds = build(values), [0, 9, 9, 17, 18, 30, 42, 43, 43]
    packed = torch.tensor(bounds, dtype=torch.int32)
    x = torch.randn(1, bounds[-1], 12, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *mixer.parameters()], torch.randn(1, bounds[-1], 12, dtype=torch.float64)
    walked, _ = mixer(x, cu_seqlens=packed)
    convolved = torch.cat([mixer(x[:, a:b])[0] for a, b in pairwise(bounds) if a < b], 1)
    torch.testing.assert_close(walked, convolved, rtol=0, atol=1e-12)
    expected = torch.autograd.grad((convolved * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((walked * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("values", VARIANTS[:3], ids=str)
@torch.no_grad()
def test_packed_sequences_and_parts_equal_the_whole(values: dict[str, Any]) -> None:
    mixer, x, bounds = build(values), torch.randn(1, 40, 12, dtype=torch.float64), [0, 5, 6, 40]
    packed = torch.tensor(bounds, dtype=torch.int32)
    y, states = mixer(x, state=mixer.init_state(3), cu_seqlens=packed)
    torch.testing.assert_close(mixer(x, cu_seqlens=packed)[0], y, rtol=0, atol=1e-12)
    for start, end in pairwise(bounds):
        alone, _ = mixer(x[:, start:end])
        torch.testing.assert_close(y[:, start:end], alone, rtol=0, atol=1e-12)
    _, state = mixer(x[:, 6:17], state=mixer.init_state(1))
    rest, state = mixer(x[:, 17:], state=state)
    torch.testing.assert_close(rest, y[:, 17:], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.ssm[0], states.ssm[2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_future_cannot_move_the_past() -> None:
    mixer, x = build({}), torch.randn(1, 40, 12, dtype=torch.float64)
    before, _ = mixer(x)
    x[:, 23:] += 100 * torch.randn(1, 17, 12)
    after, _ = mixer(x)
    # a transform mixes all positions before it takes them apart again
    torch.testing.assert_close(after[:, :23], before[:, :23], rtol=0, atol=1e-10)
    assert not torch.allclose(after[:, 23:], before[:, 23:])


def test_initial_values_follow_the_paper() -> None:
    mixer = S4D(200, S4DConfig(d_state=64))
    n = torch.arange(32.0)
    delta, A, C = mixer.state_space()
    torch.testing.assert_close(A, torch.complex(torch.full((400, 32), -0.5), (math.pi * n).expand(400, 32)))
    assert delta.min() >= 1e-3 * 0.999
    assert delta.max() <= 1e-1 * 1.001
    assert torch.log(delta).mean().item() == pytest.approx(math.log(1e-2), abs=0.2)
    assert C.abs().square().mean().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(mixer.D, torch.ones(400))
    inverse = S4D(8, S4DConfig(d_state=64, a_init="s4d-inv", block="s4")).state_space()[1]
    torch.testing.assert_close(inverse.imag[3], 64 / math.pi * (64 / (2 * n + 1) - 1))
    real = S4D(8, S4DConfig(d_state=16, a_init="s4d-real")).state_space()[1]
    torch.testing.assert_close(real[5], -torch.arange(1.0, 17))


def test_the_s4_layer_has_no_more_than_it_needs() -> None:
    shapes = {name: tuple(p.shape) for name, p in S4D(12, S4DConfig(block="s4")).named_parameters()}
    assert shapes == {
        "A_log": (12, 8),
        "A_imag": (12, 8),
        "C": (12, 16),
        "D": (12,),
        "dt_bias": (12,),
        "out_proj.weight": (24, 12),
        "out_proj.bias": (24,),
    }


def test_the_state_space_stays_in_float32_and_does_not_decay() -> None:
    mixer = S4D(12, S4DConfig())
    kept = {name for name, _ in mixer.named_parameters() if is_state_space(name)}
    assert kept == {"A_log", "A_imag", "D", "dt_bias"}
    assert not any(decays(name, p) for name, p in mixer.named_parameters() if name in kept)
    cast(mixer, torch.bfloat16).eval()
    x = torch.randn(1, 20, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        y, _ = mixer(x)
        state = mixer.init_state(1)
        rows = torch.stack([mixer.step(x[:, t], state)[0] for t in range(20)], 1)
    assert y.dtype == rows.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.complex64
    torch.testing.assert_close(rows, y, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_long_kernels_are_short_ones_gone_on_with() -> None:
    mixer = build({"block": "s4"})
    kernel = mixer.kernel(1 << 16)
    for length in (1, 2, 3, 1000, 65535):
        torch.testing.assert_close(mixer.kernel(length), kernel[:, :length], rtol=0, atol=1e-10)


def test_a_hybrid_trains_under_autocast() -> None:
    config = BackboneConfig.from_dict({"d_model": 16, "n_layers": 3, "pattern": "s4d*2 + mamba", "d_mlp": 24})
    model, x = Backbone(config), torch.randn(2, 40, 16)
    assert [type(block.mixer).__name__ for block in model.blocks] == ["S4D", "S4D", "Mamba"]
    expected, _ = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(x)
    assert (y.float() - expected).abs().max() < 0.1
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph() -> None:
    model = Backbone(BackboneConfig.from_dict({"d_model": 8, "n_layers": 1, "pattern": "s4d"}))
    x = torch.randn(2, 21, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": "s5"}, "s4d.block: must be one of mamba, s4"),
        ({"a_init": "s4d-imag"}, "s4d.a_init: must be one of"),
        ({"d_state": 7}, "s4d.d_state: must be even"),
        ({"dt_min": 0.0}, "s4d.dt_min: must be above 0"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4DConfig(**values)


def test_transforms_of_functions_work_where_there_are_no_kernels() -> None:
    mixer, x = build({"block": "s4"}), torch.randn(2, 9, 12, dtype=torch.float64)
    found = torch.func.grad(lambda x: mixer(x)[0].square().sum())(x)
    (expected,) = torch.autograd.grad(mixer(x.requires_grad_())[0].square().sum(), x)
    torch.testing.assert_close(found, expected)
