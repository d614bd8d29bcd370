"""Tasks that are drawn: each row is what its drawing says, and the stream is one whoever draws it."""

from typing import Any

import numpy as np
import pytest
import torch
from mambazoo.datamodules.associative_recall import AssociativeRecallDataModule
from mambazoo.datamodules.induction_heads import InductionHeadsDataModule
from mambazoo.datamodules.selective_copying import SelectiveCopyingDataModule
from mambazoo.datamodules.synthetic import IGNORE, SyntheticDataModule

COPYING = {"length": 20, "tokens": 5, "vocab_size": 6}
TASKS: list[tuple[type[SyntheticDataModule], dict[str, Any]]] = [
    (SelectiveCopyingDataModule, COPYING),
    (SelectiveCopyingDataModule, {**COPYING, "selective": False}),
    (InductionHeadsDataModule, {"length": 20, "vocab_size": 6}),
    (AssociativeRecallDataModule, {"length": 20, "pairs": 3, "vocab_size": 12}),
]
Rows = list[tuple[list[int], list[int]]]


def build(task: type[SyntheticDataModule], values: dict[str, Any], **more: Any) -> SyntheticDataModule:
    data = task(**{"batch_size": 4, "held_out_rows": 8, **values, **more})
    data.setup("fit")
    return data


def first(data: SyntheticDataModule, count: int) -> list[torch.Tensor]:
    batches = iter(data.train_dataloader())
    return [torch.stack(list(next(batches).values())) for _ in range(count)]


def rows(task: type[SyntheticDataModule], values: dict[str, Any], count: int = 400) -> Rows:
    """Rows of inputs and targets as lists."""
    stacked = torch.cat(first(build(task, values), count // 4), dim=1)
    return list(zip(*stacked.tolist(), strict=True))


def asked(targets: list[int]) -> dict[int, int]:
    return {i: token for i, token in enumerate(targets) if token != IGNORE}


def test_selective_copying_asks_for_the_tokens_in_their_order() -> None:
    places = set()
    for inputs, targets in rows(SelectiveCopyingDataModule, COPYING):
        noise, questions = inputs[:20], inputs[20:]
        said = [token for token in noise if token != 0]
        assert questions == [5] * 5
        assert set(said) <= {1, 2, 3, 4}
        assert asked(targets) == dict(enumerate(said, start=20))
        places |= {i for i, token in enumerate(noise) if token}
    assert places == set(range(20))


def test_plain_copying_asks_at_one_distance() -> None:
    for inputs, targets in rows(SelectiveCopyingDataModule, {**COPYING, "selective": False}, 40):
        assert 0 not in inputs[:5]
        assert inputs[5:] == [0] * 15 + [5] * 5
        assert asked(targets) == dict(enumerate(inputs[:5], start=20))


def test_induction_heads_ask_what_came_after_the_trigger() -> None:
    places = set()
    for inputs, targets in rows(InductionHeadsDataModule, {"length": 20, "vocab_size": 6}):
        place, end = (i for i, token in enumerate(inputs) if token == 5)
        assert end == 19
        assert asked(targets) == {19: inputs[place + 1]}
        places.add(place)
    # never so near that the trigger itself would come after it
    assert places == set(range(18))


def test_recall_asks_each_key_for_its_value() -> None:
    places: list[int] = []
    for inputs, targets in rows(AssociativeRecallDataModule, {"length": 40, "pairs": 3, "vocab_size": 12}):
        keys, values = inputs[:6:2], inputs[1:6:2]
        assert len(set(keys)) == len(set(values)) == 3
        assert max(keys) < 6 <= min(values)
        told, questions = dict(zip(keys, values, strict=True)), asked(targets)
        assert {inputs[i]: value for i, value in questions.items()} == told
        places += questions
    assert min(places) == 6
    assert all(place % 2 == 0 for place in places)
    # a power law: the first places are asked most often
    counts = np.bincount(np.array(places) // 2, minlength=20)[3:]
    assert counts[0] > counts[1] > counts[4] > counts[16] > 0


@pytest.mark.parametrize(("task", "values"), TASKS)
def test_the_stream_is_one_for_any_workers_and_goes_on_where_it_stopped(
    task: type[SyntheticDataModule], values: dict[str, Any]
) -> None:
    expected = first(build(task, values), 6)
    data = build(task, values, num_workers=2)
    data.position = 8
    for a, b in zip(expected[2:], first(data, 4), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first(build(task, values, seed=1), 1)[0], expected[0])


def test_ranks_share_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    task, values = TASKS[0]
    expected = first(build(task, values), 6)
    for rank in range(2):
        data = build(task, values)
        monkeypatch.setattr(data, "_world", lambda rank=rank: (2, rank))
        for a, b in zip(expected[rank::2], first(data, 3), strict=True):
            assert torch.equal(a, b)


def test_no_row_comes_twice() -> None:
    seen = [
        tuple(row)
        for data in (build(InductionHeadsDataModule, {"length": 40, "test_lengths": [40]}),)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        for _, batch in zip(range(50), loader, strict=False)
        for row in batch["inputs"].tolist()
    ]
    assert len(set(seen)) == len(seen) == 50 * 4 + 8 + 8


def test_held_out_batches_are_of_one_length_each() -> None:
    lengths = {"valid_lengths": [30, 12], "test_lengths": [5, 9, 64]}
    data = build(InductionHeadsDataModule, {**lengths, "held_out_rows": 6})
    for loader, expected in ((data.val_dataloader(), [30, 12]), (data.test_dataloader(), [5, 9, 64])):
        shapes = [tuple(batch["inputs"].shape) for batch in loader]
        assert shapes == [(rows, length) for length in expected for rows in (4, 2)]
        assert len(loader) == len(shapes)
    again = build(InductionHeadsDataModule, {**lengths, "held_out_rows": 6})
    for a, b in zip(data.val_dataloader(), again.val_dataloader(), strict=True):
        assert torch.equal(a["inputs"], b["inputs"])


def test_the_papers_tasks_are_the_defaults() -> None:
    copying, heads = SelectiveCopyingDataModule(), InductionHeadsDataModule()
    assert (copying.length, copying.vocab_size, copying.batch_size) == (4096, 16, 64)
    assert (heads.length, heads.vocab_size, heads.batch_size) == (256, 16, 8)
    assert heads.lengths["test"] == [2**k for k in range(6, 21)]
    assert dict(heads.baselines()) == {"an even guess, accuracy": 1 / 15}


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (SelectiveCopyingDataModule, {"tokens": 30, "length": 20}, "data.tokens: must be from 1"),
        (SelectiveCopyingDataModule, {"vocab_size": 3}, "data.vocab_size: .* 4 or more"),
        (SelectiveCopyingDataModule, {"held_out_rows": 0}, "data.held_out_rows"),
        (InductionHeadsDataModule, {"test_lengths": [2, 64]}, "data.length: .* not 2"),
        (InductionHeadsDataModule, {"vocab_size": 2}, "data.vocab_size"),
        (AssociativeRecallDataModule, {"length": 12, "pairs": 4}, "data.pairs: .* a quarter of data.length"),
        (AssociativeRecallDataModule, {"vocab_size": 60}, "data.vocab_size: must be above 64"),
        (AssociativeRecallDataModule, {"power": 0.0}, "data.power"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    task: type[SyntheticDataModule], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        task(**values)
