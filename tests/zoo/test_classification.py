"""Telling sequences apart: pooling, padding, strands, metrics by hand, learning, names that a pretrained model has."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from mambazoo.checkpoints.io import from_pretrained
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.heads import pool
from mambazoo.zoo.language import LanguageModel
from torch import Tensor
from torch.utils.data import DataLoader

# A, C, G, T, N and a padding
COMPLEMENT = [3, 2, 1, 0, 4, 5]
TABLE = torch.tensor(COMPLEMENT)
KINDS: list[dict[str, Any]] = [
    {},
    {"bidirectional": "tied"},
    {"reverse_complement": True},
    {"bidirectional": "untied", "reverse_complement": True},
]


def build(num_classes: int = 2, backbone: dict[str, Any] | None = None, **values: Any) -> SequenceClassifier:
    return SequenceClassifier(
        {"d_model": 16, "n_layers": 1, **(backbone or {})}, 6, num_classes, COMPLEMENT, **values
    )


def motifs(b: int) -> dict[str, Tensor]:
    """Random bases, with AAGCA or its reverse complement somewhere in those of class 1."""
    tokens, labels = torch.randint(4, (b, 24)), torch.randint(2, (b,))
    motif = torch.tensor([0, 0, 2, 1, 0])
    for row, label in zip(tokens, labels, strict=True):
        if label:
            start = int(torch.randint(20, ()))
            row[start : start + 5] = motif if torch.rand(()) < 0.5 else TABLE[motif.flip(0)]
    return {"inputs": tokens, "labels": labels}


def logged(model: SequenceClassifier, *batches: dict[str, Tensor]) -> dict[str, float]:
    values: dict[str, Any] = {}
    model.log = lambda name, value, **_: values.update({name: value})  # type: ignore[assignment, misc]
    for batch in batches:
        model.measure(batch, "val")
    model.on_validation_epoch_end()
    return {
        name: float(value.compute() if hasattr(value, "compute") else value) for name, value in values.items()
    }


class Saying(SequenceClassifier):
    """A classifier that says what its inputs are: log-probabilities (b, num_classes)."""

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        return inputs.log()


def test_pooling_is_over_what_it_says() -> None:
    y, lengths = torch.randn(2, 6, 4), torch.tensor([3, 6])
    torch.testing.assert_close(pool(y, "last", lengths), torch.stack([y[0, 2], y[1, 5]]))
    torch.testing.assert_close(pool(y, "last"), y[:, 5])
    torch.testing.assert_close(pool(y, "masked", lengths), torch.stack([y[0, :3].mean(0), y[1].mean(0)]))
    torch.testing.assert_close(pool(y, "mean", lengths), y.mean(1))
    assert torch.equal(pool(y, "max", lengths), torch.stack([y[0, :3].amax(0), y[1].amax(0)]))
    assert torch.equal(pool(y, "max"), y.amax(1))
    torch.testing.assert_close(pool(y, "masked"), y.mean(1))
    both = torch.stack([(y[0, 2, :2] + y[0, 0, 2:]) / 2, (y[1, 5, :2] + y[1, 0, 2:]) / 2])
    torch.testing.assert_close(pool(y, "last", lengths, strands=True), both)


@pytest.mark.parametrize("pooling", ["last", "masked", "max"])
@pytest.mark.parametrize("backbone", KINDS, ids=str)
@torch.no_grad()
def test_padding_changes_nothing(backbone: dict[str, Any], pooling: str) -> None:
    model = build(3, backbone, pooling=pooling).double()
    tokens, lengths = torch.randint(4, (3, 12)), torch.tensor([5, 12, 1])
    logits = model(tokens, lengths)
    for row, length, expected in zip(tokens, lengths, logits, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(logits[0], logits[1])


@torch.no_grad()
def test_the_mean_counts_padding_as_the_sequence() -> None:
    model, tokens = build(pooling="mean"), torch.randint(4, (2, 12))
    assert torch.equal(model(tokens, torch.tensor([5, 12])), model(tokens))


@pytest.mark.parametrize("pooling", ["last", "mean", "masked", "max"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 12, 1])], ids=["whole", "padded"])
@torch.no_grad()
def test_both_strands_are_of_one_class(pooling: str, lengths: Tensor | None) -> None:
    tokens = torch.randint(4, (3, 12))
    other = TABLE[tokens.flip(1)]
    if lengths is not None:
        other = tokens.clone()
        for row, given, length in zip(other, tokens, lengths, strict=True):
            row[:length] = TABLE[given[:length].flip(0)]
    if pooling == "mean":
        lengths, other = None, TABLE[tokens.flip(1)]
    batches = [
        {"inputs": x} if lengths is None else {"inputs": x, "lengths": lengths} for x in (tokens, other)
    ]
    for backbone, average in (
        ({"reverse_complement": True}, False),
        ({"bidirectional": "tied"}, True),
        ({}, True),
    ):
        model = build(3, backbone, pooling=pooling, average_strands=average).double()
        a, b = (model.predict(batch) for batch in batches)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    plain = build(3, {"bidirectional": "tied"}, pooling=pooling).double()
    assert not torch.allclose(plain.predict(batches[0]), plain.predict(batches[1]), atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "masked", "max"])
@pytest.mark.parametrize(
    "backbone", [{}, {"bidirectional": "tied"}, {"pool": [2], "pattern": "s4d"}], ids=str
)
@pytest.mark.parametrize("codes", [True, False])
@torch.no_grad()
def test_samples_are_read_by_patches_and_padding_changes_nothing(
    codes: bool, backbone: dict[str, Any], pooling: str
) -> None:
    config = {"d_model": 16, "n_layers": 1, **backbone}
    model = SequenceClassifier(
        config, 256 if codes else None, 3, patch=4, features=1 if codes else 2, pooling=pooling
    )
    model = model.double().eval()
    inputs = torch.randint(256, (4, 23)) if codes else torch.randn(4, 23, 2, dtype=torch.float64)
    lengths = torch.tensor([5, 23, 1, 16])
    logits = model(inputs, lengths)
    for row, length, expected in zip(inputs, lengths, logits, strict=True):
        torch.testing.assert_close(model(row[None, :length])[0], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(logits[0], logits[1])
    # as many vectors as patches are in 23 inputs
    seen: list[torch.Size] = []
    model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    model(inputs)
    assert seen == [torch.Size([4, 6, 16])]


@pytest.mark.parametrize("lengths", [[12, 5, 3], [10, -1, 3], [10, 5]])
@pytest.mark.parametrize("pattern", ["mamba", "attention"])
def test_lengths_that_cannot_be_are_refused(pattern: str, lengths: list[int]) -> None:
    model = build(3, {"bidirectional": "tied", "pattern": pattern})
    with pytest.raises(ValueError, match=r"lengths must be \(3,\), each from 0 to 10, not"):
        model(torch.randint(4, (3, 10)), torch.tensor(lengths))


@pytest.mark.parametrize("heard", [{"patch": 4}, {"patch": 160, "filters": 12}], ids=str)
def test_tells_tones_apart(heard: dict[str, int]) -> None:
    def tones(seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        labels, phase = torch.randint(2, (32,), generator=draw), torch.rand(32, 1, generator=draw)
        t = torch.arange(640) * torch.tensor([0.3, 0.4])[labels][:, None]
        return {"inputs": torch.sin(t + 6.3 * phase).unsqueeze(-1), "labels": labels}

    config = {"d_model": 16, "n_layers": 1, "pattern": "s4d", "s4d": {"d_state": 8}, "bidirectional": "tied"}
    model = SequenceClassifier(config, None, 2, **heard)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(60):
        optimizer.zero_grad()
        model.training_loss(tones(seed)).backward()
        optimizer.step()
    model.eval()
    assert logged(model, *(tones(1000 + seed) for seed in range(8)))["val/accuracy"] > 0.95


def test_averaging_is_of_logits_and_not_for_training() -> None:
    model = build(average_strands=True)
    batch = motifs(4)
    tokens = batch["inputs"]
    torch.testing.assert_close(model.predict(batch), (model(tokens) + model(TABLE[tokens.flip(1)])) / 2)
    torch.testing.assert_close(model.training_loss(batch), F.cross_entropy(model(tokens), batch["labels"]))


def test_class_weights_weight_the_loss() -> None:
    model, batch = build(class_weights=[1.0, 5.0]), motifs(8)
    logits, labels = model(batch["inputs"]), batch["labels"]
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(model.training_loss(batch), expected)
    halves = [{name: x[part] for name, x in batch.items()} for part in (slice(3), slice(3, 8))]
    assert logged(model, *halves)["val/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_binary_metrics_by_hand() -> None:
    p = torch.tensor([0.1, 0.4, 0.6, 0.35, 0.9])
    batch = {"inputs": torch.stack([1 - p, p], 1), "labels": torch.tensor([0, 0, 0, 1, 1])}
    values = logged(Saying({"d_model": 16, "n_layers": 1}, 6, 2), batch)
    assert values.pop("val/loss") == pytest.approx(
        -sum(map(torch.log, torch.tensor([0.9, 0.6, 0.4, 0.35, 0.9]))).item() / 5, rel=1e-5
    )
    # 2 of 3 and 1 of 2 are found; of 6 pairs, 4 are in order
    assert values == {
        "val/accuracy": pytest.approx(3 / 5),
        "val/majority": pytest.approx(3 / 5),
        "val/f1": pytest.approx((2 / 3 + 1 / 2) / 2),
        "val/mcc": pytest.approx(1 / 6),
        "val/auroc": pytest.approx(4 / 6),
    }


def test_metrics_of_three_classes_by_hand() -> None:
    p = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6], [0.1, 0.5, 0.4]])
    labels = torch.tensor([0, 1, 2, 2])
    model = Saying({"d_model": 16, "n_layers": 1}, 6, 3)
    # in two batches, the second alone of one class
    batches = [{"inputs": p[:2], "labels": labels[:2]}, {"inputs": p[2:], "labels": labels[2:]}]
    values = logged(model, *batches)
    assert {name: value for name, value in values.items() if name != "val/loss"} == {
        "val/accuracy": pytest.approx(1 / 2),
        "val/majority": pytest.approx(1 / 2),
        "val/f1": pytest.approx((1 + 0 + 1 / 2) / 3),
        "val/mcc": pytest.approx((2 * 4 - 6) / (16 - 6)),
        "val/auroc": pytest.approx((1 + 2 / 3 + 2.5 / 4) / 3),
    }
    # where a class does not occur there is no curve, and nothing is kept from before
    values = logged(model, batches[1])
    assert "val/auroc" not in values
    assert values["val/majority"] == 1


@pytest.mark.filterwarnings("ignore")
def test_learns_a_motif_on_either_strand_and_survives_a_checkpoint(tmp_path: Path) -> None:
    model = SequenceClassifier(
        {"d_model": 16, "n_layers": 2, "reverse_complement": True}, 6, 2, COMPLEMENT,
        optimizer={"lr": 1e-2, "weight_decay": 0.0}, class_weights=[1.0, 1.0],
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=100, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=100,
    )  # fmt: skip
    held_out = motifs(512)
    trainer.fit(
        model,
        DataLoader([motifs(32) for _ in range(100)], batch_size=None),
        DataLoader([held_out], batch_size=None),
    )
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values["val/accuracy"] > 0.9
    assert values["val/auroc"] > 0.95
    assert values["val/mcc"] > 0.8
    assert 0.5 <= values["val/majority"] < 0.6

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    json.dumps(dict(model.hparams))
    again = from_pretrained(tmp_path / "a.ckpt")
    assert isinstance(again, SequenceClassifier)
    model.eval()
    with torch.no_grad():
        assert torch.equal(again.predict(held_out), model.predict(held_out))
    rows = again.predict_step(held_out, 0)
    assert len(rows) == 512
    for row, likeliest in zip(rows, model.predict(held_out).argmax(-1).tolist(), strict=True):
        assert row["class"] == str(likeliest)
        assert list(row["probabilities"]) == ["0", "1"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backbone", KINDS, ids=str)
def test_a_pretrained_backbone_fits_by_name(backbone: dict[str, Any]) -> None:
    classifier = build(3, backbone)
    size = {"d_model": 16, "n_layers": 1}
    pretrained: list[Any] = [GenomeModel({**size, **backbone}, 6, COMPLEMENT)]
    if not backbone:
        pretrained.append(LanguageModel(size, 6))
    for model in pretrained:
        shared = {
            name: p for name, p in model.state_dict().items() if name.startswith(("embedding.", "backbone."))
        }
        missing, unexpected = classifier.load_state_dict(shared, strict=False)
        assert unexpected == []
        assert missing == ["classifier.weight", "classifier.bias"]
        assert torch.equal(classifier.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 1}, "model.num_classes: must be from 2 to 4096"),
        (
            {"pooling": "maskd"},
            "model.pooling: must be one of last, mean, masked, max, not 'maskd', did you mean 'masked'",
        ),
        ({"class_weights": [1.0, 0.0]}, "model.class_weights: must be 2 numbers above 0"),
        ({"classes": ["a", "a"]}, "model.classes: must be 2 names, .* not 2, 1 of them different"),
        ({"class_weights": [1.0]}, "model.class_weights: must be 2 numbers"),
        ({"average_strands": True}, "model.complement: give"),
        ({"backbone": {"reverse_complement": True}}, "model.complement: give"),
        ({"patch": 0}, "model.patch, model.features: must be 1 or more"),
        ({"backbone": {"reverse_complement": True}, "patch": 4}, "leave out model.patch"),
        (
            {"filters": 8, "patch": 4},
            "model.filters: must be 1 or more, for sound as numbers.* not 8 beside 6 codes",
        ),
        (
            {"filters": 8, "vocab_size": None, "features": 2, "patch": 4},
            "model.filters: .* not 8 beside 2 features",
        ),
        ({"filters": 8, "vocab_size": None}, "model.patch: with model.filters .* a multiple of 4, .* not 1$"),
        (
            {"filters": 8, "vocab_size": None, "patch": 10},
            "model.patch: with model.filters .* a multiple of 4, .* not 10",
        ),
        ({"backbone": {"bidirectional": "both"}}, "backbone.bidirectional: must be one of tied, untied"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    arguments = {"backbone": {"d_model": 16, "n_layers": 1}, "vocab_size": 6, "num_classes": 2, **values}
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(**arguments)
