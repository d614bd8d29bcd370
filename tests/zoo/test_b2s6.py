"""Channels in blocks and a bias of B: the paper's definition, steps, states, packed rows, adapters, learning rates."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from mambazoo.kernels import reference
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig, MambaConfig, OptimizerConfig
from mambazoo.zoo.generate import leaves
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.lora import attach, merge, split
from mambazoo.zoo.mamba import Mamba
from mambazoo.zoo.optim import build_optimizer, decays, is_state_space, parameter_groups
from torch import Tensor

EXACT = {"rtol": 1e-9, "atol": 1e-11}
VARIANTS: list[dict[str, Any]] = [
    {"heads": 4, "B_bias": True, "a_init": "s4d-lin"},
    {"heads": 4, "B_bias": True, "dt_rank": 3},
    {"heads": 8, "discretization": "zoh"},
    {"B_bias": True, "a_init": "s4d-lin", "discretization": "zoh"},
    {"heads": 2, "selective": ("B", "delta"), "B_bias": True},
    {"heads": 2, "selective": ("C",), "a_init": "s4d-lin"},
    {"heads": 32, "selective": ("B", "C"), "B_bias": True, "d_state": 1},
]
each = pytest.mark.parametrize("values", VARIANTS, ids=str)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def mixer(values: dict[str, Any]) -> Mamba:
    return Mamba(16, MambaConfig(**values)).double()


def build(values: dict[str, Any], **others: Any) -> Backbone:
    return Backbone(
        BackboneConfig.from_dict({"d_model": 16, "n_layers": 2, "mamba": values, **others})
    ).double()


def as_published(model: Mamba, u: Tensor, z: Tensor) -> Tensor:
    """Algorithm 2: each block by itself, B of every channel its own, the recurrence of the reference."""
    config, p = model.config, model.d_inner // model.heads
    widths = {"delta": model.dt_rank, "B": config.d_state, "C": config.d_state}

    def rows(name: str, j: int) -> Tensor:
        """What block j makes of its channels."""
        own = u[..., j * p : (j + 1) * p]
        if name not in model.together:
            return own @ model.delta_proj.weight[j * model.dt_rank : (j + 1) * model.dt_rank].T
        names = list(model.together)
        before, height = (sum(widths[n] for n in some) for some in (names[: names.index(name)], names))
        return own @ model.x_proj.weight[j * height + before : j * height + before + widths[name]].T

    def numbers(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if model.complex else x

    ys = []
    for j in range(model.heads):
        mine = slice(j * p, (j + 1) * p)
        delta, matrices = model.delta_bias[mine].expand(*u.shape[:2], -1), []
        if "delta" in config.selective:
            delta = delta + rows("delta", j) @ model.dt_proj.weight[mine].T
        for name in ("B", "C"):
            if name in config.selective:
                matrix = rows(name, j).unsqueeze(-2).expand(-1, -1, p, -1)
            else:
                matrix = model.get_parameter(name)[mine].expand(*u.shape[:2], -1, -1)
            if name == "B" and config.B_bias:
                matrix = matrix + model.B_bias[mine]
            matrices.append(numbers(matrix))
        y, _ = reference.selective_scan(
            u[..., mine], delta, model.A[mine], *matrices, model.D[mine], z[..., mine],
            delta_softplus=True, discretization=config.discretization,
        )  # fmt: skip
        ys.append(y)
    return torch.cat(ys, -1)


@each
def test_a_layer_is_what_the_paper_says_gradients_included(values: dict[str, Any]) -> None:
    model, x = mixer(values), random(2, 13, 16).requires_grad_()
    u, z = model.in_proj(x).chunk(2, -1)
    u, _ = reference.causal_conv1d(u, model.conv1d.weight.squeeze(1), model.conv1d.bias, activation="silu")
    expected = model.out_proj(as_published(model, u, z))
    weights, dy = dict(model.named_parameters()), torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *weights.values()], dy)
    y, _ = model(x)
    torch.testing.assert_close(y, expected, **EXACT)
    for name, a, b in zip(
        ["x", *weights], torch.autograd.grad(y, [x, *weights.values()], dy), wanted, strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


@each
@torch.no_grad()
def test_steps_and_parts_with_the_state_handed_on_equal_the_whole(values: dict[str, Any]) -> None:
    model, x = build(values), random(2, 13, 16)
    whole, last = model(x, state=model.init_state(2))
    torch.testing.assert_close(model(x)[0], whole, **EXACT)
    state, rows = model.init_state(2), []
    for part in x[:, :7].split((2, 1, 4), dim=1):
        y, state = model(part, state=state)
        rows.append(y)
    for t in range(7, 13):
        row, state = model.step(x[:, t], state)
        rows.append(row[:, None])
    torch.testing.assert_close(torch.cat(rows, 1), whole, **EXACT)
    for a, b in zip(leaves(state), leaves(last), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@each
@torch.no_grad()
def test_packed_sequences_equal_each_alone(values: dict[str, Any]) -> None:
    model, x = build(values), random(1, 13, 16)
    bounds = [0, 5, 5, 6, 13]
    y, states = model(x, state=model.init_state(4), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for i, (start, end) in enumerate(pairwise(bounds)):
        alone, state = model(x[:, start:end], state=model.init_state(1))
        torch.testing.assert_close(y[:, start:end], alone, **EXACT)
        for a, b in zip(states[1], state[1], strict=True):
            torch.testing.assert_close(a[i], b[0], **EXACT)


@pytest.mark.parametrize("bidirectional", ["tied", "untied"])
@torch.no_grad()
def test_both_directions_have_their_own(bidirectional: str) -> None:
    model, x = build(VARIANTS[0], bidirectional=bidirectional), random(1, 13, 16)
    both = model.layers[0].mixer
    assert not torch.equal(both.left_to_right.B_bias, both.right_to_left.B_bias)
    y, _ = model(x, cu_seqlens=torch.tensor([0, 4, 13], dtype=torch.int32))
    for start, end in ((0, 4), (4, 13)):
        torch.testing.assert_close(y[:, start:end], model(x[:, start:end])[0], **EXACT)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "values", [{"selective": ()}, {"selective": (), "a_init": "s4d-lin"}, *VARIANTS[:2]], ids=str
)
def test_every_back_end_trains_it(
    values: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build(values), random(2, 9, 16)
    expected = model(x)[0]
    monkeypatch.setenv("MAMBAZOO_BACKEND", backend)
    y, _ = model(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_blocks_change_names_and_shapes_only_where_they_are_asked_for() -> None:
    shapes = {
        name: tuple(p.shape) for name, p in Mamba(48, MambaConfig(heads=4, B_bias=True)).named_parameters()
    }
    plain = {name: tuple(p.shape) for name, p in Mamba(48, MambaConfig()).named_parameters()}
    assert shapes == plain | {
        "x_proj.weight": (4 * 32, 24),
        # the rank, 48 / 16, in all, at least one in each block
        "delta_proj.weight": (4, 24),
        "dt_proj.weight": (96, 1),
        "B_bias": (96, 16),
    }


def test_initial_values() -> None:
    model = Mamba(64, MambaConfig(heads=4, B_bias=True))
    # a block's rows read 32 channels
    for weight in (model.x_proj.weight, model.delta_proj.weight):
        assert 0.9 / 32**0.5 < weight.abs().max() <= 1 / 32**0.5
    assert model.B_bias.std().item() == pytest.approx(1, abs=0.1)
    step = torch.nn.functional.softplus(model.delta_bias)
    assert 1e-3 * 0.999 <= step.min() <= step.max() <= 1e-1 * 1.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 5}, r"backbone.mamba.heads: must divide the 32 channels, expand \* d_model, not 5"),
        ({"heads": 0}, "mamba.heads: must be above 0"),
        ({"heads": 2, "selective": []}, "mamba.heads: blocks choose delta, B or C"),
        ({"B_bias": True, "selective": ["delta", "C"]}, "mamba.B_bias: a B that is not in mamba.selective"),
        ({"B_bias": 1}, "B_bias: must be true or false, not 1"),
        ({"head": 2}, "did you mean 'heads'"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig.from_dict({"d_model": 16, "n_layers": 1, "mamba": values})
    # what no layer is made of is not looked at
    if values == {"heads": 5}:
        BackboneConfig.from_dict({"d_model": 16, "n_layers": 1, "mamba": values, "pattern": "s4d"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("values", VARIANTS[:2], ids=str)
def test_compiles_and_exports_as_one_graph(values: dict[str, Any]) -> None:
    model, x = build(values).float(), torch.randn(2, 11, 16)
    expected, _ = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, _ = compiled(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    with torch.no_grad():
        step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            step(x[:, 0], model.init_state(2))[0], model.step(x[:, 0], model.init_state(2))[0]
        )
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x)[0], expected)
    torch._dynamo.reset()


def test_autocast_keeps_close_and_gradients_in_float32() -> None:
    model, x = build(VARIANTS[0]).float(), torch.randn(2, 40, 16)
    expected, _ = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(x)
    assert (y.float() - expected).abs().max() < 0.08
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def test_adapters_go_on_every_projection_and_merge() -> None:
    values = {"d_model": 64, "n_layers": 1, "mamba": {"heads": 2, "B_bias": True}}
    model, x = LanguageModel(values, vocab_size=20), torch.randint(20, (2, 9))
    before = model(x)[0]
    attach(model, 4, 8.0)
    adapted = {
        name.split(".")[-5] for name, _ in model.named_parameters() if name.endswith((".up", ".whole"))
    }
    assert adapted >= {"in_proj", "conv1d", "x_proj", "delta_proj", "dt_proj", "out_proj"}
    torch.testing.assert_close(model(x)[0], before)
    for name, p in model.named_parameters():
        if name.endswith((".up", ".down", ".whole")):
            p.normal_(std=0.1)
    now = model(x)[0]
    assert (now - before).abs().max() > 0.1
    merged = LanguageModel(values, vocab_size=20)
    merged.load_state_dict(merge(*split(model.state_dict())))
    torch.testing.assert_close(merged(x)[0], now)


def test_delta_learns_at_a_rate_of_its_own() -> None:
    model = LanguageModel(
        {"d_model": 16, "n_layers": 2, "pattern": "mamba + s4d", "mamba": {"heads": 4, "B_bias": True}}, 20
    )
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, delta_lr=0.1)
    assert [group["scale"] for group in groups] == [1, 1, 0.1, 0.1]
    slow = {names[id(p)].partition("mixer.")[2] for group in groups[2:] for p in group["params"]}  # type: ignore[attr-defined]
    assert slow == {"delta_proj.weight", "dt_proj.weight", "dt_proj.bias", "dt_bias"}
    assert sum(len(group["params"]) for group in groups) == len(names)  # type: ignore[arg-type,misc]
    optimizer, schedule = build_optimizer(model, OptimizerConfig(lr=1e-2, delta_lr=0.1, warmup_steps=2), 10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3])
    # with a rate for every layer both count
    rates = [group["scale"] for group in parameter_groups(model, 0.1, 0.5, 0.1)]
    assert list(dict.fromkeys(rates)) == pytest.approx([1, 0.5, 0.25, 0.05, 0.025])
    for name in ("delta_lr", "A_lr"):
        with pytest.raises(ValueError, match=rf"optimizer.{name}: must be above 0"):
            OptimizerConfig(**{name: 0.0})


def test_a_learns_at_a_rate_of_its_own() -> None:
    model = LanguageModel({"d_model": 16, "n_layers": 2, "pattern": "mamba + s4d"}, 20)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer, _ = build_optimizer(model, OptimizerConfig(lr=1e-2, A_lr=0.1), 10)
    slow = [group for group in optimizer.param_groups if group["lr"] == pytest.approx(1e-3)]
    # the state space does not decay, whatever its rate
    assert [group["weight_decay"] for group in slow] == [0.0]
    assert {names[id(p)].partition("mixer.")[2] for p in slow[0]["params"]} == {"A_log", "A_imag"}
    assert len(slow[0]["params"]) == 3


def test_one_rate_leaves_the_groups_as_they_were() -> None:
    model = LanguageModel({"d_model": 16, "n_layers": 2}, 20)
    assert [group["scale"] for group in parameter_groups(model, 0.1)] == [1, 1]


def test_the_bias_belongs_to_the_state_space() -> None:
    model = Mamba(16, MambaConfig(heads=4, B_bias=True))
    assert is_state_space("layers.0.mixer.B_bias")
    assert {name for name, p in model.named_parameters() if decays(name, p)} == {
        "in_proj.weight", "conv1d.weight", "x_proj.weight", "delta_proj.weight", "dt_proj.weight", "out_proj.weight",
    }  # fmt: skip
