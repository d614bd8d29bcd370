"""The endless order: every sample once a pass, the same from any start, on any number of ranks."""

from itertools import pairwise

import pytest
import torch
from mambazoo.datamodules.base import DataModule
from mambazoo.datamodules.order import EndlessBatches, GrowingBatches, OrderedBatches, SimilarBatches, permute


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000])
def test_a_pass_is_a_permutation(n: int) -> None:
    assert sorted(permute(i, n, 5, 0) for i in range(n)) == list(range(n))


def test_passes_and_seeds_differ() -> None:
    orders = {
        tuple(permute(i, 50, seed, pass_) for i in range(50)) for seed in range(5) for pass_ in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_mixed() -> None:
    # neighbours end up far apart, and every place is reached from everywhere
    n = 1 << 12
    order = [permute(i, n, 1) for i in range(n)]
    gaps = sorted(abs(a - b) for a, b in pairwise(order))
    assert gaps[n // 2] > n / 5
    assert abs(sum(order[: n // 2]) / (n // 2) - n / 2) < n / 20


def take(batches: EndlessBatches | SimilarBatches, count: int) -> list[list[int]]:
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_ranks_share_one_order() -> None:
    alone = take(EndlessBatches(0, 6, 0, 1), 4)
    ranks = [take(EndlessBatches(0, 2, rank, 3), 4) for rank in range(3)]
    assert [[g for rank in ranks for g in rank[i]] for i in range(4)] == alone


def test_any_number_of_ranks_goes_on_where_others_stopped() -> None:
    assert take(EndlessBatches(12, 3, 0, 1), 2) == [[12, 13, 14], [15, 16, 17]]
    assert take(EndlessBatches(12, 3, 1, 2), 2) == [[15, 16, 17], [21, 22, 23]]


def test_held_out_samples_are_read_once() -> None:
    batches = [list(OrderedBatches(10, 2, rank, 3)) for rank in range(3)]
    assert sorted(i for rank in batches for batch in rank for i in batch) == list(range(10))
    assert [len(OrderedBatches(10, 2, rank, 3)) for rank in range(3)] == [len(rank) for rank in batches]


def grow(position: int, batch_size: int, rank: int, world: int, count: int) -> list[list[tuple[int, int]]]:
    iterator = iter(GrowingBatches(EndlessBatches(position, batch_size, rank, world), 100, [400, 1000]))
    return [next(iterator) for _ in range(count)]


def test_windows_grow_and_batches_shrink() -> None:
    batches = grow(0, 2, 0, 1, 7)
    # 200 tokens a batch: 8 quarters twice, 4 halves three times, then whole windows
    assert [{halved for halved, _ in batch} for batch in batches] == [{2}] * 2 + [{1}] * 3 + [{0}] * 2
    assert [len(batch) for batch in batches] == [8, 8, 4, 4, 4, 2, 2]
    # in each order windows are numbered as if it had been read from the start
    assert [number for batch in batches[:2] for _, number in batch] == list(range(16))
    assert [number for batch in batches[2:5] for _, number in batch] == list(range(8, 20))
    assert [number for batch in batches[5:] for _, number in batch] == [10, 11, 12, 13]


def test_growing_batches_go_on_from_any_position_on_any_ranks() -> None:
    whole = grow(0, 4, 0, 1, 5)
    assert grow(8, 4, 0, 1, 3) == whole[2:]
    ranks = [grow(8, 2, rank, 2, 3) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole[2:]]


def alike(position: int, batch_size: int, rank: int, world: int, count: int) -> list[list[int]]:
    batches = EndlessBatches(position, batch_size, rank, world)
    return take(SimilarBatches(batches, lambda number: permute(number % 500, 500, 7), seed=1), count)


def test_batches_of_one_length_have_every_sample_once() -> None:
    pool = SimilarBatches.POOL
    for first in range(0, 3 * pool, pool):
        batches = alike(4 * first, 4, 0, 1, pool)
        assert sorted(number for batch in batches for number in batch) == list(
            range(4 * first, 4 * first + 4 * pool)
        )
        lengths = [[permute(number % 500, 500, 7) for number in batch] for batch in batches]
        spread = sum(max(row) - min(row) for row in lengths) / pool
        assert spread < 500 / 10
        # but not one after the other
        assert [row[0] for row in lengths] != sorted(row[0] for row in lengths)


def test_batches_of_one_length_go_on_from_any_position_on_any_ranks() -> None:
    whole = alike(0, 4, 0, 1, 80)
    assert alike(4 * 45, 4, 0, 1, 35) == whole[45:]
    ranks = [alike(4 * 45, 2, rank, 2, 35) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole[45:]]


class Few:
    """Seven samples."""

    def __len__(self) -> int:
        return 7

    def read(self, index: int, pass_: int) -> dict[str, torch.Tensor]:
        return {"inputs": torch.full((3,), index), "targets": torch.full((3,), index)}


def test_ranks_read_as_many_held_out_batches_and_each_sample_counts_once() -> None:
    counted = []
    for rank in range(3):
        module = DataModule(batch_size=2)
        module.samples = {"val": Few()}
        module._world = lambda rank=rank: (3, rank)  # type: ignore[method-assign]
        batches = list(module.val_dataloader())
        assert len(batches) == 2
        counted += [int(row[0]) for batch in batches for row in batch["targets"] if (row != -100).any()]
    assert sorted(counted) == list(range(7))
