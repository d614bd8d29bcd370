"""Vectors of sequences: packed or alone, at once or in parts, from one side or both."""

from typing import Any

import pytest
import torch
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.vectors import POOLINGS, VectorReader
from torch import Tensor

COMPLEMENT, START = [3, 2, 1, 0, 4, 5], 5
KINDS: list[dict[str, Any]] = [
    {}, {"bidirectional": "tied"}, {"reverse_complement": True},
    {"reverse_complement": True, "bidirectional": "untied"},
]  # fmt: skip


def build(**backbone: Any) -> GenomeModel:
    model = GenomeModel({"d_model": 16, "n_layers": 2, **backbone}, 6, COMPLEMENT).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


def reader(model: GenomeModel, pooling: str, start: int | None = None) -> VectorReader:
    return VectorReader(model.embedding, model.backbone, pooling, start)


@torch.no_grad()
def plain(model: GenomeModel, sequence: Tensor, pooling: str, start: int | None) -> Tensor:
    """What the backbone makes of a sequence by itself, (1 or l, d)."""
    given = torch.tensor([] if start is None else [start], dtype=torch.long)
    y = model.backbone(model.embedding(torch.cat([given, sequence])[None]))[0][0, len(given) :]
    halves = y.split(16, dim=1)
    if pooling == "none":
        return torch.stack(halves).mean(0)
    if pooling == "mean":
        return torch.stack([half.mean(0) for half in halves]).mean(0)[None]
    return torch.stack([halves[0][-1], *(half[0] for half in halves[1:])]).mean(0)[None]


@pytest.mark.parametrize("backbone", KINDS, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_sequences_have_the_vectors_they_have_alone(backbone: dict[str, Any], pooling: str) -> None:
    model, sequences = build(**backbone), [torch.randint(4, (length,)) for length in (20, 1, 7, 33)]
    for start in (None, START):
        found = reader(model, pooling, start).whole(sequences)
        expected = torch.cat([plain(model, sequence, pooling, start) for sequence in sequences])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_sequence_in_parts_has_the_vectors_of_the_whole(pooling: str) -> None:
    model, sequence = build(), torch.randint(4, (100,))
    for start in (None, START):
        whole = reader(model, pooling, start).whole([sequence])
        for sizes in ([100], [1, 99], [30, 30, 30, 10]):
            parts = list(reader(model, pooling, start).onward(sequence.split(sizes)))
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
            assert [len(part) for part in parts] == (sizes if pooling == "none" else [1])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_both_strands_have_one_vector(pooling: str) -> None:
    sequence = torch.randint(4, (40,))
    other = torch.tensor(COMPLEMENT)[sequence.flip(0)]
    vectors = reader(build(reverse_complement=True), pooling).whole([sequence, other])
    torch.testing.assert_close(vectors[0], vectors[1], rtol=1e-4, atol=1e-5)
    vectors = reader(build(), pooling).whole([sequence, other])
    assert (vectors[0] - vectors[1]).abs().max() > 0.01
