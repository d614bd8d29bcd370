"""Packed sequences as padded rectangles."""

import copy

import pytest
import torch
from mambazoo.zoo.grouping import Groups, grouped


@pytest.mark.parametrize("lengths", [[5, 3, 0, 1, 9, 4, 4], [7], [0, 1, 1, 0], [0], [64, 1, 63, 33]])
def test_rectangles_hold_every_sequence_and_join_again(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    l = int(bounds[-1])
    groups = Groups(bounds, l)
    x = torch.arange(1.0, l + 1)[:, None].expand(2, l, 3)
    parts = groups.split(x)
    found = []
    for part, own in zip(parts, groups.lengths, strict=True):
        assert part.shape == (2, len(own), own.max(), 3)
        # at least half of each row is full
        assert (own * 2 > part.shape[2]).all()
        for row, length in zip(part[0, :, :, 0], own, strict=True):
            assert not row[length:].any()
            found.append(row[:length].tolist())
    expected = [part.tolist() for part in x[0, :, 0].split(lengths) if len(part)]
    assert sorted(found) == expected
    if parts:
        torch.testing.assert_close(groups.join(parts), x)


def test_gradients_are_those_of_the_sequences() -> None:
    groups = Groups(torch.tensor([0, 2, 7, 8], dtype=torch.int32), 8)

    def compute(x: torch.Tensor) -> torch.Tensor:
        # padding must take and give nothing
        return groups.join([part.cumsum(-2) ** 2 + 1 for part in groups.split(x)])

    x = torch.randn(2, 8, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute, x)
    assert torch.autograd.gradgradcheck(compute, x)


def test_what_is_too_long_is_alone() -> None:
    groups = Groups(torch.tensor([0, 6, 13, 15, 18]), 18, longest=5)
    assert [own.tolist() for own in groups.lengths] == [[2, 3], [6], [7]]
    x = torch.randn(2, 18, 3)
    torch.testing.assert_close(groups.join(groups.split(x)), x)


def test_rectangles_are_made_once() -> None:
    bounds, x = torch.tensor([0, 2, 5]), torch.zeros(5, 1)
    bounds[1], bounds[1] = 2, 2
    first = grouped(bounds, x)
    assert grouped(bounds, x) is first
    # a copy counts its own changes
    copied = copy.deepcopy(bounds)
    copied[1] = 3
    assert grouped(copied, x).lengths[0].tolist() == [3, 2]
    bounds[1] = 4
    assert grouped(bounds, x) is not first
