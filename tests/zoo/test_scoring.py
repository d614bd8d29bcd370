"""Log-likelihoods of sequences that begin alike, against those of each as a whole."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.scoring import Packed, log_likelihoods, log_probabilities_at
from torch import Tensor

# A, C, G, T, N, a start and a mask
COMPLEMENT, START, MASK = [3, 2, 1, 0, 4, 5, 6], 5, 6


def build(**backbone: Any) -> GenomeModel:
    model = GenomeModel({"d_model": 16, "n_layers": 2, **backbone}, 7, COMPLEMENT).eval()
    with torch.no_grad():
        # far from an even guess
        model.embedding.weight.mul_(30)
    return model


def packed(sequences: list[Tensor]) -> Packed:
    tokens = torch.cat(sequences).to(torch.uint8)
    return Packed(tokens, torch.tensor([len(sequence) for sequence in sequences]))


def some(*lengths: int) -> list[Tensor]:
    return [torch.randint(5, (length,)) for length in lengths]


@torch.no_grad()
def plain(model: GenomeModel, sequence: Tensor) -> float:
    """The log-likelihood of a sequence by itself; token 4 is not predicted."""
    seen = torch.cat([torch.tensor([START]), sequence])[:-1]
    log_p = F.log_softmax(model(seen[None])[0][0].double(), -1)
    chosen = log_p.gather(1, sequence[:, None])[:, 0]
    return float(chosen[sequence < 4].sum())


@pytest.mark.parametrize("backbone", [{}, {"d_mlp": 8, "mamba": {"a_init": "s4d-lin"}}], ids=str)
@pytest.mark.parametrize(
    ("prefixes", "suffixes", "prefix"),
    [
        ((20, 7, 33), (11, 11, 9, 1, 40), (0, 0, 2, 1, 2)),
        ((0, 12, 0), (3, 4, 0, 5), (2, 0, 1, 1)),
        ((0,), (1, 6), (0, 0)),
    ],
)
def test_parted_sequences_are_as_likely_as_whole_ones(
    backbone: dict[str, Any], prefixes: tuple[int, ...], suffixes: tuple[int, ...], prefix: tuple[int, ...]
) -> None:
    model, before, behind = build(**backbone), some(*prefixes), some(*suffixes)
    numbers = torch.tensor(prefix)
    found = log_likelihoods(model, packed(before), packed(behind), numbers, start=START, scored=4)
    expected = [plain(model, torch.cat([before[i], rest])) for i, rest in zip(prefix, behind, strict=True)]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-3)
    assert min(expected) < -1


def test_what_sequences_share_is_read_once() -> None:
    model, read = build(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    numbers = torch.tensor([0, 0, 0, 1])
    log_likelihoods(model, packed(some(100, 50)), packed(some(5, 6, 7, 8)), numbers, start=START, scored=4)
    assert read == [150, 26]


@pytest.mark.parametrize("backbone", [{"bidirectional": "tied"}, {"reverse_complement": True}], ids=str)
@torch.no_grad()
def test_hidden_tokens_are_as_probable_as_in_sequences_by_themselves(backbone: dict[str, Any]) -> None:
    model, sequences = build(**backbone), some(30, 1, 17)
    places = [4, 0, 16]
    for sequence, place in zip(sequences, places, strict=True):
        sequence[place] = MASK
    expected = [F.log_softmax(model(s[None])[0][0, p], -1) for s, p in zip(sequences, places, strict=True)]
    found = log_probabilities_at(model, packed(sequences), torch.tensor([4, 30, 47]))
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_half_precision_moves_a_score_little() -> None:
    model, window = build(), torch.randint(4, (200,))
    alleles = [torch.cat([torch.tensor([base]), window[100:]]) for base in range(4)]

    def scores() -> Tensor:
        prefix = torch.zeros(4, dtype=torch.long)
        found = log_likelihoods(model, packed([window[:99]]), packed(alleles), prefix, start=START, scored=4)
        return found[1:] - found[0]

    full = scores()
    with torch.autocast("cpu", torch.bfloat16):
        half = scores()
    assert (full - half).abs().max() < 0.05 * full.abs().max()
    assert (full != half).all()
