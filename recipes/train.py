"""The verbs that run a recipe through the trainer: fit, resume, validate, test, predict, baseline."""

import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ..checkpoints.io import read, save
from ..checkpoints.remote import TOKENIZER
from ..zoo.finetune import FineTuning
from ..zoo.heartbeat import Heartbeat
from ..zoo.journal import read_journal, rewind_journal
from ..zoo.lora import size
from ..zoo.saving import BEST, Checkpoints, make_last, newest_checkpoint, read_checkpoint, write_whole
from ..zoo.stopping import GracefulStop, StoppedError
from ..zoo.throughput import Throughput
from .agreement import as_it_was, must_fit, must_know_classes, refuse_changes
from .find import SECTIONS, TESTED, Recipe, compose, find, latest_run
from .finetune import Start, class_names, save_adapter, takes
from .launch import PRETRAINED, Launch, quiet, reuse_memory
from .launchers import first_says, is_first, starter
from .runs import draw, environment, make_run, record, summarise, surroundings

# how a run is measured: every sample once, and in order
_ALONE = {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
# the callbacks that a run without training needs, and the sections of a recipe that it reads anew
_WATCHING, _MEASURED = ("progress",), ("data", "trainer")
# what Lightning takes less of, and divides by or climbs up with
_LEAST = {
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
}


def fit(name: str, overrides: list[str]) -> int:
    """Train a recipe from its start, in a run folder of its own."""
    recipe = find(name)
    config = compose(recipe, overrides)
    if (config.get("model") or {}).get(PRETRAINED):
        raise ValueError(f"model.{PRETRAINED}: `fit` starts from nothing; write mambazoo finetune {name}")
    return _begin(recipe, overrides, config, None)


def finetune(name: str, overrides: list[str]) -> int:
    """Train a recipe from the weights of the model that it names, in a run folder of its own."""
    recipe = find(name)
    config = compose(recipe, overrides)
    return _begin(recipe, overrides, config, Start(config))


def _begin(recipe: Recipe, overrides: list[str], config: dict[str, Any], start: Start | None) -> int:
    run = make_run(Path(config.get("trainer", {}).get("default_root_dir") or "runs"), recipe.name)
    try:
        config = compose(recipe, [*overrides, f"trainer.default_root_dir={run}"])
        if start is not None:
            config = start.complete(config, run)
        launch = _ready(config, start)
    except BaseException:
        # nothing has happened yet that would be worth a folder
        if _starts_others():
            shutil.rmtree(run, ignore_errors=True)
        raise
    if launch.trainer.is_global_zero:
        record(run, recipe.name, config)
        _keep_tokenizer(launch, run)
    return _train(launch, config, run, recipe.name)


def _keep_tokenizer(launch: Launch, run: Path) -> None:
    vocabulary = launch.datamodule.vocabulary
    if vocabulary and "json" in vocabulary:
        (run / TOKENIZER).write_text(vocabulary["json"], encoding="utf-8")


def _ready(config: dict[str, Any], start: Start | None) -> Launch:
    """The objects of a recipe with their data read and, of a pretrained model, the weights."""
    launch = launched(config)
    _prepare(launch)
    if start is not None:
        start.hand_over(launch, config, say=_starts_others())
    return launch


def _starts_others() -> bool:
    return "LOCAL_RANK" not in os.environ


def launched(config: dict[str, Any]) -> Launch:
    """The objects of a recipe; what Lightning objects to in its values is as wrong as what we do.

    Raises:
        ValueError: as `Launch` says.
    """
    for name, least in _LEAST.items():
        value = (config.get("trainer") or {}).get(name)
        if isinstance(value, int | float) and value < least:
            raise ValueError(f"trainer.{name}: must be {least} or more, not {value}")
    try:
        launch = Launch(config)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "lightning" not in Path(last.filename).parts:
            raise
        of = {"seed": "seed_everything", "cli": "class_path"}
        key = of.get(Path(last.filename).stem, "trainer")
        raise ValueError(f"{key}: {str(error).splitlines()[0]}") from error
    must_know_classes(launch)
    return launch


def resume(name: str, overrides: list[str]) -> int:
    """Go on with a run from its newest checkpoint, exactly as if it had never stopped; before its first one, anew."""
    run = latest_run(Path(name))
    if _has_only_begun(run):
        return _begin_again(run, overrides)
    path, problems = newest_checkpoint(run / "checkpoints")
    for problem in problems:
        print(f"passed over: {problem}", file=sys.stderr)
    recipe = find(str(run))
    place = f"trainer.default_root_dir={run}"
    checkpoint = read_checkpoint(path)
    kept = as_it_was(compose(recipe, [place]), checkpoint)
    refuse_changes(as_it_was(compose(recipe, [*overrides, place]), checkpoint), kept)
    step = checkpoint["global_step"]
    config = as_it_was(compose(recipe, [*overrides, place, *_purged(kept, step)]), checkpoint)
    config.pop("name", None)
    launch = launched(config)
    _prepare(launch)
    must_fit(launch, checkpoint)
    os.environ["MAMBAZOO_RUN"] = str(run)
    if launch.trainer.is_global_zero:
        if problems:
            make_last(path)
        rewind_journal(run, step)
        print(f"resuming {run} after step {step}", flush=True)
    return _train(launch, config, run, recipe.name, path)


def _has_only_begun(run: Path) -> bool:
    """Whether a run has neither ended nor come as far as its first checkpoint, so that there is nothing to lose."""
    ended = (run / "summary.json").exists() or any((run / "checkpoints").glob("*.ckpt"))
    if ended or not (run / "env.json").exists():
        return False
    checkpoints = (compose(find(str(run)), []).get("callbacks") or {}).get("checkpoints")
    steps = [step for values in read_journal(run).values() for step, _ in values]
    return checkpoints is not None and max(steps, default=0) <= checkpoints["every_n_steps"]


def _begin_again(run: Path, overrides: list[str]) -> int:
    recipe = find(str(run))
    place = f"trainer.default_root_dir={run}"
    kept = compose(recipe, [place])
    refuse_changes(compose(recipe, [*overrides, place]), kept)
    config = compose(recipe, [*overrides, place, *_purged(kept, 0)])
    config.pop("name", None)
    launch = _ready(config, Start(config) if config["model"].get(PRETRAINED) else None)
    os.environ["MAMBAZOO_RUN"] = str(run)
    if launch.trainer.is_global_zero:
        _keep_tokenizer(launch, run)
        rewind_journal(run, 0)
        print(f"{run} has no checkpoint yet: it starts anew", flush=True)
    return _train(launch, config, run, recipe.name)


def _purged(config: dict[str, Any], step: int) -> list[str]:
    """What has TensorBoard forget what was logged from a step on."""
    watched = (config.get("loggers") or {}).get("tensorboard")
    return [f"loggers.tensorboard.purge_step={step}"] if watched else []


def validate(name: str, overrides: list[str]) -> int:
    """Measure a run's best checkpoint on the validation split."""
    launch, path = reopen(name, overrides)
    with quiet():
        results = launch.trainer.validate(
            launch.model, launch.datamodule, ckpt_path=path, weights_only=True, verbose=False
        )
    if not results:
        raise ValueError("trainer.limit_val_batches: leaves nothing to measure")
    print(json.dumps(results[0], indent=2))
    return 0


def test(name: str, overrides: list[str]) -> int:
    """Measure a run's best checkpoint on the test split, or the validation split where there is none.

    The result is kept beside the run, in test.json.
    """
    launch, path = reopen(name, overrides)
    with quiet():
        results = launch.trainer.test(
            launch.model, launch.datamodule, ckpt_path=path, weights_only=True, verbose=False
        )
    if not results:
        raise ValueError("trainer.limit_test_batches: leaves nothing to measure")
    measured = {name.removeprefix("test/"): value for name, value in results[0].items()}
    kept = json.dumps(measured, indent=2).encode()
    write_whole(Path(str(launch.trainer.default_root_dir)) / TESTED, lambda file: file.write(kept))
    print(json.dumps(results[0], indent=2))
    return 0


def predict(name: str, overrides: list[str]) -> int:
    """Write what a run's best checkpoint says of each held-out sequence, or unlabelled one, a JSON object a line."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in _ALONE:
            raise ValueError(
                f"{key}: predictions are written by one process, in the order of the data; leave it out"
            )
    launch, path = reopen(name, overrides, unlabelled=True)
    with quiet():
        batches = launch.trainer.predict(launch.model, launch.datamodule, ckpt_path=path, weights_only=True)
    found = [row for rows in batches or [] for row in rows]
    if names := launch.datamodule.names():
        # fewer are read where trainer.limit_predict_batches says so
        found = [{"name": name, **row} for name, row in zip(names[: len(found)], found, strict=True)]
    lines = [json.dumps(row) for row in found]
    output = Path(str(launch.trainer.default_root_dir)) / "predictions.jsonl"
    write_whole(output, lambda file: file.write("\n".join([*lines, ""]).encode()))
    print(f"{len(lines)} predictions in {output}")
    return 0


def baseline(name: str, overrides: list[str]) -> int:
    """Print what simple models reach on a recipe's own data, as they are computed."""
    recipe = find(name)
    config = compose(recipe, overrides)
    config.pop("name", None)
    with tempfile.TemporaryDirectory() as folder:
        # its data may be as the model that it starts from wants them; those of a run are so already
        if (config.get("model") or {}).get(PRETRAINED) and not Path(name).is_dir():
            config = Start(config).complete(config, Path(folder))
        launch = launched(config)
        _prepare(launch)
        found = False
        for what, value in launch.datamodule.baselines():
            found = True
            print(f"{value:8.4f}  {what}", flush=True)
    if not found:
        raise ValueError(f"{recipe.name}: nothing simple is known to compare with on this data")
    return 0


def _prepare(launch: Launch, *, unlabelled: bool = False) -> None:
    """Read the data before anything else: what is wrong with it is said before a run exists."""
    if is_first():
        logging.getLogger("mambazoo").setLevel(logging.INFO)
    data = launch.datamodule
    first_says("prepared", lambda: str(data.prepare_data()))
    # on another machine there is another cache
    data.prepare_data()
    data.setup("fit")
    if not unlabelled and "train" not in data.samples:
        raise ValueError(
            "data.labels: null leaves nothing to learn or measure; give folder, an expression or a table"
        )


def _train(
    launch: Launch, config: dict[str, Any], run: Path, name: str, checkpoint: Path | None = None
) -> int:
    trainer = launch.trainer
    if trainer.strategy.root_device.type == "cpu":
        reuse_memory()
    if heartbeat := launch.callback(Heartbeat):
        heartbeat.starter = starter()
    stopping = launch.callback(GracefulStop)
    checkpoints = launch.callback(Checkpoints)
    with quiet():
        try:
            trainer.fit(launch.model, launch.datamodule, ckpt_path=checkpoint, weights_only=True)
            if checkpoints and checkpoints.owed and not (stopping and stopping.received):
                # the run was killed in its last validation
                trainer.validate(launch.model, launch.datamodule, verbose=False)
        except StoppedError:
            pass
    if stopping and stopping.received:
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}; go on with\n  mambazoo resume {run}")
            return 128 + stopping.received
        # the first rank's code is the run's; a launcher that sees another end with an error kills it
        return 0
    if trainer.is_global_zero:
        _finish(launch, config, run, name)
    return 0


def _finish(launch: Launch, config: dict[str, Any], run: Path, name: str) -> None:
    """Leave the result in the run folder and say where everything is."""
    checkpoints = launch.callback(Checkpoints)
    throughput = launch.callback(Throughput)
    summary = summarise(
        run,
        name,
        checkpoints.monitor if checkpoints else "val/loss",
        checkpoints.mode if checkpoints else "min",
        size(launch.model),
        throughput.tokens if throughput else 0,
        throughput.seconds if throughput else 0.0,
    )
    plot = draw(run, "loss")
    best = run / "checkpoints" / BEST
    finetuning, adapter = launch.callback(FineTuning), ""
    if best.exists():
        extra = {file: (run / file).read_text(encoding="utf-8") for file in ("recipe.yaml",)}
        extra["metrics.json"] = json.dumps(summary, indent=2)
        extra["README.md"] = _card(name, run, summary)
        save(read(best), run / "model", extra)
        if finetuning is not None and finetuning.mode == "lora":
            written = save_adapter(launch, config, best, run / "adapter")
            adapter = f"\n  adapter      {run / 'adapter'}, {written / 1024:,.0f} KB"
    scores = "  ".join(f"{key} {value:.4f}" for key, value in sorted(summary["val"].items()))
    print(
        f"\n{name}: {scores or 'no validation'}  at step {summary['best_step']} of {summary['steps']}\n"
        f"  {summary['parameters']:,} parameters, {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_second'] or 0:,} tokens a second\n"
        f"  model        {run / 'model'}{adapter}\n"
        f"  checkpoints  {run / 'checkpoints'}\n"
        f"  log          {run / 'metrics.csv'}\n"
        f"  loss plot    {plot or 'none, nothing was logged'}",
        flush=True,
    )


def _card(name: str, run: Path, summary: dict[str, Any]) -> str:
    """The README of a model folder."""
    try:
        env = surroundings(run)
    except ValueError:
        # what it started in is lost, and no reason to lose its end
        env = environment()
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in sorted(summary["val"].items()))
    where = f"at commit {env['commit'] or 'unknown'} on {', '.join(env['hardware'])}"
    return (
        f"# {name}\n\nTrained by `{env['command']}` {where}: {summary['parameters']:,} parameters, "
        f"{summary['steps']} steps, {summary['seconds']:.0f} s. `recipe.yaml` holds every value.\n\n"
        f"| validation | at step {summary['best_step']} |\n|---|---|\n{rows}\n"
    )


def reopen(name: str, overrides: list[str], *, unlabelled: bool = False) -> tuple[Launch, Path]:
    """A run, built again to look at its best checkpoint, or at the .ckpt file of it that `name` is.

    Data that may be unlabelled, and is, has the run's classes.

    Raises:
        ValueError: when it is no run, or of another model, or its data are not what can be measured.
    """
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        watches = section == "callbacks" and key.partition(".")[0] in _WATCHING
        if section in SECTIONS and section not in _MEASURED and not watches:
            raise ValueError(
                f"{section}.{key}: means nothing to a run that is only measured; it takes data.* and trainer.*"
            )
    path = Path(name)
    run = path.parent.parent if path.suffix == ".ckpt" else latest_run(path)
    if path.suffix != ".ckpt":
        best = run / "checkpoints" / BEST
        path = best if best.exists() else newest_checkpoint(run / "checkpoints")[0]
    checkpoint = read_checkpoint(path)
    # one process sees every sample once, and in order
    alone = [f"{key}={value}" for key, value in _ALONE.items()]
    config = compose(find(str(run)), [f"trainer.default_root_dir={run}", *alone, *overrides])
    config = as_it_was(config, checkpoint)
    config.pop("name", None)
    if unlabelled := unlabelled and all(takes(config["data"], key) for key in ("labels", "classes")):
        _name_classes(config["data"], checkpoint)
    if (run / TOKENIZER).is_file() and not any(
        override.startswith("data.tokenizer=") for override in overrides
    ):
        # one that the recipe trained would come out differently on other texts
        config["data"]["tokenizer"] = str(run / TOKENIZER)
    config["loggers"] = {}
    config["callbacks"] = {key: value for key, value in config["callbacks"].items() if key in _WATCHING}
    try:
        launch = launched(config)
    except ValueError as error:
        hint = "\nfor recordings that nobody has labelled write data.labels=null"
        raise ValueError(f"{error}{hint if unlabelled and 'label' in str(error) else ''}") from None
    _prepare(launch, unlabelled=unlabelled)
    must_fit(launch, checkpoint)
    return launch, path


def _name_classes(data: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Give data without labels what a checkpoint's model calls its classes."""
    if data.get("labels") is not None:
        return
    arguments = checkpoint.get("hyper_parameters", {})
    kept = checkpoint.get(str(data["class_path"]).rpartition(".")[2], {})
    data["classes"] = class_names(arguments, kept.get("vocabulary"))
