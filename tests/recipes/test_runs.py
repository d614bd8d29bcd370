"""Runs from start to finish: training, stopping, going on exactly, measuring, generating."""

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mambazoo.checkpoints.io import from_pretrained, load, save_pretrained
from mambazoo.recipes.cli import main
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.saving import AtomicCheckpointIO, newest_checkpoint, read_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "language.txt"
STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe with everything that could disturb a resumed run: accumulation, validation, uneven intervals."""
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    (folder / "texts").mkdir()
    for i in range(40):
        text = " ".join(rng.choice(words) for _ in range(150))
        (folder / "texts" / f"{i}.txt").write_text(text)
    values = {
        "extends": "language/demo",
        "model": {"backbone": {"d_model": 16, "n_layers": 2}, "optimizer": {"lr": 3e-3, "warmup_steps": 5}},
        "data": {"paths": str(folder / "texts"), "length": 64, "batch_size": 4},
        "trainer": {
            "accelerator": "cpu", "max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 14,
            "log_every_n_steps": 1, "limit_val_batches": 2,
        },
        "callbacks": {"checkpoints": {"every_n_steps": 4}},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    # few threads, so that two runs of a test do not slow each other down
    return subprocess.Popen(
        [sys.executable, "-m", "mambazoo", *arguments], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


def curve(run: Path) -> list[list[str]]:
    """The log of a run, but for its speed and what that takes."""
    machine = ("train/tokens_per_second", "train/data_wait", "train/memory_gib")
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.reader(file) if row[1] not in machine]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    path = run / "metrics.csv"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and f"\n{step},train/loss" in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(
        f"step {step} never came: {process.communicate()[0] if process.poll() is not None else ''}"
    )


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run that nothing interrupts."""
    folder = recipe.parent / "whole"
    folder.mkdir()
    finish(start(folder, "fit", str(recipe)))
    return folder / "runs" / "small" / "1"


def assert_same(run: Path, whole: Path) -> None:
    assert curve(run) == curve(whole)
    a, b = weights(run), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(("workers", "step"), [(0, 6), (2, 13), (0, 14), (2, 27)])
def test_a_killed_run_goes_on_exactly(
    recipe: Path, whole: Path, tmp_path: Path, workers: int, step: int
) -> None:
    run = tmp_path / "runs" / "small" / "1"
    process = start(tmp_path, "fit", str(recipe), f"data.num_workers={workers}")
    wait_for_step(run, step, process)
    # anywhere in what follows: the next step, a validation, a checkpoint half written
    time.sleep(random.random() * 0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "summary.json").exists()
    # as of a kill while it was written
    (run / "checkpoints" / f".last.ckpt.{process.pid}.tmp").write_bytes(b"half")
    output = finish(start(tmp_path, "resume", str(run)))
    assert "resuming" in output
    assert_same(run, whole)
    assert not list(run.rglob("*.tmp"))
    if step == 27:
        # a damaged checkpoint is passed over
        last = run / "checkpoints" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        assert newest_checkpoint(run / "checkpoints")[0].name in ("previous.ckpt", "best.ckpt")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "small" / "1"
    process = start(tmp_path, "fit", str(recipe), "callbacks.checkpoints.every_n_steps=20")
    # the first validation, and with it a checkpoint, comes after step 7
    wait_for_step(run, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((run / "checkpoints").glob("*.ckpt"))
    output = finish(start(tmp_path, "resume", str(run), "model.optimizer.lr=1"), 2)
    assert "model.optimizer.lr: is 0.003 in this run and cannot become 1" in output
    assert "has no checkpoint yet: it starts anew" in finish(start(tmp_path, "resume", str(run)))
    assert_same(run, whole)
    # what has gone on has something to lose
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    assert "holds no whole checkpoint" in finish(start(tmp_path, "resume", str(run)), 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_a_step_with_a_checkpoint(
    recipe: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "runs" / "small" / "1"
    process = start(tmp_path, "fit", str(recipe), "data.num_workers=2")
    wait_for_step(run, 9, process)
    # to all its processes, as a terminal and a scheduler do
    os.killpg(process.pid, number)
    output = finish(process, code)
    assert f"mambazoo resume {Path('runs/small/1')}" in output
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] >= 9
    finish(start(tmp_path, "resume", "runs/small"))
    assert_same(run, whole)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler for torch.compile")
def test_a_compiled_run_goes_on_exactly(recipe: Path, tmp_path: Path) -> None:
    # small and of one shape, since every process compiles
    options = (
        "callbacks.compile.mode=default",
        "data.packing=false",
        "model.backbone.n_layers=1",
        "trainer.max_steps=12",
    )
    finish(start(tmp_path, "fit", str(recipe), *options))
    process = start(tmp_path, "fit", str(recipe), *options)
    run = tmp_path / "runs" / "small" / "2"
    wait_for_step(run, 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(tmp_path, "resume", str(run)))
    assert_same(run, tmp_path / "runs" / "small" / "1")
    assert "backbone.layers.0.norm.weight" in weights(run)


def test_a_run_leaves_what_it_says(whole: Path, recipe: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["recipe"] == "small"
    assert summary["steps"] == STEPS
    assert set(summary["val"]) == {"loss", "bits_per_byte", "perplexity"}
    environment = json.loads((whole / "env.json").read_text())
    assert environment["command"] == f"mambazoo fit {recipe}"
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    series = {row[1] for row in curve(whole)}
    assert {"train/loss", "train/lr", "train/gradient_norm", "val/bits_per_byte", "val/perplexity"} <= series
    assert list(whole.glob("events.out.tfevents.*"))
    kept = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert kept["callbacks"]["checkpoints"]["folder"] == "${trainer.default_root_dir}/checkpoints"
    losses = [float(row[2]) for row in curve(whole) if row[1] == "val/loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert (whole / "loss.png").stat().st_size > 5000


def test_validation_measures_the_best_again(whole: Path) -> None:
    output = finish(start(whole.parents[2], "validate", "runs/small/1"))
    measured = json.loads(output[output.index("{") :])
    summary = json.loads((whole / "summary.json").read_text())
    assert measured["val/bits_per_byte"] == pytest.approx(summary["val"]["bits_per_byte"], rel=1e-6)
    # and leaves nothing behind
    assert not (whole / "lightning_logs").exists()


def test_predictions_add_up(whole: Path) -> None:
    finish(start(whole.parents[2], "predict", "runs/small", "trainer.limit_predict_batches=2"))
    rows = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    summary = json.loads((whole / "summary.json").read_text())
    mean = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    assert mean == pytest.approx(summary["val"]["loss"], rel=1e-5)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; return what it printed."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


def test_text_is_generated_from_every_kind_of_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole.parents[2])
    options = ["--max-new-tokens", "40", "--temperature", "0"]
    places = ["runs/small", "runs/small/1", "runs/small/1/checkpoints/best.ckpt", "runs/small/1/model"]
    texts = {command(capsys, "generate", place, "--prompt", "alpha be", *options) for place in places}
    assert len(texts) == 1
    [text] = texts
    assert text.startswith("alpha be")
    (tmp_path / "prompt.txt").write_text("alpha be")
    batch = command(
        capsys, "generate", places[0], "--prompt", str(tmp_path / "prompt.txt"), "--prompt", "o", *options
    )
    assert text.strip() in batch
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"alpha be")))
    assert command(capsys, "generate", places[0], "--prompt", "-", *options) == text


def test_samples_differ_and_repeat(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole.parents[2])
    arguments = [
        "generate",
        "runs/small",
        "--prompt",
        "a",
        "--number",
        "2",
        "--max-new-tokens",
        "30",
        "--seed",
        "5",
    ]
    first, again = command(capsys, *arguments), command(capsys, *arguments)
    assert first == again
    one, two = first.split("--- 2 of 2")
    assert one.split("\n", 1)[1].strip() != two.strip()


def test_info_says_what_a_model_is_made_of(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole.parents[2])
    text = command(capsys, "info", "runs/small")
    summary = json.loads((whole / "summary.json").read_text())
    assert f"LanguageModel, {summary['parameters']:,} parameters" in text
    assert "vocabulary    bytes, 257 tokens" in text


def test_a_tokenizer_that_was_trained_stays_with_its_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command(
        capsys,
        "fit",
        str(recipe),
        "data.tokenizer=bpe-270",
        "trainer.max_steps=2",
        "trainer.val_check_interval=4",
    )
    (tmp_path / "other.txt").write_text("other words altogether " * 200)
    command(capsys, "validate", "runs/small", f"data.paths={tmp_path / 'other.txt'}")
    assert command(capsys, "generate", "runs/small", "--prompt", "alpha", "--max-new-tokens", "3").startswith(
        "alpha"
    )
    for override, message in (
        ("data.tokenizer=bytes", "vocab_size: the checkpoint has 270, the recipe 257"),
        ("data.tokenizer=bpe-270", "data.tokenizer: is not the one that the checkpoint was trained with"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["validate", "runs/small", override, f"data.paths={tmp_path / 'other.txt'}"])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_loggers_leaves_none_of_the_trainers_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ("trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.accumulate_grad_batches=1")
    out = command(capsys, "fit", str(recipe), "loggers=null", *steps)
    assert "none, nothing was logged" in out
    assert not [path for path in tmp_path.rglob("*") if path.name in ("lightning_logs", "metrics.csv")]


def test_a_run_that_is_measured_takes_only_what_is_read_anew(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["test", str(whole), "trainer.limit_test_batches=0"])
    assert exit_.value.code == 2
    assert "trainer.limit_test_batches: leaves nothing to measure" in capsys.readouterr().err
    for override in ("callbacks.checkpoints.mode=max", "model.optimizer.lr=1", "loggers.csv=null"):
        with pytest.raises(SystemExit) as exit_:
            main(["test", str(whole), override])
        key = override.partition("=")[0]
        message = (
            f"mambazoo: {key}: means nothing to a run that is only measured; it takes data.* and trainer.*\n"
        )
        assert (exit_.value.code, capsys.readouterr().err) == (2, message)


def test_a_resumed_run_cannot_change_what_its_state_decides(whole: Path) -> None:
    output = finish(start(whole.parents[2], "resume", "runs/small", "model.optimizer.lr=1"), 2)
    assert "model.optimizer.lr: is 0.003 in this run and cannot become 1" in output
    # a finished run has nothing left to do
    finish(start(whole.parents[2], "resume", "runs/small"))


def test_a_folder_that_moved_is_still_a_run(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "elsewhere")
    # of which the end needs neither
    for name in ("summary.json", "env.json"):
        (tmp_path / "elsewhere" / name).unlink()
    finish(start(tmp_path, "resume", "elsewhere", "trainer.max_steps=32"))
    assert json.loads((tmp_path / "elsewhere" / "summary.json").read_text())["steps"] == 32
    assert json.loads((whole / "summary.json").read_text())["steps"] == STEPS


def test_a_damaged_checkpoint_is_never_the_previous_or_the_best(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "elsewhere"
    shutil.copytree(whole, run)
    folder = run / "checkpoints"
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    (folder / "best.ckpt").unlink()
    # so that it is put back afterwards
    monkeypatch.setenv("MAMBAZOO_RUN", str(run))

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    # after the validation that is made up, while the next one is written
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed"):
        main(["resume", str(run)])
    steps = {path.stem: read_checkpoint(path)["global_step"] for path in folder.glob("*.ckpt")}
    assert steps == {"last": 28, "previous": 28, "best": 28}


def test_a_run_is_the_model_it_was_where_a_default_has_changed(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    shutil.copytree(whole, run)
    kept = yaml.safe_load((run / "recipe.yaml").read_text())
    # as if two layers had been the default then
    del kept["model"]["backbone"]["n_layers"]
    # and an option of the model had not been there
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"].pop("tie_embeddings")
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    (run / "recipe.yaml").write_text(yaml.safe_dump(kept))
    output = finish(start(tmp_path, "validate", "elsewhere"))
    summary = json.loads((whole / "summary.json").read_text())
    measured = json.loads(output[output.index("{") :])
    assert measured["val/bits_per_byte"] == pytest.approx(summary["val"]["bits_per_byte"], rel=1e-6)
    finish(start(tmp_path, "resume", "elsewhere", "trainer.max_steps=32"))
    assert json.loads((run / "summary.json").read_text())["steps"] == 32
    output = finish(
        start(tmp_path, "resume", "elsewhere", "model.backbone.n_layers=3", "trainer.max_steps=40"), 2
    )
    assert "model.backbone.n_layers: is 2 in this run and cannot become 3" in output


def test_the_golden_curve_holds(whole: Path) -> None:
    # an intended change of the numbers rewrites the file, in the same commit, and says why
    losses = {row[0]: float(row[2]) for row in curve(whole) if row[1] == "train/loss"}
    if os.environ.get("MAMBAZOO_WRITE_GOLDEN"):
        GOLDEN.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in losses.items()))
    golden = dict(line.split() for line in GOLDEN.read_text().splitlines())
    assert losses.keys() == golden.keys()
    for step, loss in golden.items():
        assert losses[step] == pytest.approx(float(loss), rel=2e-4), f"step {step}"


def model_folder(tmp_path: Path, **values: Any) -> tuple[Path, LanguageModel]:
    model = LanguageModel({"d_model": 16, "n_layers": 2}, **{"vocab_size": 257, **values})
    save_pretrained(model, {"kind": "bytes"}, tmp_path / "model", {"README.md": "card"})
    return tmp_path / "model", model


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_folder_gives_back_the_model(tmp_path: Path, tied: bool) -> None:
    folder, model = model_folder(tmp_path, tie_embeddings=tied)
    loaded, vocabulary = load(folder)
    assert vocabulary == {"kind": "bytes"}
    a, b = model.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (loaded.head.weight is loaded.embedding.weight) is tied
    assert from_pretrained(folder, dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    # writing over it replaces it whole
    save_pretrained(model, None, folder)
    assert not (folder / "README.md").exists()


def test_a_folder_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    folder, _ = model_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    cases = {
        "os.system": {**config, "task": "os.system"},
        "none of this package": {**config, "task": "mambazoo.zoo.backbone.Backbone"},
        "does not fit": {**config, "model": {**config["model"], "vocab_size": 99}},
        "does not take": {**config, "model": {**config["model"], "wings": 2}},
        "of a kind that is not read": {"hello": 1},
    }
    for message, value in cases.items():
        (folder / "config.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=message):
            load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is damaged"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="a config but no"):
        load(folder)
