"""Made-up tasks: how answers are counted, long rows in parts, and small ones of each learnt."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.datamodules.associative_recall import AssociativeRecallDataModule
from mambazoo.datamodules.induction_heads import InductionHeadsDataModule
from mambazoo.datamodules.selective_copying import SelectiveCopyingDataModule
from mambazoo.datamodules.synthetic import SyntheticDataModule
from mambazoo.zoo.heads import IGNORE
from mambazoo.zoo.synthetic import SyntheticTask


def build(values: dict[str, Any] | None = None, **more: Any) -> SyntheticTask:
    model = SyntheticTask({"d_model": 16, "n_layers": 2, **(values or {})}, vocab_size=6, **more)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def trainer(**values: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **values,
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["mamba", "s4d", "mamba + attention", "lstm"])
@pytest.mark.parametrize("chunk", [1, 7, 20, 21])
@torch.no_grad()
def test_long_rows_are_answered_in_parts_as_at_once(pattern: str, chunk: int) -> None:
    model, targets = build({"pattern": pattern}), torch.randint(6, (3, 21))
    targets[torch.rand(3, 21) < 0.7] = IGNORE
    batch = {"inputs": torch.randint(6, (3, 21)), "targets": targets}
    whole = model.answers(batch)
    model.chunk = chunk
    for (row, *rest), (other, *others) in zip(by_row(whole), by_row(model.answers(batch)), strict=True):
        assert row == other
        assert rest == pytest.approx(others, abs=1e-4)


def by_row(answers: tuple[torch.Tensor, ...]) -> list[tuple[float, ...]]:
    """Answers in the order of rows, which parts of rows are not in."""
    return sorted(zip(*(x.tolist() for x in answers), strict=True), key=lambda answer: answer[0])


def test_a_part_is_all_that_is_ever_computed() -> None:
    model, sizes = build(chunk=8), []
    model.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1]))
    targets = torch.full((1, 100), IGNORE)
    targets[:, -1] = 3
    with torch.no_grad():
        model.answers({"inputs": torch.randint(6, (1, 100)), "targets": targets})
    assert sizes == [8] * 12 + [4]


def test_accuracy_is_counted_by_answer_by_row_and_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logged = build(), {}
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: float(value)}))
    # the model's own answers, some of them made wrong
    for l, rows, wrong in ((8, 4, [(0, 2), (0, 3), (2, 7)]), (5, 2, [(1, 4)])):
        inputs = torch.randint(6, (rows, l))
        with torch.no_grad():
            targets = model(inputs)[0].argmax(-1)
        targets[:, 0] = IGNORE
        for place in wrong:
            targets[place] = (targets[place] + 1) % 6
        with torch.no_grad():
            model.measure({"inputs": inputs, "targets": targets}, "val")
    # nothing is asked, nothing counts
    model.measure({"inputs": inputs, "targets": torch.full_like(inputs, IGNORE)}, "val")
    model.on_validation_epoch_end()
    assert logged["val/accuracy"] == pytest.approx((28 - 3 + 8 - 1) / 36)
    assert logged["val/sequence_accuracy"] == pytest.approx((2 + 1) / 6)
    assert logged["val/accuracy_8"] == pytest.approx(25 / 28)
    assert logged["val/accuracy_5"] == pytest.approx(7 / 8)
    assert logged["val/loss"] > 0
    logged.clear()
    model.measure({"inputs": inputs[:1], "targets": targets[:1]}, "test")
    model.on_test_epoch_end()
    assert set(logged) == {"test/loss", "test/accuracy", "test/sequence_accuracy"}
    assert logged["test/accuracy"] == 1


def test_the_loss_that_is_trained_is_the_one_that_is_measured() -> None:
    model, targets = build(), torch.randint(6, (3, 9))
    targets[:, ::2] = IGNORE
    batch = {"inputs": torch.randint(6, (3, 9)), "targets": targets}
    assert model.training_loss(batch).item() == pytest.approx(model.answers(batch)[2].mean().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_tests_every_length() -> None:
    data = InductionHeadsDataModule(
        vocab_size=6, length=16, test_lengths=[8, 16, 40], batch_size=4, held_out_rows=6
    )
    [found] = trainer().test(build(chunk=16), data, verbose=False)
    assert set(found) == {
        "test/loss", "test/accuracy", "test/sequence_accuracy",
        "test/accuracy_8", "test/accuracy_16", "test/accuracy_40",
    }  # fmt: skip
    lengths = [found[f"test/accuracy_{length}"] for length in (8, 16, 40)]
    assert math.isclose(sum(lengths) / 3, found["test/accuracy"], rel_tol=1e-6)


SMALL_COPYING = {"length": 16, "tokens": 2, "vocab_size": 6, "batch_size": 16}
MAMBA = {"d_model": 64, "n_layers": 2, "mamba": {"d_state": 8}}


def learn(
    data: SyntheticDataModule, backbone: dict[str, Any], steps: int, lr: float, **optimizer: Any
) -> dict[str, float]:
    """What a model reaches on the test rows after so many steps."""
    config = {"lr": lr, "weight_decay": 0.0, "warmup_steps": 20, "schedule": "constant", **optimizer}
    model = SyntheticTask(backbone, data.vocab_size, optimizer=config)
    run = trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0)
    run.fit(model, data)
    [found] = run.test(model, data, verbose=False)
    return dict(found)


@pytest.mark.filterwarnings("ignore")
def test_selective_copying_is_learnt_sooner_than_by_a_model_that_does_not_select() -> None:
    found, control = (
        learn(SelectiveCopyingDataModule(**SMALL_COPYING, held_out_rows=256), backbone, 150, 5e-3)
        for backbone in (MAMBA, {**MAMBA, "pattern": "s4d", "s4d": {"d_state": 8}})
    )
    assert found["test/accuracy"] > 0.97
    assert control["test/sequence_accuracy"] < found["test/sequence_accuracy"] - 0.03


@pytest.mark.filterwarnings("ignore")
def test_plain_copying_is_learnt_by_a_model_that_does_not_select() -> None:
    data = SelectiveCopyingDataModule(
        length=24, tokens=3, vocab_size=6, selective=False, batch_size=16, held_out_rows=256
    )
    backbone = {"d_model": 32, "n_layers": 1, "pattern": "s4d"}
    found = learn(data, backbone, 120, 5e-3)
    assert found["test/accuracy"] > 0.97


@pytest.mark.filterwarnings("ignore")
def test_induction_heads_are_learnt_for_all_lengths_but_not_by_a_model_that_does_not_select() -> None:
    backbone = {"d_model": 32, "n_layers": 1, "mamba": {"d_state": 8}}
    found, control = (
        learn(
            InductionHeadsDataModule(
                length=16, test_lengths=[8, 16, 64], vocab_size=8, batch_size=16, held_out_rows=256
            ),
            one, 160, 1e-2, schedule="cosine", min_lr=1e-3,
        )
        for one in (backbone, {**backbone, "pattern": "s4d"})
    )  # fmt: skip
    assert found["test/accuracy_16"] > 0.97
    assert found["test/accuracy_64"] > 0.9
    assert control["test/accuracy_16"] < 0.6


@pytest.mark.filterwarnings("ignore")
def test_recall_is_learnt_by_a_hybrid() -> None:
    data = AssociativeRecallDataModule(length=24, pairs=4, vocab_size=16, batch_size=32, held_out_rows=256)
    backbone = {
        "d_model": 32, "n_layers": 2, "pattern": "mamba + attention", "attention": {"d_head": 16}, "d_mlp": 0,
    }  # fmt: skip
    found = learn(data, backbone, 120, 5e-3)
    assert found["test/accuracy"] > 0.97
