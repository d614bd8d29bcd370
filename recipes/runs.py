"""The folder of a run: made before it starts, enough to go on from, closed with a summary and a picture.

runs/<recipe>/<number>/
    recipe.yaml    the recipe, resolved        env.json      versions, commit, command, hardware
    metrics.csv    every logged value          checkpoints/  last.ckpt, previous.ckpt, best.ckpt
    summary.json   the result                  loss.png      the curves
    model/         the best weights, to use   test.json     what `mambazoo test` measured
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..zoo.journal import read_journal
from .find import KEPT, ROOT
from .launchers import first_says

# the processes that a launcher starts find the folder of their run here
_RUN = "MAMBAZOO_RUN"
_PACKAGES = ("torch", "lightning", "triton", "numpy", "omegaconf", "jsonargparse", "tokenizers")


def make_run(root: Path, name: str) -> Path:
    """Make the folder of a new run, root/name/1, 2, ...; processes that the run starts are given the same.

    Raises:
        OSError: when it cannot be written.
    """
    if _RUN in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[_RUN])
    return Path(first_says("run", lambda: str(_make_run(root, name))))


def _make_run(root: Path, name: str) -> Path:
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in parent.iterdir() if path.name.isdigit()), default=0) + 1
        while True:
            try:
                (parent / str(number)).mkdir()
                break
            except FileExistsError:
                number += 1
    except OSError as error:
        raise OSError(
            error.errno,
            f"trainer.default_root_dir: {parent} cannot be written ({error.strerror}); name another folder",
        ) from None
    os.environ[_RUN] = str(parent / str(number))
    return parent / str(number)


def record(run: Path, name: str, config: dict[str, Any]) -> None:
    """Keep what the run is made of: its recipe and its surroundings."""
    kept = {"name": name, **_portable(config, f"{run}/")}
    kept["trainer"]["default_root_dir"] = str(run.parents[name.count("/") + 1])
    (run / "env.json").write_text(json.dumps(environment(), indent=2))
    # last, for it makes the folder a run
    (run / KEPT).write_text(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True), encoding="utf-8")


def surroundings(run: Path) -> dict[str, Any]:
    """What `record` kept of a run's surroundings.

    Raises:
        ValueError: when that is not there.
    """
    try:
        kept: dict[str, Any] = json.loads((run / "env.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{run}: its env.json is gone, without which nobody knows where it ran") from None
    return kept


def environment() -> dict[str, Any]:
    """Versions, git commit, command line and hardware."""
    import torch

    versions: dict[str, str | None] = {"mambazoo": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["mambazoo", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": devices or [f"{_processor()}, {torch.get_num_threads()} threads"],
    }


def origin(command: str | None = None) -> dict[str, Any]:
    """What a number is published with: the command that gave it, if it is not this one, commit, hardware, versions."""
    found = environment()
    kept = {key: found[key] for key in ("commit", "hardware", "versions")}
    return {"command": command or found["command"], **kept}


def summarise(
    run: Path, recipe: str, monitor: str, mode: str, parameters: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Write summary.json from the run's log: the validation at its best, and what it took."""
    series = read_journal(run)
    val = {key.removeprefix("val/"): values for key, values in series.items() if key.startswith("val/")}
    scored = [(value, step) for step, value in series.get(monitor, []) if math.isfinite(value)]
    best = (min(scored) if mode == "min" else max(scored))[1] if scored else None
    summary = {
        "recipe": recipe,
        "val": {key: value for key, values in val.items() for step, value in values if step == best},
        "best_step": best,
        "steps": max((step for step, _ in series.get("train/loss", [])), default=0),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds) if seconds else None,
        "parameters": parameters,
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


# by file: the metrics drawn over the steps, and the name of their axis
PICTURES = {
    "loss": (("train/loss", "val/loss"), "loss (nats)"),
    "learning_rate": (("train/lr",), "learning rate"),
    "throughput": (("train/tokens_per_second",), "tokens a second"),
    "gradient_norm": (("train/gradient_norm",), "gradient norm"),
}


def draw(run: Path, picture: str, folder: Path | None = None) -> Path | None:
    """Draw one of PICTURES from the run's log to a PNG in its folder, or another; None where nothing was logged."""
    from matplotlib.figure import Figure

    keys, unit = PICTURES[picture]
    series = {key: values for key, values in read_journal(run).items() if key in keys}
    if not series:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, points in series.items():
        steps, values = zip(*sorted(points), strict=True)
        if key.startswith("val/"):
            axes.plot(steps, values, "o-", label=key, markersize=3)
        else:
            axes.plot(steps, values, label=key, linewidth=1, alpha=0.7)
    axes.set(xlabel="step", ylabel=unit, title=run.parent.name)
    if picture == "throughput":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path = (folder or run) / f"{picture}.png"
    figure.savefig(path, dpi=120)
    return path


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _portable(value: Any, prefix: str) -> Any:
    """Replace the run's own folder in every value by where it is said, so that a moved folder still reads right."""
    if isinstance(value, dict):
        return {key: _portable(item, prefix) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item, prefix) for item in value]
    if isinstance(value, str) and value.startswith(prefix):
        return "${trainer.default_root_dir}/" + value.removeprefix(prefix)
    return "${trainer.default_root_dir}" if value == prefix.rstrip("/") else value


def _commit() -> str | None:
    """The commit of the source this runs from, with a + when it has changes; None for an installed package."""
    try:
        git = ["git", "-C", str(ROOT.parent), "--no-optional-locks"]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10
        )
        if Path(top.stdout.strip()) != ROOT.parent:
            return None
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")
