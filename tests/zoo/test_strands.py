"""Both strands: the reverse complement in gives the reverse complement out, exactly, and as the paper writes it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from mambazoo.kernels.sequences import reverse
from mambazoo.zoo.backbone import Backbone
from mambazoo.zoo.config import BackboneConfig
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.strands import complement_table, reverse_complement
from torch import Tensor

# A, C, G, T, N, a mask, and R and Y, which are complements too
COMPLEMENT = [3, 2, 1, 0, 4, 5, 7, 6]
TABLE = torch.tensor(COMPLEMENT)
BOUNDS = torch.tensor([0, 5, 5, 17, 33], dtype=torch.int32)
KINDS: list[dict[str, Any]] = [
    {},
    {"bidirectional": "tied"},
    {"bidirectional": "untied", "d_mlp": 24},
    {"bidirectional": "tied", "mamba": {"a_init": "s4d-lin"}},
    {"bidirectional": "tied", "pattern": "mamba + attention + lstm", "attention": {"d_head": 8}},
]


def build(tie_embeddings: bool = True, **values: Any) -> GenomeModel:
    backbone = {"d_model": 24, "n_layers": 3, "reverse_complement": True, **values}
    model = GenomeModel(backbone, len(COMPLEMENT), COMPLEMENT, tie_embeddings=tie_embeddings).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name == "embedding.weight":
                # nothing is equal by being at its initial value, nor small
                p.normal_()
    return model


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_logits_of_the_reverse_complement_are_the_reverse_complement_of_the_logits(
    kind: dict[str, Any], tie_embeddings: bool
) -> None:
    model, tokens = build(tie_embeddings, **kind), torch.randint(len(COMPLEMENT), (3, 33))
    logits, _ = model(tokens)
    other, _ = model(TABLE[tokens.flip(1)])
    torch.testing.assert_close(other, logits.flip(1)[..., TABLE], rtol=0, atol=1e-12)
    assert logits.std() > 0.1
    # and not because both say the same everywhere
    assert not torch.allclose(other, logits, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_packed_sequences_are_equivariant_each(kind: dict[str, Any]) -> None:
    model, tokens = build(**kind), torch.randint(len(COMPLEMENT), (1, 33))
    logits, _ = model(tokens, cu_seqlens=BOUNDS)
    parts = [tokens[:, a:b] for a, b in pairwise(BOUNDS.tolist())]
    other, _ = model(torch.cat([TABLE[part.flip(1)] for part in parts], 1), cu_seqlens=BOUNDS)
    for (a, b), part in zip(pairwise(BOUNDS.tolist()), parts, strict=True):
        torch.testing.assert_close(other[:, a:b], logits[:, a:b].flip(1)[..., TABLE], rtol=0, atol=1e-12)
        if b > a:
            torch.testing.assert_close(logits[:, a:b], model(part)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_plain_model_is_not_equivariant() -> None:
    tokens = torch.randint(len(COMPLEMENT), (3, 33))
    model = build(reverse_complement=False, bidirectional="tied")
    assert not torch.allclose(
        model(TABLE[tokens.flip(1)])[0], model(tokens)[0].flip(1)[..., TABLE], atol=1e-2
    )


@torch.no_grad()
def test_the_backbone_is_equivariant_to_swapped_halves() -> None:
    config = BackboneConfig(d_model=24, n_layers=2, bidirectional="tied", reverse_complement=True)
    model, x = Backbone(config).double(), torch.randn(2, 33, 48, dtype=torch.float64)

    def turned(x: Tensor) -> Tensor:
        return x.flip(1).roll(24, dims=2)

    torch.testing.assert_close(model(turned(x))[0], turned(model(x)[0]), rtol=0, atol=1e-12)


def as_written(model: GenomeModel, tokens: Tensor) -> Tensor:
    """The logits as the paper puts it: each module once on one half of the channels, once on the turned other."""

    def turn(x: Tensor) -> Tensor:
        return x.flip(1, 2)

    weight = model.embedding.weight
    x = torch.cat([weight[tokens], turn(weight[TABLE[tokens.flip(1)]])], dim=-1)
    stream = torch.zeros_like(x)
    d = weight.shape[1]

    def on_halves(module: Any, x: Tensor) -> Tensor:
        return torch.cat([module(x[..., :d])[0], turn(module(turn(x[..., d:]))[0])], dim=-1)

    for layer in model.backbone.layers:
        stream = stream + x
        x = on_halves(layer.mixer, on_halves(layer.norm, stream))
    y = on_halves(model.backbone.norm_f, stream + x)
    w = model.head.weight[: len(COMPLEMENT)]
    return y[..., :d] @ w.T + y[..., d:].flip(2) @ w[TABLE].T


@torch.no_grad()
def test_is_what_the_paper_does_on_halves_of_the_channels() -> None:
    model, tokens = build(bidirectional="tied"), torch.randint(len(COMPLEMENT), (2, 20))
    torch.testing.assert_close(model(tokens)[0], as_written(model, tokens), rtol=0, atol=1e-12)


def test_reading_both_strands_takes_no_parameters() -> None:
    shared, plain = build(bidirectional="tied"), build(bidirectional="tied", reverse_complement=False)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (shared, plain)]
    assert shapes[0] == shapes[1]
    assert set(shared.state_dict()) == set(plain.state_dict())


@torch.no_grad()
def test_averaging_over_strands_makes_any_model_equivariant() -> None:
    model, tokens = build(reverse_complement=False), torch.randint(len(COMPLEMENT), (2, 33))
    logits = model.average_strands(tokens)
    torch.testing.assert_close(
        model.average_strands(TABLE[tokens.flip(1)]), logits.flip(1)[..., TABLE], rtol=0, atol=1e-12
    )
    there, back = model(tokens)[0], model(TABLE[tokens.flip(1)])[0]
    torch.testing.assert_close(logits[:, 4, 0], (there[:, 4, 0] + back[:, 28, 3]) / 2)
    packed = model.average_strands(tokens[:1], cu_seqlens=BOUNDS)
    torch.testing.assert_close(packed[:, 5:17], model.average_strands(tokens[:1, 5:17]), rtol=0, atol=1e-12)


def test_reversal_keeps_sequences_where_they_are() -> None:
    x = torch.arange(10)[None]
    assert reverse(x)[0].tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    bounds = torch.tensor([0, 3, 3, 4, 10], dtype=torch.int32)
    assert reverse(x, cu_seqlens=bounds)[0].tolist() == [2, 1, 0, 3, 9, 8, 7, 6, 5, 4]
    padded = reverse(x.expand(2, -1), lengths=torch.tensor([4, 10]))
    assert padded.tolist() == [[3, 2, 1, 0, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]]
    y = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reverse(y[:1], cu_seqlens=bounds)[0, 4], y[0, 9])
    for place in ({"cu_seqlens": bounds}, {"lengths": torch.tensor([4, 0])}, {}):
        # taken twice it leads back, and so do gradients
        x = y[:1] if "cu_seqlens" in place else y
        assert torch.equal(reverse(reverse(x, **place), **place), x)
        assert torch.autograd.gradcheck(lambda z, place=place: reverse(z, **place), x)
    tokens = torch.tensor([[0, 0, 1, 6, 4]])
    assert reverse_complement(tokens, TABLE).tolist() == [[4, 7, 2, 3, 3]]


@pytest.mark.parametrize("wrong", [[0, 1], [1, 2, 0, 3, 4, 5, 6, 7], [3, 2, 1, 0, 4, 5, 6, 8]])
def test_a_complement_must_lead_back(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match=r"model.complement: must list the complement of each of 8 tokens"):
        complement_table(wrong, 8)


def test_both_strands_need_a_complement() -> None:
    with pytest.raises(ValueError, match=r"model.complement: give"):
        GenomeModel({"d_model": 16, "n_layers": 1, "reverse_complement": True}, 8)
    with pytest.raises(ValueError, match="give the model one"):
        GenomeModel({"d_model": 16, "n_layers": 1}, 8).average_strands(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="has no state"):
        build().init_state(1)
