"""Mixing from both sides: what sees what, what is shared, packed sequences, compilers, and that there is no state."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambazoo.kernels.sequences import boundaries, joined, mirrored
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.bidirectional import Bidirectional
from mambazoo.zoo.config import BackboneConfig, MambaConfig, S4DConfig
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.mamba import Mamba
from mambazoo.zoo.s4d import S4D

BOTH = pytest.mark.parametrize("bidirectional", ["tied", "untied"])


def build(bidirectional: str | None, **values: Any) -> Backbone:
    config = {"d_model": 32, "n_layers": 2, "bidirectional": bidirectional, **values}
    return Backbone(BackboneConfig.from_dict(config)).double()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@BOTH
def test_every_position_sees_both_sides(bidirectional: str) -> None:
    model, x = build(bidirectional), random(1, 9, 32).requires_grad_()
    for t in range(9):
        (seen,) = torch.autograd.grad(model(x)[0][0, t].sum(), x)
        assert (seen[0].abs().sum(-1) > 0).all()
    causal = build(None)
    (seen,) = torch.autograd.grad(causal(x)[0][0, 4].sum(), x)
    assert (seen[0].abs().sum(-1) > 0).tolist() == [True] * 5 + [False] * 4


@BOTH
def test_is_the_sum_of_a_mixer_and_of_another_on_the_reverse(bidirectional: str) -> None:
    config, x = MambaConfig(bias=True), random(2, 11, 32)
    first, second = (Mamba(32, config).double() for _ in range(2))
    if bidirectional == "tied":
        second.in_proj, second.out_proj = first.in_proj, first.out_proj
        torch.nn.init.zeros_(first.out_proj.bias)
    expected = first(x)[0] + second(x.flip(1))[0].flip(1)
    y, state = Bidirectional(first, second, tied=bidirectional == "tied")(x)
    torch.testing.assert_close(y, expected)
    assert state is None


def test_the_activation_of_s4_sees_each_direction_alone() -> None:
    config, x = S4DConfig(block="s4"), random(2, 11, 32)
    ahead, back = (S4D(32, config).double() for _ in range(2))
    weight, bias = ahead.out_proj.weight, ahead.out_proj.bias
    sides = ahead.convolve(x)[0], back.convolve(x.flip(1))[0].flip(1)
    expected = F.glu(F.linear(sum(F.gelu(side, approximate="tanh") for side in sides), weight, bias))
    torch.testing.assert_close(Bidirectional(ahead, back, tied=True)(x)[0], expected)


@BOTH
@torch.no_grad()
def test_packed_sequences_equal_each_alone(bidirectional: str) -> None:
    model, x = build(bidirectional), random(1, 19, 32)
    bounds = [0, 0, 5, 6, 6, 19, 19]
    y, _ = model(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    for start, end in pairwise(bounds):
        if end > start:
            torch.testing.assert_close(y[:, start:end], model(x[:, start:end])[0])


@BOTH
def test_packed_gradients_equal_each_alone(bidirectional: str) -> None:
    model, x = build(bidirectional), random(1, 12, 32)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    model(x, cu_seqlens=bounds)[0].square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for start, end in ((0, 5), (5, 12)):
        model(x[:, start:end])[0].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, packed[name])


def test_tied_directions_share_their_projections() -> None:
    count = {
        kind: sum(p.numel() for p in build(kind, n_layers=1).layers[0].mixer.parameters())
        for kind in (None, "tied", "untied")
    }
    projections = 32 * 128 + 64 * 32
    assert count["untied"] == 2 * count[None]
    assert count["tied"] == 2 * count[None] - projections
    names = set(build("tied", n_layers=1).state_dict())
    assert "layers.0.mixer.left_to_right.in_proj.weight" in names
    assert "layers.0.mixer.right_to_left.A_log" in names
    assert "layers.0.mixer.right_to_left.in_proj.weight" not in names


def test_directions_start_apart_and_both_are_scaled() -> None:
    mixer = build("untied", n_layers=8).layers[0].mixer
    ahead, back = mixer.left_to_right, mixer.right_to_left
    assert not torch.equal(ahead.conv1d.weight, back.conv1d.weight)
    for one in (ahead, back):
        assert one.out_proj.weight.abs().max() <= 1 / 8 / 8**0.5


@BOTH
def test_there_is_no_state(bidirectional: str) -> None:
    model, x = build(bidirectional), random(1, 5, 32)
    for call in (
        lambda: model.init_state(1),
        lambda: model.step(x[:, 0], [None, None]),
        lambda: model(x, state=[None, None]),
        lambda: model.layers[0].mixer.init_state(1),
        lambda: model.layers[0].mixer.step(x[:, 0], None),
        lambda: model.layers[0].mixer(x, state=()),
    ):
        with pytest.raises(ValueError, match="give it whole sequences"):
            call()


def test_a_model_of_the_next_token_refuses_to_see_it() -> None:
    for option in ({"bidirectional": "tied"}, {"reverse_complement": True}):
        with pytest.raises(ValueError, match=r"complement|must not see it"):
            LanguageModel({"d_model": 16, "n_layers": 1, **option}, vocab_size=8)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backbone.bidirectional: must be one of tied, untied, not 'tide'.*'tied'"
    ):
        BackboneConfig.from_dict({"bidirectional": "tide"})


@pytest.mark.filterwarnings("ignore")
@BOTH
def test_compiles_as_one_graph(bidirectional: str) -> None:
    model, x = build(bidirectional, reverse_complement=True), random(1, 11, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    bounds = torch.tensor([0, 5, 11], dtype=torch.int32)
    y, _ = compiled(x, cu_seqlens=bounds)
    torch.testing.assert_close(y, model(x, cu_seqlens=bounds)[0])
    y.sum().backward()
    # compiled code is kept per function, for so many models a process
    torch._dynamo.reset()


def test_checkpointing_activations_changes_no_gradient() -> None:
    model, x = build("tied", reverse_complement=True), random(2, 11, 64)
    saving = build("tied", reverse_complement=True, checkpoint_activations=True)
    saving.load_state_dict(model.state_dict())
    for one in (model, saving):
        one(x)[0].square().sum().backward()
    for a, b in zip(model.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_boundaries_of_a_row_read_from_its_end() -> None:
    bounds = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    back = mirrored(bounds, 9)
    assert back.dtype == torch.int32
    assert back.tolist() == [0, 7, 7, 9]
    both = joined(bounds, back, 9)
    assert both.tolist() == [0, 2, 2, 9, 16, 16, 18]
    assert boundaries(both, 18)
    with pytest.raises(ValueError, match="must rise"):
        mirrored(torch.tensor([0, 5], dtype=torch.int32), 9)


@pytest.mark.parametrize("pattern", ["mamba", "s4d", "attention"])
@pytest.mark.filterwarnings("ignore")
def test_padded_rows_compile_as_one_graph(pattern: str) -> None:
    # of one function a process compiles few kinds
    torch._dynamo.reset()
    model, x = build("tied", pattern=pattern, attention={"d_head": 8}), random(3, 11, 32).requires_grad_()
    lengths = torch.tensor([11, 4, 7])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [one(x, lengths=lengths)[0] for one in (model, compiled)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in found))
    torch._dynamo.reset()
