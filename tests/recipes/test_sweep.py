"""Sweeps over a grid, and the pages that are made of their lines, of single runs and of benchmarks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from mambazoo.recipes import results, sweep
from mambazoo.recipes.find import compose, find
from PIL import Image

from .command import Command, call

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(mambazoo: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in an empty folder, and what it would start as processes in this one."""
    monkeypatch.setattr(sweep._Stopping, "run", lambda self, arguments: call(*arguments))
    return mambazoo


@pytest.fixture
def recipe(texts: Path, tmp_path: Path) -> str:
    """A run of two steps."""
    values = {
        "extends": "language/demo",
        "model": {"backbone": {"d_model": 8, "n_layers": 1}},
        "data": {"paths": str(texts), "length": 32, "batch_size": 2},
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "val_check_interval": 1, "limit_val_batches": 1,
            "log_every_n_steps": 1,
        },
        "loggers": {"tensorboard": None},
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return "small.yaml"


def lines_of(folder: Path) -> list[results.Row]:
    [path] = folder.glob("runs/small/sweep-*/results.jsonl")
    return results.read(path)


def test_a_sweep_goes_on_where_it_stopped(
    command: Command, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = ("--over", "model.backbone.pattern=mamba,wrong", "--seeds", "2")
    code, out, err = command("sweep", recipe, *over)
    assert code == 1
    assert "backbone.pattern: must be one of" in err
    assert "2 of 4 failed" in err
    assert [(row["over"], row["seed"], "failed" in row) for row in lines_of(tmp_path)] == [
        ({"model.backbone.pattern": "mamba"}, 0, False),
        ({"model.backbone.pattern": "wrong"}, 0, True),
        ({"model.backbone.pattern": "mamba"}, 1, False),
        ({"model.backbone.pattern": "wrong"}, 1, True),
    ]
    first = lines_of(tmp_path)[0]
    assert first["steps"] == 2
    assert first["val"]["bits_per_byte"] > 0
    assert first["command"] == f"mambazoo sweep small.yaml --over={over[1]} --seeds=2"
    assert {"commit", "hardware", "versions", "seconds", "parameters"} <= first.keys()
    assert "| mamba | 2 |" in out
    assert "| wrong | 0 (2 failed) |" in out
    seeds = [(row["run"], compose(find(row["run"]), [])) for row in lines_of(tmp_path) if "failed" not in row]
    assert [(kept["seed_everything"], kept["data"]["seed"]) for _, kept in seeds] == [(0, 0), (1, 1)]
    losses = [row["val"]["loss"] for row in lines_of(tmp_path) if "failed" not in row]
    assert losses[0] != losses[1]

    # a run that was interrupted after it saved, whose line and summary are missing
    (path,) = tmp_path.glob("runs/small/sweep-*/results.jsonl")
    rows = lines_of(tmp_path)
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows if "failed" in row) + json.dumps(rows[0])[:9]
    )
    interrupted = Path(rows[0]["run"])
    (interrupted / "summary.json").unlink()
    started: list[str] = []
    monkeypatch.setattr(
        sweep._Stopping, "run", lambda self, arguments: started.append(arguments[0]) or call(*arguments)
    )
    code, out, _ = command("sweep", recipe, "--over", "model.backbone.pattern=mamba", "--seeds", "2")
    assert (code, started) == (0, ["resume"])
    # the other has its summary: only its line is written
    assert [row["val"]["loss"] for row in lines_of(tmp_path)[2:]] == losses
    assert "wrong" not in out
    # a finished one has nothing left to do, unless it is to be tested too
    assert command("sweep", recipe, "--over", "model.backbone.pattern=mamba", "--seeds", "2")[0] == 0
    assert started == ["resume"]
    code, out, _ = command("sweep", recipe, "--over", "model.backbone.pattern=mamba", "--test")
    assert (code, started) == (0, ["resume", "test"])
    tested = lines_of(tmp_path)[-1]
    assert tested["test"] == json.loads((interrupted / "test.json").read_text())
    # there is no test split here, and the validation split has one more batch than is read while training
    assert tested["test"]["bits_per_byte"] > 0
    assert "test/bits_per_byte" in out


def test_what_asks_to_stop_stops_after_the_run_did(
    command: Command, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: sweep._Stopping, arguments: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 130

    monkeypatch.setattr(sweep._Stopping, "run", interrupt)
    code, out, _ = command("sweep", recipe, "--seeds", "2")
    assert code == 130
    assert "go on with\n  mambazoo sweep small.yaml --seeds=2" in out
    assert not list(tmp_path.rglob("results.jsonl"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_is_started_as_a_process_and_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # stands for a run: it stops after SIGTERM, in its own time
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.pause()\n"
    )
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{program}")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with sweep._Stopping() as stopping:
        assert stopping.run(["fit"]) == 143
    assert stopping.received == signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--over", "lr"), "--over: 'lr' is not key=a,b,c"),
        (("--over", "model.optimizer.lr=1,,2"), "is not key=a,b,c"),
        (("--over", "data.seed=1,2"), "data.seed: is what --seeds sets"),
        (("seed_everything=3",), "seed_everything: is what --seeds sets"),
        (("--seeds", "0"), "--seeds: must be 1 or more"),
        (("--over", "data.length=32,${nowhere}"), "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_mistake_in_asking_is_explained(
    command: Command, recipe: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = command("sweep", recipe, *arguments)
    assert code == 2
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_commas_in_brackets_belong_to_a_value() -> None:
    key, values = sweep._values("backbone.pool=[4,4],[16]")
    assert (key, values) == ("backbone.pool", ["[4,4]", "[16]"])
    cells = sweep._cells({key: values, "lr": ["1e-3"]}, 1)
    assert [cell.over for cell in cells] == [
        {"backbone.pool": [4, 4], "lr": 0.001},
        {"backbone.pool": [16], "lr": 0.001},
    ]
    assert len({cell.folder for cell in cells}) == 2


def test_values_that_end_alike_have_folders_of_their_own() -> None:
    cells = sweep._cells({"model.optimizer.lr": ["1.5e-3", "2.5e-3"]}, 1)
    assert [cell.folder for cell in cells] == ["lr=1.5e-3,seed=0", "lr=2.5e-3,seed=0"]


def test_lists_and_sections_are_values_too() -> None:
    key, values = sweep._values("model.backbone={pattern: s4d,s4d: {d_state: 8}},{d_mlp: 64}")
    assert values == ["{pattern: s4d,s4d: {d_state: 8}}", "{d_mlp: 64}"]
    cells = sweep._cells({key: values, "model.backbone.mamba.selective": ["[]", "[delta,B]"]}, 1)
    assert [cell.over["model.backbone.mamba.selective"] for cell in cells] == [[], ["delta", "B"]] * 2
    assert cells[0].over[key] == {"pattern": "s4d", "s4d": {"d_state": 8}}
    assert len({cell.folder for cell in cells}) == 4
    backbone = compose(find("language/ablations"), ["data.paths=x", *cells[1].overrides])["model"]["backbone"]
    assert (backbone["pattern"], backbone["s4d"]["d_state"], backbone["size"]) == ("s4d", 8, "mamba-7m")
    assert backbone["mamba"]["selective"] == ["delta", "B"]


def test_a_sweep_fine_tunes(command: Command, recipe: str, tmp_path: Path) -> None:
    assert command("fit", recipe)[0] == 0
    values = yaml.safe_load((tmp_path / recipe).read_text())
    values |= {"extends": "language/finetune", "model": {"pretrained": "runs/small/1"}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(values))
    code, out, err = command("sweep", "tuned.yaml", "--over", "finetune.mode=full,head")
    assert code == 0, err
    assert "| full | 1 |" in out
    assert "| head | 1 |" in out


def test_one_run_becomes_a_page(command: Command, recipe: str, tmp_path: Path) -> None:
    for pattern in ("mamba", "s4d"):
        assert command("fit", recipe, f"model.backbone.pattern={pattern}")[0] == 0
    run = tmp_path / "runs" / "small" / "1"
    code, out, _ = command("report", str(run))
    assert code == 0
    page = (run / "report.md").read_text()
    assert page in out
    for picture in ("loss", "learning_rate", "throughput", "gradient_norm"):
        assert f"({picture}.png)" in page
        assert (run / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['parameters']:,} parameters, 2 steps" in page
    assert f"{summary['val']['perplexity']:.4g}" in page
    assert "Waiting for data took" in page

    # of several, what differs is a column
    code, _, _ = command("report", str(run), str(run.with_name("2")), "--output", "pages/both.md")
    assert code == 0
    page = (tmp_path / "pages" / "both.md").read_text()
    assert "| pattern | seeds |" in page
    assert "| s4d | 1 |" in page
    [picture] = (tmp_path / "pages").glob("both-small-*.png")
    assert f"({picture.name})" in page
    (run / "summary.json").unlink()
    code, _, err = command("report", str(run), str(run.with_name("2")))
    assert code == 2
    assert "is not finished" in err
    (run / "env.json").unlink()
    code, _, err = command("report", str(run))
    assert code == 2
    assert "its env.json is gone" in err


def row(recipe: str, seed: int, accuracy: float, **over: object) -> results.Row:
    return {
        "recipe": recipe, "over": over, "overrides": [], "seed": seed, "val": {"accuracy": accuracy},
        "steps": 10, "seconds": 30, "tokens_per_second": 5, "parameters": 7, "command": "mambazoo sweep x",
        "commit": "0123456789", "hardware": ["one"],
    }  # fmt: skip


def test_means_and_spreads_stand_beside_published_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        {
            "experiment": "x",
            "model": "A",
            "metric": "accuracy",
            "value": 0.75,
            "source": "t1",
            "over": {"p": "a"},
        },
        {"experiment": "x", "model": "B", "metric": "accuracy", "value": 0.25, "source": "t2"},
    ]
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published.json")
    results.PUBLISHED.write_text(json.dumps(entries))
    rows = [
        row("x", 0, 0.1, p="a"),
        row("x", 0, 0.5, p="a"),
        row("x", 1, 0.7, p="a"),
        row("x", 0, 0.3, p="b"),
    ]
    text = results.page([tmp_path / "some.jsonl"], rows, tmp_path / "page.md")
    table = [line for line in text.splitlines() if line.startswith("|")]
    # the cell that ran twice counts once, by its later line
    assert table[2].startswith("| a | 2 | 0.6 ± 0.14 | 7 | 10 | 30 | 5 |")
    assert table[3].startswith("| *published: A (t1)* |  | 0.75 |")
    assert table[4].startswith("| b | 1 | 0.3 |")
    assert table[5].startswith("| *published: B (t2)* |  | 0.25 |")
    assert "`mambazoo sweep x` at commit 0123456 on one. Seeds 0, 1; 1.5 minutes" in text
    [picture] = tmp_path.glob("page-x-*.png")
    assert f"({picture.name})" in text
    # runs of which it is not known how long they took
    untimed = [{**line, "seconds": None} for line in rows]
    assert "minutes" not in results.page([tmp_path / "some.jsonl"], untimed, tmp_path / "page.md")
    # one cell is a line of the table, and no picture
    assert "![" not in results.page([tmp_path / "some.jsonl"], rows[:3], tmp_path / "one.md")


def test_of_several_published_tables_the_one_that_varies_the_same_is_shown() -> None:
    n, chosen = "model.backbone.mamba.d_state", "model.backbone.mamba.selective"

    def claims(*cells: dict[str, object]) -> list[list[float]]:
        """The published values below each cell of a sweep of the ablations, those of no cell last."""
        rows = [row("language/ablations", 0, 0.5, **cell) for cell in cells]
        [experiment] = results.experiments(rows)
        below: list[list[float]] = [[]]
        for line in results.table(experiment).splitlines()[2:]:
            first, *_, perplexity, _, _, _, _ = [part.strip() for part in line.strip("|").split("|")]
            if first.startswith("*published"):
                below[-1].append(float(perplexity))
            else:
                below.append([])
        return below[1:]

    assert claims({n: 1}, {n: 16}) == [[9.73], [8.71, 9.4, 9.09, 8.84]]
    assert claims({n: 1, chosen: ["delta"]}, {n: 16, chosen: ["delta", "B", "C"]}) == [
        [9.88],
        [8.71, 10.93, 9.81, 9.73, 9.4, 9.09, 8.84],
    ]
    assert claims({chosen: []}, {chosen: ["delta", "B", "C"]})[0] == [10.93]
    complex_, real = {"pattern": "s4d"}, {"pattern": "s4d", "s4d": {"a_init": "s4d-real"}}
    assert claims({"model.backbone": complex_}, {"model.backbone": real}) == [[10.54], [10.56, 8.69]]
    # what nobody varied stands beside all there is
    assert len(claims({"model.optimizer.lr": 1e-3})[0]) > 25


def test_what_is_measured_over_length_has_a_table_of_its_own(tmp_path: Path) -> None:
    rows = [row("y", seed, 0.5, p="a") for seed in (0, 1)]
    for one in rows:
        one["test"] = {f"accuracy_{2**k}": 1 / k + one["seed"] / 10 for k in (6, 8, 10)}
    text = results.page([tmp_path / "some.jsonl"], rows, tmp_path / "page.md")
    own = text.partition("`test/accuracy` by length:\n\n")[2].splitlines()
    assert own[0] == "| p | seeds | 64 | 256 | 1,024 |"
    assert own[2] == "| a | 2 | 0.2167 ± 0.071 | 0.175 ± 0.071 | 0.15 ± 0.071 |"
    assert "| p | seeds | accuracy | parameters | steps | seconds | tokens/second |" in text


def test_lines_are_whole_or_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row("x", 0, 1.0)) + '\n{"half')
    results.append(path, row("x", 1, 1.0))
    assert [line["seed"] for line in results.read(path)] == [0, 1]
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"results.jsonl:1: is no line that"):
        results.read(path)


def test_published_numbers_name_what_they_are_of() -> None:
    entries = json.loads(results.PUBLISHED.read_text())
    assert entries
    for entry in entries:
        assert {"experiment", "model", "metric", "value", "source"} <= entry.keys() <= {
            "experiment", "model", "metric", "value", "source", "over",
        }  # fmt: skip


def test_the_results_in_the_documents_are_those_of_the_benchmarks(tmp_path: Path) -> None:
    files = sorted((ROOT / "benchmarks").glob("*.jsonl"))
    rows = [line for file in files for line in results.read(file)]
    committed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert committed == results.page(files, rows, tmp_path / "results.md"), (
        "mambazoo report benchmarks/*.jsonl --output docs/results.md"
    )
    for picture in tmp_path.glob("*.png"):
        assert (ROOT / "docs" / picture.name).exists()
    # published values are seen, though few pixels have their colour
    red = [picture for picture in tmp_path.glob("*-language-ablations-*.png") if _reddest(picture) > 100]
    assert len(red) == 3


def _reddest(picture: Path) -> int:
    red, green, blue = np.moveaxis(np.asarray(Image.open(picture).convert("RGB"), dtype=int), -1, 0)
    return int((red - np.maximum(green, blue)).max())


def test_the_verbs_start_without_torch() -> None:
    code = "import sys; from mambazoo.recipes import sweep, report, results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
