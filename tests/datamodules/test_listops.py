"""ListOps: values by another reading of the rows, the distribution of trees, splits that share nothing, learning."""

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from mambazoo.datamodules.listops import CLOSE, MAX, PADDING, SYMBOLS, ListOpsDataModule, Trees
from mambazoo.zoo.classification import SequenceClassifier

SMALL: dict[str, Any] = {"length": 60, "shortest": 8, "rows": 300, "held_out_rows": 60, "batch_size": 16}
Row = tuple[list[str], int]
# an operation with its arguments, or a digit
Tree = tuple[str, list[Any]] | int


def build(**values: Any) -> ListOpsDataModule:
    data = ListOpsDataModule(**{**SMALL, **values})
    data.prepare_data()
    data.setup("fit")
    return data


def rows(data: ListOpsDataModule, split: str) -> list[Row]:
    """The symbols of every row of a split, and its label."""
    read = (data.samples[split].read(i, 0) for i in range(len(data.samples[split])))
    return [([SYMBOLS[token] for token in row["tokens"]], row["label"]) for row in read]


def parse(symbols: Iterator[str]) -> Tree | None:
    """The tree that symbols begin with, or None at the end of a list."""
    symbol = next(symbols)
    if symbol == "]":
        return None
    if not symbol.startswith("["):
        return int(symbol)
    arguments = []
    while (argument := parse(symbols)) is not None:
        arguments.append(argument)
    return symbol, arguments


def value(tree: Tree) -> int:
    if isinstance(tree, int):
        return tree
    operation, arguments = tree[0], [value(argument) for argument in tree[1]]
    rules: dict[str, Any] = {
        "[MAX": max, "[MIN": min, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10,
    }  # fmt: skip
    return rules[operation](arguments)


def depth(tree: Tree) -> int:
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree[1]))


def operations(tree: Tree) -> Iterator[tuple[str, list[Any]]]:
    if not isinstance(tree, int):
        yield tree
        for argument in tree[1]:
            yield from operations(argument)


def test_the_example_has_the_value_that_is_worked_out_by_hand() -> None:
    # the sum is 19 and so 9, the minimum 4, the maximum of 2, 7, 4, 0 and 9 is 9
    for row, expected in (
        ("[MAX 2 7 [MIN 4 7 ] 0 [SM 6 8 5 ] ]", 9),
        ("[MED 3 8 5 4 ]", 4),
        ("[MED 9 0 [SM 5 6 ] ]", 1),
    ):
        assert value(parse(iter(row.split()))) == expected


def test_labels_are_the_values_of_whole_rows() -> None:
    for row, label in rows(build(), "train"):
        symbols = iter(row)
        assert value(parse(symbols)) == label
        assert list(symbols) == []


def test_long_rows_are_the_arenas() -> None:
    data = ListOpsDataModule()
    assert (data.length, data.counts) == (2000, {"train": 96_000, "val": 2000, "test": 2000})
    drawn = data.trees.draw(np.random.default_rng(0), 1500)
    assert len(drawn.labels) > 300
    assert 500 < drawn.lengths.min() < 560
    assert 1900 < drawn.lengths.max() < 2000
    assert 950 < drawn.lengths.mean() < 1130
    assert sum(drawn.lengths) == len(drawn.tokens)
    # extremes are the commonest values
    shares = np.bincount(drawn.labels, minlength=10) / len(drawn.labels)
    assert 0.1 < min(shares[0], shares[9]) < 0.25
    assert max(shares[1:9]) < min(shares[0], shares[9])
    for tokens, label in zip(np.split(drawn.tokens, drawn.lengths.cumsum())[:40], drawn.labels, strict=False):
        tree = parse(SYMBOLS[token] for token in tokens)
        assert value(tree) == label
        assert 4 < depth(tree) <= 10


def test_trees_are_distributed_as_they_should_be() -> None:
    # so deep and long that nothing is cut off
    trees = Trees(depth=3, arguments=4, shortest=3, longest=1000)
    drawn = trees.draw(np.random.default_rng(0), 4000)
    parsed = [
        parse(SYMBOLS[token] for token in tokens)
        for tokens in np.split(drawn.tokens, drawn.lengths.cumsum()[:-1])
    ]
    second = [argument for _, arguments in parsed for argument in arguments]
    assert sum(not isinstance(tree, int) for tree in second) / len(second) == pytest.approx(0.25, abs=0.02)
    assert {depth(tree) for tree in parsed} == {2, 3}
    for counts, kinds in (
        (Counter(operation for tree in parsed for operation, _ in operations(tree)), 4),
        (Counter(len(arguments) for tree in parsed for _, arguments in operations(tree)), 3),
        (Counter(SYMBOLS[token] for token in drawn.tokens if token < MAX), 10),
    ):
        assert len(counts) == kinds
        assert max(counts.values()) < 1.15 * min(counts.values())


def test_no_row_comes_twice_and_the_seed_decides_all() -> None:
    data = build()
    found = {split: [tuple(row) for row, _ in rows(data, split)] for split in ("train", "val", "test")}
    assert [len(found[split]) for split in found] == [300, 60, 60]
    assert len({row for split in found.values() for row in split}) == 420
    assert all(8 < len(row) < 60 for row in found["train"])
    # the order is another matter
    again = build(seed=5)
    assert rows(again, "train") == rows(data, "train")
    first = [next(iter(each.train_dataloader()))["labels"].tolist() for each in (data, again)]
    assert first[0] != first[1]
    assert rows(build(draw_seed=1), "train") != rows(data, "train")


def test_batches_are_padded() -> None:
    data = build()
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["inputs"].dtype == batch["labels"].dtype == torch.int64
    assert batch["inputs"].max() == PADDING < data.vocab_size == 16
    # few shapes
    assert batch["inputs"].shape[1] % 128 == 0
    for row, length in zip(batch["inputs"], batch["lengths"], strict=True):
        assert (row[length:] == PADDING).all()
        assert row[length - 1] == CLOSE


def test_baselines_are_told() -> None:
    found = dict(build().baselines())
    majority, outermost = found.values()
    assert 0.1 < majority < outermost < 0.7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arguments": 1}, "data.arguments: must be 2 or more"),
        ({"depth": 1}, "data.depth: must be 2 or more"),
        ({"shortest": 59}, r"data.shortest: must be from 3 to data.length - 2, 58, not 59"),
        ({"shortest": 2}, "data.shortest"),
        ({"rows": 0}, "data.rows, data.held_out_rows: must be 1 or more, not 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ListOpsDataModule(**{**SMALL, **values})


def test_more_rows_than_there_are_are_refused() -> None:
    # two digits: 400 rows
    with pytest.raises(
        ValueError, match=r"data\.rows: 400 different rows of this kind were found; ask for fewer"
    ):
        build(depth=2, arguments=2, length=8, shortest=3, rows=1000)


@pytest.mark.filterwarnings("ignore")
def test_operations_on_digits_are_learnt() -> None:
    data = build(depth=2, arguments=3, length=12, shortest=3, rows=3000, held_out_rows=256, batch_size=64)
    model = SequenceClassifier(
        {"d_model": 32, "n_layers": 1, "bidirectional": "tied", "mamba": {"d_state": 8}},
        data.vocab_size,
        data.num_classes,
        optimizer={"lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 10, "min_lr": 1e-3},
    )
    run = L.Trainer(
        accelerator="cpu", max_steps=120, gradient_clip_val=1.0, limit_val_batches=0, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(model, data)
    [found] = run.test(model, data, verbose=False)
    assert found["test/accuracy"] > 0.6 > 2 * found["test/majority"]
