"""The mixer and the backbone: initial values, one step after the other, causality, states, compilers, peers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig
from mambazoo.zoo.generate import leaves
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.mamba import Mamba

VARIANTS: list[dict[str, Any]] = [
    {},
    {"d_mlp": 48},
    {"d_mlp": 48, "layer_scale": 0.1},
    {"mamba": {"a_init": "s4d-lin"}},
    {"mamba": {"a_init": "constant", "bias": True}},
    {"mamba": {"a_init": "random", "discretization": "zoh"}},
    {"mamba": {"selective": []}},
    {"mamba": {"selective": ["delta"], "dt_rank": 1}},
    {"mamba": {"selective": ["B", "C"], "a_init": "s4d-lin"}},
    {"mamba": {"d_state": 1, "d_conv": 2, "expand": 1}},
    {"pattern": "attention"},
    {"pattern": "attention", "d_mlp": 48, "attention": {"d_head": 8}},
    {"pattern": "attention", "d_mlp": 0},
    {"pattern": "mamba*2 + attention", "attention": {"window": 6}},
    {"pattern": "lstm"},
]
# one of every kind of mixer
PATTERNS = ("mamba", "attention", "lstm", "mamba*2 + attention")


def build(values: dict[str, Any] | None = None) -> Backbone:
    return Backbone(BackboneConfig.from_dict({"d_model": 32, "n_layers": 3, **(values or {})}))


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@torch.no_grad()
def test_step_repeats_forward(values: dict[str, Any]) -> None:
    model, x = build(values), torch.randn(2, 19, 32)
    y, _ = model(x)
    state, rows = model.init_state(2), []
    for t in range(19):
        row, state = model.step(x[:, t], state)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", VARIANTS, ids=str)
@torch.no_grad()
def test_parts_with_the_state_handed_on_equal_the_whole(values: dict[str, Any]) -> None:
    model, x = build(values), torch.randn(2, 19, 32)
    whole, last = model(x, state=model.init_state(2))
    state, parts = model.init_state(2), []
    for part in x.split((2, 7, 10), dim=1):
        y, state = model(part, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(leaves(state), leaves(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [6, 4096])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_packed_sequences_equal_each_alone(pattern: str, window: int) -> None:
    model, x = build({"pattern": pattern, "attention": {"window": window}}), torch.randn(1, 19, 32)
    # one of them is empty
    bounds = [0, 5, 5, 6, 19]
    packed = torch.tensor(bounds, dtype=torch.int32)
    y, states = model(x, state=model.init_state(4), cu_seqlens=packed)
    torch.testing.assert_close(model(x, cu_seqlens=packed)[0], y, rtol=1e-5, atol=1e-5)
    for i, (start, end) in enumerate(pairwise(bounds)):
        alone, state = model(x[:, start:end], state=model.init_state(1))
        torch.testing.assert_close(y[:, start:end], alone, rtol=1e-5, atol=1e-5)
        for a, b in zip(states[2], state[2], strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_the_future_cannot_move_the_past(pattern: str) -> None:
    model, x = build({"pattern": pattern}), torch.randn(1, 19, 32)
    before, _ = model(x)
    x[:, 11:] += 100 * torch.randn(1, 8, 32)
    after, _ = model(x)
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.allclose(before[:, 11:], after[:, 11:])


def test_no_state_comes_out_where_none_went_in() -> None:
    assert build()(torch.randn(1, 4, 32))[1] is None


def test_mamba_starts_as_the_reference_does() -> None:
    config = BackboneConfig.from_dict({"d_model": 48, "n_layers": 6})
    model = Backbone(config)
    mixer = model.layers[2].mixer
    assert isinstance(mixer, Mamba)
    names = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert names == {
        "A_log": (96, 16),
        "D": (96,),
        "in_proj.weight": (192, 48),
        "conv1d.weight": (96, 1, 4),
        "conv1d.bias": (96,),
        "x_proj.weight": (3 + 32, 96),
        "dt_proj.weight": (96, 3),
        "dt_proj.bias": (96,),
        "out_proj.weight": (48, 96),
    }
    torch.testing.assert_close(mixer.A_log, torch.log(torch.arange(1.0, 17)).expand(96, 16))
    torch.testing.assert_close(mixer.A, -torch.arange(1.0, 17).expand(96, 16))
    assert torch.equal(mixer.D, torch.ones(96))
    step = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert step.min() >= 1e-3 * 0.999
    assert step.max() <= 1e-1 * 1.001
    # log-uniform: the mean of the logarithm is in the middle
    assert torch.log(step).mean().item() == pytest.approx(math.log(1e-2), abs=0.35)
    assert mixer.dt_proj.weight.abs().max() <= 3**-0.5
    assert mixer.dt_proj.weight.abs().max() > 0.8 * 3**-0.5
    bound = 1 / math.sqrt(96) / math.sqrt(6)
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_complex_and_other_initial_values_of_A() -> None:
    mixer = build({"mamba": {"a_init": "s4d-lin"}}).layers[0].mixer
    torch.testing.assert_close(mixer.A[0], torch.complex(torch.full((8,), -0.5), torch.arange(8.0)))
    mixer = build({"mamba": {"a_init": "constant"}}).layers[0].mixer
    torch.testing.assert_close(mixer.A, torch.full((64, 16), -0.5))


@torch.no_grad()
def test_steps_see_weights_that_changed() -> None:
    mixer, x = Mamba(16, BackboneConfig(d_model=16, n_layers=1).mamba).eval(), torch.randn(1, 16)
    before = mixer.A
    assert mixer.A is before
    mixer.A_log += 1
    assert torch.equal(mixer.A, -mixer.A_log.exp())
    assert mixer.A is not before
    mixer.double().float()
    assert torch.equal(mixer.A, -mixer.A_log.exp())
    state = mixer.init_state(1)
    mixer.step(x, state)
    mixer.A_log.copy_(torch.zeros_like(mixer.A_log))
    assert torch.equal(mixer.A, -torch.ones_like(mixer.A_log))


@torch.no_grad()
def test_layers_begin_at_their_scale_and_channels_learn_their_own() -> None:
    plain, scaled = build({"d_mlp": 48}).layers[1], build({"d_mlp": 48, "layer_scale": 0.25}).layers[1]
    scaled.load_state_dict(plain.state_dict(), strict=False)
    x, stream = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    scaled.scale2.zero_()
    # the MLP adds nothing then, and its stream has what the mixer adds
    added, after, _ = scaled(x, stream)
    assert not added.any()
    plain_after = plain(x, stream)[1]
    torch.testing.assert_close(after - x - stream, 0.25 * (plain_after - x - stream))
    scaled.scale[3] = 0
    assert torch.equal(scaled(x, stream)[1][..., 3], (x + stream)[..., 3])


def test_embedding_starts_small() -> None:
    model = LanguageModel({"d_model": 64, "n_layers": 1}, vocab_size=1000)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight is model.embedding.weight


@pytest.mark.filterwarnings("ignore")
def test_compiles_and_exports_as_one_graph() -> None:
    model, x = build(), torch.randn(2, 11, 32)
    expected, _ = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, _ = compiled(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    torch.testing.assert_close(compiled(x[:1], cu_seqlens=bounds)[0], model(x[:1], cu_seqlens=bounds)[0])
    with torch.no_grad():
        step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            step(x[:, 0], model.init_state(2))[0], model.step(x[:, 0], model.init_state(2))[0]
        )
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x)[0], expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_autocast_keeps_close_and_its_stream_in_float32(pattern: str) -> None:
    model, x = build({"pattern": pattern}), torch.randn(2, 40, 32)
    expected, _ = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = model(x)
        _, residual, _ = model.layers[0](x, None)
    assert residual.dtype == torch.float32
    assert (y.float() - expected).abs().max() < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_checkpointing_activations_changes_no_gradient(pattern: str) -> None:
    model, x = build({"pattern": pattern}), torch.randn(2, 11, 32)
    saving = build({"pattern": pattern, "checkpoint_activations": True})
    saving.load_state_dict(model.state_dict())
    for one in (model, saving):
        one(x)[0].square().sum().backward()
    for a, b in zip(model.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("d_state", [8, 16])
@torch.no_grad()
def test_agrees_with_transformers(d_state: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=d_state, use_cache=False
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    ours = LanguageModel({"d_model": 32, "n_layers": 2, "mamba": {"d_state": d_state}}, vocab_size=40)
    weights = {
        name.replace("backbone.embeddings.", "embedding.").replace("lm_head.", "head."): value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(weights)
    tokens = torch.randint(40, (2, 17))
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-5, atol=1e-5)
