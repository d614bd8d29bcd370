"""Recipes as files, and the command that runs them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mambazoo.checkpoints.io import save_pretrained
from mambazoo.datamodules.alphabet import COMPLEMENT, SIZE
from mambazoo.datamodules.waveform import Waveform
from mambazoo.recipes import device, results
from mambazoo.recipes.cli import main
from mambazoo.recipes.find import ROOT, Recipe, compose, find, packaged
from mambazoo.zoo.audio import WaveformModel
from mambazoo.zoo.genomics import GenomeModel
from mambazoo.zoo.language import LanguageModel
from mambazoo.zoo.synthetic import SyntheticTask

from .command import Command

TINY = Path(__file__).resolve().parents[1] / "tiny.yaml"
RECIPES = [recipe for recipe in packaged() if recipe.runs]
FRAGMENTS = [recipe for recipe in packaged() if not recipe.runs]
Small = dict[str, dict[str, Any]]


def verb(recipe: Recipe) -> str:
    """What starts a recipe, as its head says."""
    return recipe.head[1].split()[1]


def given(recipe: Recipe, small: Small) -> list[str]:
    """What has to be said of a recipe to run it on something small."""
    domain = recipe.name.split("/")[0]
    # lra/text-s4d reads what lra/text does
    values = small[domain] | small.get(recipe.name.split("-s4d")[0].split("-b2s6")[0], {})
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in values.items()]
    if verb(recipe) == "finetune":
        overrides.append(f"model.pretrained={small['models'][domain]}")
    return overrides


def tiny(name: str, folder: Path) -> Path:
    """A recipe that extends a packaged one and makes it small."""
    values = yaml.safe_load(TINY.read_text())
    path = folder / f"{name.replace('/', '-')}.yaml"
    path.write_text(yaml.safe_dump({"extends": name, **values}))
    return path


@pytest.fixture
def small(
    texts: Path, genome: Path, labelled: Path, sounds: Path, reviews: Path, cifar: Path, tmp_path: Path
) -> Small:
    """Something small of every domain to train on, what single recipes need instead, and models to start from."""
    other = tmp_path / "other.fa"
    other.write_bytes(genome.read_bytes().replace(b"A", b"G"))
    size = {"d_model": 16, "n_layers": 2}
    save_pretrained(LanguageModel(size, 257), {"kind": "bytes"}, tmp_path / "language")
    save_pretrained(GenomeModel(size, SIZE, COMPLEMENT), {"kind": "nucleotides"}, tmp_path / "genomics")
    save_pretrained(WaveformModel(size), Waveform("mu-law", 8000).to_dict(), tmp_path / "audio")
    return {
        "audio": {"paths": str(sounds)},
        "language": {"paths": str(texts)},
        "genomics": {"paths": str(genome)},
        "genomics/pretrain": {"length_warmup": [64]},
        "genomics/pretrain-human": {"valid": ["chr0"], "test": ["chr1"], "length_warmup": [64]},
        "genomics/classify": {"paths": str(labelled)},
        "genomics/finetune": {"paths": str(labelled)},
        "genomics/species": {"paths": [str(genome), str(other)]},
        "lra": {},
        "lra/listops": {"shortest": 5, "rows": 40, "held_out_rows": 10},
        "lra/text": {"path": str(reviews)},
        "lra/image": {"folder": str(cifar), "length": 64},
        "lra/pathfinder": {"length": 256, "dashes": 4, "distractors": 1, "rows": 40, "held_out_rows": 10},
        "synthetic": {},
        "synthetic/mqar": {"pairs": 4, "vocab_size": 40},
        "synthetic/induction-heads": {"valid_lengths": [32, 48]},
        "models": {name: str(tmp_path / name) for name in ("audio", "language", "genomics")},
    }


def test_recipes_and_fragments_are_found() -> None:
    assert {"language/demo", "language/bytes", "language/pretrain"} <= {recipe.name for recipe in RECIPES}
    extended = set()
    for recipe in packaged():
        parts = yaml.safe_load(recipe.path.read_text()).get("extends", [])
        extended |= {parts} if isinstance(parts, str) else set(parts)
    assert {fragment.name for fragment in FRAGMENTS} <= extended


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_says_what_it_shows_and_how_to_run_it(recipe: Recipe) -> None:
    assert verb(recipe) in ("fit", "finetune")
    assert recipe.head[1].startswith(f"mambazoo {verb(recipe)} {recipe.name}")
    assert len(recipe.head) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.filterwarnings("ignore")
def test_every_recipe_runs_one_batch(recipe: Recipe, mambazoo: Command, tmp_path: Path, small: Small) -> None:
    name = recipe.name
    result = mambazoo(verb(recipe), str(tiny(name, tmp_path)), *given(recipe, small))
    assert result.code == 0, result.err
    run = tmp_path / "runs" / name.replace("/", "-") / "1"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 1
    assert summary["val"]["loss"] > 0
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.yaml",
        "env.json",
        "metrics.csv",
        "summary.json",
        "loss.png",
        "checkpoints",
        "model",
    } <= names
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_every_recipe_passes_its_own_check(mambazoo: Command, small: Small) -> None:
    for recipe in RECIPES:
        result = mambazoo("check", recipe.name, *given(recipe, small))
        assert result.code == 0, result.err
        assert "back end" in result.out


@pytest.mark.filterwarnings("ignore")
def test_baseline_says_what_simple_models_reach(mambazoo: Command, small: Small) -> None:
    for name, unit, count in (("language/demo", "bits per byte", 4), ("genomics/demo", "bits per base", 6)):
        lines = mambazoo(
            "baseline", name, f"data.paths={small[name.split('/')[0]]['paths']}"
        ).out.splitlines()
        assert len(lines) == count
        assert all(line.endswith(unit) and 0 < float(line.split()[0]) < 9 for line in lines)


def test_overrides_come_before_interpolation() -> None:
    demo = find("language/demo")
    assert compose(demo, ["vars.length=77"])["data"]["length"] == 77
    assert (
        compose(demo, ["trainer.default_root_dir=x"])["callbacks"]["checkpoints"]["folder"] == "x/checkpoints"
    )


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("*.txt", "*.txt"),
        ("*", "*"),
        ("[*.txt, more/*.md,*.py]", ["*.txt", "more/*.md", "*.py"]),
        ("*_[0-4].wav", "*_[0-4].wav"),
        ("[*.[ch], b]", ["*.[ch]", "b"]),
        ("[a-z]*.txt", "[a-z]*.txt"),
        (" *a, b.txt", "*a, b.txt"),
        ("*\N{DNA DOUBLE HELIX}.txt", "*\N{DNA DOUBLE HELIX}.txt"),
        ("[a, 'it, *b', *c]", ["a", "it, *b", "*c"]),
        ("['x: *a', *b]", ["x: *a", "*b"]),
        ("[[*a], 7, null, *b]", [["*a"], 7, None, "*b"]),
        ("*.${data.tokenizer}", "*.bytes"),
        ("'*.txt'", "*.txt"),
        ("'[*.txt]'", "[*.txt]"),
        ("a*b", "a*b"),
        (r"[0-9]_([a-z]+)_", r"[0-9]_([a-z]+)_"),
    ],
)
def test_a_glob_is_text(given: str, value: object) -> None:
    assert compose(find("language/bytes"), [f"data.paths={given}"])["data"]["paths"] == value


@pytest.mark.parametrize("given", ["'*a", "@x", "%x", "[*a, @b]", "{a: *b}"])
def test_what_is_neither_yaml_nor_a_glob_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"data\.paths: .* cannot be set here"):
        compose(find("language/bytes"), [f"data.paths={given}"])


def test_measured_commands_give_the_models_that_were_measured() -> None:
    rows = results.read(ROOT.parent / "benchmarks" / "synthetic_h100_202611.jsonl")
    rows = [row for row in rows if row["recipe"] == "synthetic/mqar"]
    assert {row["over"]["model.backbone.pattern"] for row in rows} == {"attention", "mamba", "s4d"}
    for row in rows:
        config = compose(find(row["recipe"]), [f"{key}={value}" for key, value in row["over"].items()])
        arguments = {key: value for key, value in config["model"].items() if key != "class_path"}
        with torch.device("meta"):
            model = SyntheticTask(**arguments, vocab_size=config["data"]["vocab_size"])
        assert sum(p.numel() for p in model.parameters()) == row["parameters"]


def test_a_size_replaces_the_numbers_it_stands_for(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("model: {backbone: {d_model: 118, n_layers: 4, norm_eps: 1.0e-6}}\n")
    (tmp_path / "large.yaml").write_text("extends: small.yaml\nmodel: {backbone: {size: mamba-7m}}\n")

    def backbone(path: Path, *overrides: str) -> Any:
        return compose(Recipe("a", path), list(overrides))["model"]["backbone"]

    large = {"size": "mamba-7m", "norm_eps": 1e-6}
    assert backbone(path, "model.backbone.size=mamba-7m") == backbone(tmp_path / "large.yaml") == large
    override = ("model.backbone.n_layers=3", "model.backbone.size=mamba-7m")
    assert backbone(path, *override) == {**large, "n_layers": 3}


def test_a_recipe_extends_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: language/demo\nvars: {length: 5}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\ndata: {batch_size: 3}\n")
    config = compose(find(str(tmp_path / "own.yaml")), [])
    assert (config["data"]["length"], config["data"]["batch_size"]) == (5, 3)
    assert "vars" not in config
    assert "extends" not in config


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        (
            {"a.yaml": "extends: b.yaml", "b.yaml": "extends: a.yaml"},
            [],
            "extends itself: a.yaml -> b.yaml -> a.yaml",
        ),
        ({"a.yaml": "extends: nothing.yaml"}, [], "a.yaml extends .*nothing.yaml, which does not exist"),
        ({"a.yaml": "x: [1"}, [], r"cannot be read as YAML: .*, line 1, column"),
        ({"a.yaml": "5"}, [], "cannot be read as YAML"),
        ({"a.yaml": "extends: [5]"}, [], r"a.yaml, extends: must be a name or a list of names, not \[5\]"),
        ({"a.yaml": "model: 5"}, [], "a.yaml, model: must be a section of keys, not 5"),
        ({"a.yaml": "extends: language/demo\ndata: []"}, [], r"data: must be a section of keys, not \[\]"),
        ({"a.yaml": "x: 1"}, ["trainer=x"], "trainer: must be a section of keys, not x"),
        ({"a.yaml": "- 1"}, [], "must hold sections"),
        ({"a.yaml": "x: ${y.z}"}, [], "x: Interpolation key 'y.z' not found"),
        ({"a.yaml": "x: {y: '???'}"}, [], "x.y: must be given"),
        ({"a.yaml": "x: 1"}, ["x"], "'x' is not key=value"),
        ({"a.yaml": "x: 1"}, ["x=[1"], r"x: '\[1' cannot be set"),
        ({"a.yaml": "vars: {length: 1}"}, ["vars.lenght=5"], "no such key, did you mean 'length'?"),
        ({"a.yaml": "x: 1"}, ["vars.length=5"], "vars.length: there is no such key"),
    ],
)
def test_recipes_that_cannot_be_composed_are_explained(
    tmp_path: Path, files: dict[str, str], overrides: list[str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        compose(find(str(tmp_path / "a.yaml")), overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "language/dmo"], "did you mean 'language/demo'?"),
        (
            ["fit", "language/demo", "model.backbone.d_modle=3"],
            "model.backbone.d_modle: there is no such key, did you mean 'd_model'?",
        ),
        (
            ["fit", "language/demo", "data.lenght=3"],
            "data.lenght: there is no such key, did you mean 'length'?",
        ),
        (["fit", "language/demo", "data.length=foo"], "data.length: must be a whole number, not 'foo'"),
        (
            ["fit", "language/demo", "trainer.max_step=3"],
            "trainer.max_step: there is no such key, did you mean 'max_steps'?",
        ),
        (["fit", "language/demo", "trainer.max_steps=0"], "trainer.max_steps: must be given and above 0"),
        (
            ["fit", "language/demo", "callbacks.checkpoints.mood=3"],
            "callbacks.checkpoints.mood: there is no such key, did you mean 'mode'?",
        ),
        (
            ["fit", "language/demo", "model.optimizer.lr=fast"],
            "model.optimizer.lr: must be a number, not 'fast'",
        ),
        (
            ["fit", "language/demo", "model.class_path=mambazoo.zoo.language.LangModel"],
            "did you mean 'LanguageModel'?",
        ),
        (["fit", "language/demo", "modle.x=3"], "modle: there is no such section, did you mean 'model'?"),
        (
            ["fit", "language/demo", "data.paths=/nowhere"],
            "data.paths: there is no file, folder or match for /nowhere",
        ),
        (
            ["fit", "language/demo", "trainer.max_steps=${nothing}"],
            "trainer.max_steps: Interpolation key 'nothing' not found",
        ),
        (
            ["fit", "language/demo", "trainer.default_root_dir=/proc/x"],
            "/proc/x/language/demo cannot be written",
        ),
        (["fit", "language/demo", "trainer.devices=0"], "trainer: `Trainer(devices=0)` value is not a valid"),
        (["fit", "language/demo", "trainer.strategy=foo"], "trainer: You selected an invalid strategy name"),
        (
            ["check", "language/demo", "trainer.accelerator=foo"],
            "trainer: You selected an invalid accelerator",
        ),
        (
            ["fit", "language/demo", "model.class_path=torch.nn.Linear"],
            "class_path: Cannot add arguments from",
        ),
        (["fit", "language/demo", "seed_everything=-5"], "seed_everything: -5 is not in bounds"),
        (
            ["fit", "language/demo", "trainer.gradient_clip_val=-1"],
            "trainer.gradient_clip_val: must be 0 or more",
        ),
        (["fit", "language/demo", "trainer.accumulate_grad_batches=0"], "must be 1 or more, not 0"),
        (["fit", "language/demo", "data.num_workers=-1"], "data.num_workers: must be 0 or more, not -1"),
        (
            ["fit", "language/demo", "model.optimizer.betas=[2,3]"],
            "optimizer.betas: must be from 0 to below 1",
        ),
        (
            ["fit", "language/demo", "model.optimizer.warmup_steps=-1"],
            "optimizer.warmup_steps: must be 0 or more",
        ),
        (
            ["fit", "language/demo", "data.valid_paths=nowhere"],
            "data.valid_paths: there is no file, folder or match for nowhere",
        ),
        (["fit", "language/pretrain"], "data.paths: must be given"),
        (["resume", "runs/none"], "runs/none is no run folder"),
        (["generate", "runs/none"], "there is no checkpoint, model folder or run runs/none"),
        (["generate", "x", "--top-p", "7"], "top_p cannot be 7"),
        (["cp", "language/nothing"], "no recipe, file or run folder"),
        (["bench", "nothing"], "there is no suite 'nothing'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_mistake_costs_a_line_and_code_2(
    mambazoo: Command, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = mambazoo(*arguments)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) <= 2
    assert "Traceback" not in result.err
    # nothing half-made stays
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_there_and_not_what_it_is_taken_for_is_said(mambazoo: Command) -> None:
    Path("file.txt").touch()
    for run, text in (("run", "name: x"), ("runs/language/demo/3", "name: language/demo"), ("bad", "x: [")):
        Path(run).mkdir(parents=True)
        Path(run, "recipe.yaml").write_text(text)
    for arguments, message in (
        (["show", "file.txt"], "file.txt is no recipe: give a .yaml file, a run folder, or a name"),
        (["fit", "runs/language"], "runs/language is no recipe"),
        (["cp", "language/demo", "other.txt"], "other.txt must end in .yaml or .yml"),
        (["cp", "language/demo", "file.txt/a.yaml"], "file.txt/a.yaml cannot be written"),
        (["ls", "nothing"], "no recipe and no model has 'nothing' in its name"),
        (["show", "bad"], "bad/recipe.yaml cannot be read as YAML"),
        (["resume", "bad"], "bad/checkpoints holds no whole checkpoint"),
        (["info", "language/demo"], "did you mean runs/language/demo?"),
        (["report", "file.txt"], "file.txt: there is no whole line of a result in it"),
        (["report", "run", "--output", "file.txt/a.md"], "--output: file.txt cannot be made"),
        (["bench", "--output", "file.txt/a"], "--output: file.txt/a cannot be written"),
        (["bench", "--repeats", "0"], "--repeats: must be 1 or more, not 0"),
        (["fit"], "the following arguments are required: recipe\n"),
    ):
        result = mambazoo(*arguments)
        assert (result.code, message in result.err) == (2, True), result.err
        assert "Traceback" not in result.err
    # of runs/<recipe> the newest
    assert mambazoo("show", "runs/language/demo").out == "name: language/demo\n"


def test_what_the_system_says_of_a_file_is_passed_on(
    mambazoo: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("some text " * 100)
    Path("some.txt").write_text("some text " * 100)
    Path("some.fa").write_text(">x\n" + "ACGT" * 100)
    monkeypatch.setenv("MAMBAZOO_CACHE", "file")
    for arguments, message in (
        (["fit", "language/demo", "data.paths=some.txt"], "file/"),
        (["fit", "genomics/demo", "data.paths=some.fa"], "file/"),
        (["sweep", "language/demo", "trainer.default_root_dir=file"], "file/language/demo/sweep-"),
    ):
        result = mambazoo(*arguments)
        assert result.code == 2
        assert result.err.startswith(f"mambazoo: {message}")
        assert result.err.endswith(": Not a directory\n")


def test_check_finds_everything_at_once(mambazoo: Command) -> None:
    result = mambazoo(
        "check", "language/demo", "model.x=1", "data.paths=/nowhere", "trainer.max_step=1", "data.batch_size=x",
        "callbacks.progress.y=2", "model.backbone.d_model=a", "foo=1",
    )  # fmt: skip
    assert result.code == 2
    assert {line.split(": ")[1] for line in result.err.splitlines()} == {
        "model.x", "data.paths", "trainer.max_step", "data.batch_size", "callbacks.progress.y",
        "model.backbone.d_model", "foo",
    }  # fmt: skip


def test_check_finds_values_that_make_no_sense_in_every_section(mambazoo: Command) -> None:
    result = mambazoo(
        "check", "language/demo", "model.backbone.n_layers=0", "model.backbone.d_model=-1",
        "model.backbone.mamba.d_state=-3", "model.optimizer.lr=-1", "data.num_workers=-1", "data.length=0",
        "callbacks.average.decay=4", "callbacks.compile.mode=graph",
    )  # fmt: skip
    assert result.code == 2
    assert {line.split(": ")[1] for line in result.err.splitlines()} == {
        "model.backbone.n_layers", "model.backbone.d_model", "model.backbone.mamba.d_state", "model.optimizer.lr",
        "data.num_workers", "data.length", "callbacks.average.decay", "callbacks.compile.mode",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            ["language/demo", "trainer.accumulate_grad_batches=0", "data.lenght=5", "data.batch_size=-1"],
            ["trainer.accumulate_grad_batches", "data.lenght", "data.batch_size"],
        ),
        (
            ["language/demo", "trainer.gradient_clip_algorithm=loud", "data.length=0"],
            ["data.length", "trainer"],
        ),
        (
            ["language/demo", "trainer.accumulate_grad_batches=0", "data.paths=[1]"],
            ["trainer.accumulate_grad_batches", "data.paths"],
        ),
        # keys of what is wrong are no mistakes, nor is what it would be otherwise
        (["audio/demo", "data.length=0", "data.valid=0.3", "data.test=0.95"], ["data.length", "data.valid"]),
        (
            ["language/finetune", "model.pretrained=/nope", "data.length=0", "data.paths=/nope"],
            ["model.pretrained", "data.length", "data.paths"],
        ),
        (
            ["audio/demo", "model.backbone.pool=[0,3]", "model.backbone.dropout=-1"],
            ["model.backbone.dropout", "model.backbone.pool"],
        ),
    ],
)
def test_check_looks_behind_what_is_wrong(mambazoo: Command, given: list[str], named: list[str]) -> None:
    result = mambazoo("check", *given)
    assert (result.code, [line.split(": ")[1] for line in result.err.splitlines()]) == (2, named), result.err


def test_an_interrupt_among_imports_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time\n    time.sleep(0)\n"
        "except KeyboardInterrupt:\n    raise ImportError\n"
    )
    path = os.pathsep.join(
        filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"), str(ROOT.parent / ".path")))
    )
    command = [sys.executable, "-m", "mambazoo", "fit", "language/demo", "data.paths=/nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_ls_show_and_cp_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mambazoo.recipes.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    for arguments in (
        ["ls", "demo"],
        ["show", "language/demo", "vars.length=9"],
        ["cp", "language/demo", "my.yaml"],
    ):
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "my.yaml").read_text() == (ROOT / "language" / "demo.yaml").read_text()


def test_show_prints_what_would_run(mambazoo: Command) -> None:
    shown = yaml.safe_load(mambazoo("show", "language/demo", "vars.length=9", "trainer.devices=4").out)
    assert (shown["data"]["length"], shown["trainer"]["devices"]) == (9, 4)


def test_ls_filters(mambazoo: Command) -> None:
    names = [line.split()[0] for line in mambazoo("ls", "pretrain").out.splitlines()]
    assert "language/pretrain" in names
    assert all("pretrain" in name for name in names)
    assert mambazoo("ls", "nothing").out == ""


def test_a_copy_replaces_nothing(mambazoo: Command, tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("mine")
    assert mambazoo("cp", "language/demo").code == 2
    assert (tmp_path / "demo.yaml").read_text() == "mine"


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import mambazoo.recipes.find as module

    def broken(*_: object) -> None:
        json.loads("{")

    monkeypatch.setattr(module, "compose", broken)
    with pytest.raises(json.JSONDecodeError):
        main(["show", "language/demo"])


def test_bench_refuses_to_time_a_scan_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambazoo.kernels import scan_torch
    from mambazoo.recipes import bench

    bench._verify("cpu")
    right = scan_torch.scan_bwd
    monkeypatch.setattr(
        scan_torch, "scan_bwd", lambda *a: tuple(g if g is None else g * 1.01 for g in right(*a))
    )
    with pytest.raises(ValueError, match=r"u differs from the reference by 1\.0e-02; nothing is timed"):
        bench._verify("cpu")


def test_mamba_is_timed_beside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambazoo.recipes import bench, bench_gpu

    small = {"d_model": 16, "n_layers": 1}
    values: dict[str, Any] = {
        "_DEVICE": "cpu", "_VOCAB": 50, "_LAYER": (1, 32, 8), "_LENGTHS": (4, 16), "_PROMPT": 5, "_COUNT": 6,
        "_BATCHES": (1, 2), "milliseconds": lambda call, repeats: bench._median(1, call) * 1e3,
        "_DECODERS": {"mamba-130m": small, "other": {**small, "pattern": "attention"}},
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(bench_gpu, name, value)
    rows = [*bench_gpu.SUITES["attention"](1, False), *bench_gpu.SUITES["decode"](1, False)]
    assert [row["shape"] for row in rows if row["name"] == "sdpa forward + backward"] == [
        "1 x 4 x 32",
        "1 x 16 x 32",
    ]
    by_shape = {(row["name"], row["shape"]): row["value"] for row in rows}
    for row in rows:
        if row["name"] == "other":
            # rates are written with one decimal, the ratio with two
            ratio = by_shape["mamba-130m", row["shape"]] / row["value"]
            assert row["times"] == pytest.approx(ratio, abs=0.0051, rel=0.02)
    table = bench.table(rows)
    assert table.count("the scan is") == 4
    assert table.count("mamba-130m is") == 2


def test_a_model_that_writes_has_its_weights_in_what_it_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel({"d_model": 16, "n_layers": 1}, vocab_size=7)
    assert {p.dtype for p in device.to_write(model, "cpu").parameters()} == {torch.float32}
    monkeypatch.setattr(device, "precision", lambda _: "bfloat16")
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in device.to_write(model, "cpu").named_parameters()}
    assert kinds["weight"] == torch.bfloat16
    # but for the state space
    assert kinds["A_log"] == torch.float32
