"""The U-Net: shapes by hand, one step after the other across the bounds of pools, causality, states, packing."""

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig, UNetConfig
from mambazoo.zoo.generate import leaves
from mambazoo.zoo.optim import cast
from mambazoo.zoo.unet import UNet, build_backbone

LTI: dict[str, Any] = {"pattern": "s4d", "s4d": {"d_state": 4, "block": "s4"}}
VARIANTS: list[dict[str, Any]] = [
    {"pool": [4, 4]},
    {"pool": [3], "d_mlp": 12, "n_layers": 2},
    {"pool": [2, 3], "pattern": "mamba", "stages": [LTI, {"mamba": {"a_init": "s4d-lin"}}]},
    {"pool": [2, 2, 2], "pattern": "s4d + mamba", "n_layers": 2, "widen": 1},
    {"pool": [3], "pattern": "attention + lstm", "n_layers": 2, "attention": {"d_head": 4, "window": 5}},
]
LENGTHS = (1, 3, 4, 15, 16, 17, 47)


def build(values: dict[str, Any]) -> UNet:
    small = {"d_model": 8, "n_layers": 1, "mamba": {"d_state": 4}, "s4d": {"d_state": 4}}
    for name in ("mamba", "s4d"):
        small[name] = {**small[name], **values.get(name, {})}  # type: ignore[dict-item]
    model = build_backbone(BackboneConfig.from_dict({**small, **values}))
    assert isinstance(model, UNet)
    return model.double().eval()


def walk(model: UNet, x: torch.Tensor, state: list[Any]) -> tuple[torch.Tensor, list[Any]]:
    rows = []
    for t in range(x.shape[1]):
        y, state = model.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, 1), state


def assert_same_state(a: list[Any], b: list[Any]) -> None:
    for one, other in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@torch.no_grad()
def test_step_repeats_forward(values: dict[str, Any]) -> None:
    model, x = build(values), torch.randn(2, 61, 8, dtype=torch.float64)
    y, _ = model(x)
    rows, _ = walk(model, x, model.init_state(2))
    torch.testing.assert_close(rows, y, rtol=0, atol=1e-11)


@torch.no_grad()
def test_step_repeats_forward_in_single_precision() -> None:
    model, x = build(VARIANTS[2]).float(), torch.randn(2, 61, 8)
    rows, _ = walk(model, x, model.init_state(2))
    torch.testing.assert_close(rows, model(x)[0], rtol=1e-4, atol=1e-4)
    cast(model, torch.bfloat16)
    rows, state = walk(model, x.bfloat16(), model.init_state(2))
    assert rows.dtype == state[-2].below.dtype == torch.bfloat16
    torch.testing.assert_close(rows, model(x.bfloat16())[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_a_prompt_of_any_length_is_gone_on_from(values: dict[str, Any], length: int) -> None:
    model, x = build(values), torch.randn(2, 61, 8, dtype=torch.float64)
    whole, last = model(x, state=model.init_state(2))
    torch.testing.assert_close(whole, model(x)[0], rtol=0, atol=1e-11)
    start, state = model(x[:, :length], state=model.init_state(2))
    torch.testing.assert_close(start, whole[:, :length], rtol=0, atol=1e-11)
    part, forwarded = model(x[:, length:], state=state)
    torch.testing.assert_close(part, whole[:, length:], rtol=0, atol=1e-11)
    rest, stepped = walk(model, x[:, length:], state)
    torch.testing.assert_close(rest, whole[:, length:], rtol=0, atol=1e-11)
    # what of a group has not come is whatever it was
    for one in (last, forwarded, stepped):
        for i, pool in enumerate(one[len(model.stages) : -1]):
            pool.group[:, model._phase(i, one) :] = 0
    assert_same_state(forwarded, last)
    assert_same_state(stepped, last)


@torch.no_grad()
def test_packed_sequences_equal_each_alone() -> None:
    model, x = build(VARIANTS[2]), torch.randn(1, 46, 8, dtype=torch.float64)
    bounds = [0, 7, 7, 8, 33, 46]
    y, _ = model(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in pairwise(bounds):
        if start < end:
            torch.testing.assert_close(y[:, start:end], model(x[:, start:end])[0], rtol=0, atol=1e-11)

    bounds = [0, 7, 20, 45]
    packed = torch.tensor(bounds, dtype=torch.int32)
    y, states = model(x[:, :45], state=model.init_state(3), cu_seqlens=packed)
    rest = torch.randn(3, 9, 8, dtype=torch.float64)
    rows, _ = walk(model, rest, states)
    for i, (start, end) in enumerate(pairwise(bounds)):
        alone, _ = model(torch.cat([x[:, start:end], rest[i : i + 1]], 1))
        torch.testing.assert_close(
            torch.cat([y[:, start:end], rows[i : i + 1]], 1), alone, rtol=0, atol=1e-11
        )
    with pytest.raises(ValueError, match="one length modulo 6"):
        model(x[:, :45], state=model.init_state(2), cu_seqlens=torch.tensor([0, 7, 45], dtype=torch.int32))


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@torch.no_grad()
def test_the_future_cannot_move_the_past(values: dict[str, Any]) -> None:
    model, x = build(values), torch.randn(1, 50, 8, dtype=torch.float64)
    before, _ = model(x)
    for t in (1, 15, 16, 33):
        other = x.clone()
        other[:, t:] += 10 * torch.randn(1, 50 - t, 8)
        after, _ = model(other)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-10)
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-3)


@torch.no_grad()
def test_what_is_below_reaches_the_next_group_and_no_sooner() -> None:
    model, x = build({"pool": [4]}), torch.randn(1, 12, 8, dtype=torch.float64)
    before, _ = model(x)
    torch.nn.init.zeros_(model._pool(0).up.weight)
    torch.nn.init.zeros_(model._pool(0).up.bias)
    after, _ = model(x)
    assert torch.equal(after[:, :4], before[:, :4])
    assert not torch.isclose(after[:, 4:], before[:, 4:]).all(-1).any()


def test_stages_are_as_wide_and_mixed_as_said() -> None:
    config = BackboneConfig.from_dict(
        {"d_model": 64, "n_layers": 8, "pool": [4, 4], "d_mlp": 96, "pattern": "s4d", "mamba": {"d_state": 8},
         "stages": [{}, {"d_mlp": 0}, {"pattern": "mamba", "d_mlp": 0, "n_layers": 2, "mamba": {"d_conv": 2}}]}
    )  # fmt: skip
    assert isinstance(config, UNetConfig)
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    stages = [config.stage(i) for i in range(3)]
    assert [stage.d_model for stage in stages] == [64, 128, 256]
    assert [stage.d_mlp for stage in stages] == [96, 0, 0]
    assert [stage.mixers for stage in stages] == [["s4d"] * 8, ["s4d"] * 8, ["mamba"] * 2]
    # what a stage changes of a section leaves the rest of it as it is everywhere
    assert [(stage.mamba.d_state, stage.mamba.d_conv) for stage in stages] == [(8, 4), (8, 4), (8, 2)]
    with torch.device("meta"):
        model = UNet(config)
    assert [blocks.config.d_model for blocks in model.stages] == [64, 128, 256, 128, 64]
    assert [len(blocks.layers) for blocks in model.stages] == [8, 8, 2, 8, 8]


def test_attention_inside_has_its_mlp() -> None:
    config = BackboneConfig.from_dict(
        {"d_model": 48, "n_layers": 1, "pool": [4], "stages": [{}, {"pattern": "attention"}]}
    )
    assert isinstance(config, UNetConfig)
    assert [config.stage(i).mlp_width(mixer) for i, mixer in enumerate(("mamba", "attention"))] == [0, 256]


@pytest.mark.parametrize(
    ("values", "published"),
    [
        # Mamba, section 4.4: the digits' small and large models, the piano's
        ({"d_model": 64, "n_layers": 8, "pool": [4, 4]}, 6.1e6),
        ({"d_model": 96, "n_layers": 15, "pool": [4, 4]}, 24.3e6),
        ({"d_model": 64, "n_layers": 3, "pool": [16, 16]}, 3.5e6),
    ],
)
def test_the_papers_models_have_their_sizes(values: dict[str, Any], published: float) -> None:
    with torch.device("meta"):
        model = build_backbone(BackboneConfig.from_dict(values))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.03)


@torch.no_grad()
def test_the_state_is_moved_on_in_place_and_never_grows() -> None:
    model = build(VARIANTS[0])
    state = model.init_state(3)
    places = [t.data_ptr() for t in leaves(state) if isinstance(t, torch.Tensor)]
    x = torch.randn(3, 40, 8, dtype=torch.float64)
    _, state = walk(model, x, state)
    assert [t.data_ptr() for t in leaves(state) if isinstance(t, torch.Tensor)] == places
    assert state[-1] == 40 % 16


@pytest.mark.filterwarnings("ignore")
def test_everything_is_trained_and_compiles_as_one_graph() -> None:
    model, x = build(VARIANTS[2]).float().train(), torch.randn(2, 40, 8)
    y, _ = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model = build({"pool": [4], "pattern": "s4d"})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double())[0], model(x.double())[0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": []}, "backbone.pool: must be factors of 2 or more"),
        ({"pool": [4, 1]}, "backbone.pool: must be factors of 2 or more"),
        ({"pool": 4}, "backbone.pool: must be a list"),
        ({"pool": [4], "widen": 0}, "backbone.widen: must be above 0"),
        ({"pool": [4], "bidirectional": "tied"}, "backbone.pool: a U-Net steps"),
        ({"pool": [4], "stages": [{}, {}, {}]}, "backbone.stages: there are 2"),
        ({"pool": [4], "stages": [3]}, r"backbone.stages: must be a list \(a section of keys\)"),
        ({"pool": [4], "stages": [{"pattern": "s4"}]}, "did you mean 's4d'"),
        (
            {"pool": [4], "stages": [{"mamba": {"d_stat": 3}}]},
            "backbone.stages.0.mamba.d_stat: there is no such",
        ),
        ({"pools": [4]}, "backbone.pools: there is no such key"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneConfig.from_dict(values)


def test_without_pools_it_is_a_backbone() -> None:
    assert type(build_backbone(BackboneConfig(d_model=8, n_layers=1))) is Backbone
