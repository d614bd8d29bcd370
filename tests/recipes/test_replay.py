"""Batches read again: the same, with the same loss and gradient, whatever the ranks and the accumulation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mambazoo.checkpoints.io import save_pretrained
from mambazoo.datamodules.base import DataModule
from mambazoo.datamodules.genomics import GenomeDataModule
from mambazoo.datamodules.vocab import Bytes
from mambazoo.recipes.cli import main
from mambazoo.zoo import guard
from mambazoo.zoo.classification import SequenceClassifier
from mambazoo.zoo.journal import read_journal
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.saving import read_checkpoint
from mambazoo.zoo.throughput import operations


def command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == code, captured.err
    return captured.out + captured.err


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_replayed_exactly(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packing: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "extends": "language/demo",
        "model": {"backbone": {"d_model": 8, "n_layers": 1}},
        "data": {"paths": str(texts), "length": 32, "batch_size": 3, "packing": packing},
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1,
            "log_every_n_steps": 1, "accumulate_grad_batches": 2,
        },
        "callbacks": {"checkpoints": {"every_n_steps": 1}},
        "loggers": {"tensorboard": None},
    }  # fmt: skip
    Path("small.yaml").write_text(yaml.safe_dump(values))
    command(capsys, "fit", "small.yaml")
    logged = read_journal(Path("runs/small/1"))

    text = command(capsys, "replay", "runs/small", "--step", "4")
    assert_replayed(text, logged)
    # 24 samples were read, the last six of them in this step
    assert "samples 18 to 23" in text
    assert text.count("batch ") == 2
    assert len(re.findall(r"sample \d+ of pass \d+", text)) == 6
    assert "return x" in text or "def f" in text

    assert "with the weights after step 4" in command(
        capsys, "replay", "runs/small", "--step", "9", "--checkpoint", "runs/small/1/checkpoints/last.ckpt"
    )
    other = ["--step", "1", "--checkpoint", "elsewhere/last.ckpt"]
    assert "--checkpoint: elsewhere/last.ckpt is none of this run's, which are in" in command(
        capsys, "replay", "runs/small", *other, code=2
    )
    assert "--step: must be 1 or more" in command(capsys, "replay", "runs/small", "--step", "0", code=2)
    assert "was data.batch_size changed" in command(
        capsys, "replay", changed(Path("runs/small/1")), "--step", "2", code=2
    )
    # what is logged beside: a share, and memory
    assert all(0 <= share <= 1 for _, share in logged["train/data_wait"])
    assert any(share > 0 for _, share in logged["train/data_wait"])
    assert all(gib > 0.01 for _, gib in logged["train/memory_gib"])


@pytest.mark.parametrize("option", ["finetune.mode=lora", "callbacks.average.decay=0.9"])
@pytest.mark.filterwarnings("ignore")
def test_a_step_is_replayed_with_the_weights_that_were_trained(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pretrained(LanguageModel({"d_model": 8, "n_layers": 1}, Bytes.size), {"kind": "bytes"}, Path("base"))
    options = ["model.pretrained=base", f"data.paths={texts}", "data.length=32", "data.batch_size=2", option]
    options += [
        "model.optimizer.lr=0.05",
        "model.optimizer.warmup_steps=0",
        "callbacks.checkpoints.every_n_steps=1",
    ]
    options += ["trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    options += ["trainer.limit_val_batches=1", "trainer.log_every_n_steps=1"]
    command(capsys, "finetune", "language/finetune", *options)
    logged = read_journal(Path("runs/language/finetune/1"))
    text = command(capsys, "replay", "runs/language/finetune", "--step", "4")
    assert_replayed(text, logged)


def assert_replayed(text: str, logged: dict[str, list[tuple[int, float]]]) -> None:
    """What `replay` says of the fourth step is what was logged."""
    assert re.search(r"^step 4, samples \d+ to \d+, with the weights after step 3", text, re.MULTILINE)
    found = re.search(r"^loss ([\d.]+)  gradient norm ([\d.]+)$", text, re.MULTILINE)
    assert found
    assert float(found[1]) == pytest.approx(dict(logged["train/loss"])[4], abs=1e-6)
    assert float(found[2]) == pytest.approx(dict(logged["train/gradient_norm"])[4], rel=1e-5)


def changed(run: Path) -> str:
    """The run, as if its batches had been of another size."""
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("batch_size: 3", "batch_size: 5"))
    return str(run)


def last(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("warmup", [None, [1024]])
def test_every_rank_reads_again_what_it_read(genome: Path, warmup: list[int] | None) -> None:
    def module() -> DataModule:
        data = GenomeDataModule(str(genome), valid=0.1, length=64, batch_size=2, length_warmup=warmup)
        data.prepare_data()
        data.setup("fit")
        return data

    data, again, lengths = module(), module(), set()
    for rank in (0, 1):
        data._rebuilding = (2, rank)
        for i, batch in zip(range(6), data.train_dataloader(), strict=False):
            lengths.add(batch["inputs"].shape[1])
            items, rebuilt = again.rebuild(i * 4, 2, rank)
            assert same(rebuilt, again.on_after_batch_transfer(batch, 0))
            assert len(items) == len(batch["inputs"])
    assert lengths == ({32, 64} if warmup else {64})


@pytest.fixture
def faulty(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes a small run whose third step has no loss, and whose last one leaps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guard, "SETTLING", 4)
    loss, faults = LanguageModel.training_loss, {2: float("nan"), 6: 100.0}

    monkeypatch.setattr(
        LanguageModel,
        "training_loss",
        lambda self, batch: loss(self, batch) * faults.get(self.global_step, 1),
    )
    options = ["data.length=32", "data.batch_size=2", "model.backbone.d_model=8", "model.backbone.n_layers=1"]
    options += [f"data.paths={texts}", "trainer.max_steps=7", "trainer.limit_val_batches=1"]
    options += [
        "trainer.accelerator=cpu",
        "callbacks.checkpoints.every_n_steps=1",
        "trainer.log_every_n_steps=1",
    ]
    return [*options, "model.optimizer.spike=20"]


def test_a_step_that_is_left_out_says_how_to_look_at_its_batch(
    faulty: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = command(capsys, "fit", "language/demo", *faulty)
    assert (
        "step 3: the loss is not finite (nan); it is left out; its batch, samples 4 to 5, is shown by" in text
    )
    assert "mambazoo replay runs/language/demo/1 --step 3" in text
    assert re.search(
        r"step 7: the loss is [\d.]+, more than the [\d.]+ that model.optimizer.spike allows", text
    )
    assert read_journal(Path("runs/language/demo/1"))["train/left_out"] == [(3, 1.0), (7, 1.0)]
    assert "not finite or spikes: steps 3, 7." in command(capsys, "report", "runs/language/demo")
    assert "step 3, samples 4 to 5, with" in command(capsys, "replay", "runs/language/demo", "--step", "3")


def test_a_run_that_stopped_at_a_step_goes_on_without_it_as_if_it_had_left_it_out(
    faulty: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = Path("runs/language/demo/1"), Path("runs/language/demo/2")
    command(capsys, "fit", "language/demo", *faulty)
    text = command(capsys, "fit", "language/demo", *faulty, "model.optimizer.anomaly=stop", code=1)
    assert "mambazoo: step 3: the loss is not finite (nan); its batch, samples 4 to 5, is shown by" in text
    assert f"mambazoo resume {run} model.optimizer.anomaly=skip" in text
    assert last(run)["global_step"] == 2
    assert "step 3, samples 4 to 5, with the weights after step 2" in command(
        capsys, "replay", str(run), "--step", "3"
    )
    # as often as it is tried
    command(capsys, "resume", str(run), code=1)
    command(capsys, "resume", str(run), "model.optimizer.anomaly=skip")
    assert same(last(run)["state_dict"], last(whole)["state_dict"])
    assert read_journal(run)["train/left_out"] == [(3, 1.0), (7, 1.0)]


def test_matrix_products_are_counted() -> None:
    model = LanguageModel({"d_model": 16, "n_layers": 3}, vocab_size=64)
    d, inner, rank, n = 16, 32, 1, 16
    layer = d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d
    assert operations(model) == 6 * (3 * layer + 64 * d)
    # what is not six a weight, or is not known, is not claimed
    assert operations(LanguageModel({"d_model": 16, "n_layers": 3, "pattern": "s4d"}, vocab_size=64)) is None
    model.embedding.weight.requires_grad_(False)
    assert operations(model) is None
    other = SequenceClassifier({"d_model": 16, "n_layers": 1, "pool": [4]}, num_classes=2, vocab_size=8)
    assert operations(other) is None
