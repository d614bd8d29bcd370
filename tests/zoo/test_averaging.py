"""The running average of the weights: by hand, in validation and in what a checkpoint's reader gets."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from mambazoo.zoo.averaging import Average
from mambazoo.zoo.language import LanguageModel
from torch.utils.data import DataLoader


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decay", [0.3, None])
def test_the_average_is_what_is_validated_and_saved(tmp_path: Path, decay: float | None) -> None:
    torch.manual_seed(0)
    model = LanguageModel({"d_model": 16, "n_layers": 1}, 20, optimizer={"lr": 0.1, "schedule": "constant"})
    weights, validated, saved = [model.embedding.weight.detach().clone()], [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            weights.append(model.embedding.weight.detach().clone())
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            saved.append(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])

        def on_validation_batch_start(self, *_: Any) -> None:
            validated.append(model.embedding.weight.detach().clone())

    rows = [torch.randint(20, (2, 9)) for _ in range(4)]
    loader = DataLoader([{"inputs": row[:, :-1], "targets": row[:, 1:]} for row in rows], batch_size=None)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=2, limit_val_batches=1, num_sanity_val_steps=0,
        callbacks=[Average(decay), Watch()],
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    average, expected = weights[0], []
    for step, now in enumerate(weights[1:], 1):
        kept = 0.0 if decay is None else min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * now
        expected.append(average)
    for found, value in zip(saved, expected, strict=True):
        torch.testing.assert_close(found["embedding.weight"], value)
        assert torch.equal(found["head.weight"], found["embedding.weight"])
    torch.testing.assert_close(validated[0], expected[1])
    torch.testing.assert_close(validated[1], expected[3])
    # what training leaves is the average
    torch.testing.assert_close(model.embedding.weight.detach(), expected[3])
    if decay is not None:
        assert not torch.allclose(weights[-1], expected[3])


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_share_that_makes_no_sense_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.average\.decay: must be null or between 0 and 1"):
        Average(decay)
