"""The verb `report`: a page and pictures of one run, or a table and a plot of many."""

import json
import math
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path

import yaml

from . import results
from .find import KEPT, flat

NAME, SUMMARY = "report", "make a page of one run, a table and a plot of several or of a sweep"

PAGE = "report.md"
# what belongs to where and when a run took place, not to what it is
_CIRCUMSTANCES = ("name", "seed_everything", "data.seed", "trainer.default_root_dir")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="+",
        help="run folders, runs/<recipe> for the newest, sweep folders, files of JSON lines",
    )
    parser.add_argument(
        "--output", type=Path, help=f"where the page goes; {PAGE} in the run or sweep by default, else here"
    )


def run(arguments: Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None:
        output = output.expanduser() / PAGE if output.is_dir() else output
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"--output: {output.parent} cannot be made ({error.strerror}); name another"
            ) from None
    files = [path for path in map(_lines, arguments.source) if path]
    runs = [_run(source) for source in arguments.source if not _lines(source)]
    if not files and len(runs) == 1:
        page = write_run(runs[0], output)
        print(page.read_text(encoding="utf-8") + f"\n{page}")
        return 0
    rows = [row for file in files for row in results.read(file)] + compare(runs)
    if not rows:
        raise ValueError(f"{', '.join(map(str, files))}: there is no whole line of a result in it")
    alone = len(files) == 1 and not runs
    page = write_page([*files, *runs], rows, output or (files[0].parent if alone else Path()) / PAGE)
    print(page.read_text(encoding="utf-8") + f"\n{page}")
    return 0


def write_page(sources: list[Path], rows: list[results.Row], output: Path) -> Path:
    """Write the page of many results and its pictures."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(results.page(sources, rows, output), encoding="utf-8")
    return output


def write_run(run: Path, output: Path | None = None) -> Path:
    """Write the page of one run, finished or not, and its pictures, in its folder."""
    from ..zoo.journal import read_journal
    from .runs import PICTURES, draw, surroundings

    series, environment = read_journal(run), surroundings(run)
    if not series:
        raise ValueError(f"{run / 'metrics.csv'}: nothing has been logged yet")
    output = output or run / PAGE
    kept = _recipe(run)
    parts = [
        f"# {kept['name']}, run {run.name}",
        f"`{environment['command']}` at commit {environment['commit'] or 'unknown'} on "
        f"{', '.join(environment['hardware'])}, seed {kept.get('seed_everything')}; `{KEPT}` holds every value.",
    ]
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        parts.append(
            f"{summary['parameters']:,} parameters, {summary['steps']:,} steps, {summary['seconds']:,.0f} s, "
            f"{summary['tokens_per_second'] or 0:,} tokens a second. Best at step {summary['best_step']}:"
        )
    else:
        last = max(step for values in series.values() for step, _ in values)
        parts.append(f"Not finished: step {last:,} of {kept['trainer.max_steps']:,}.")
    names = [name for name in series if name.startswith("val/")]
    if names:
        validated = sorted({step for name in names for step, _ in series[name]})
        head = ["step", *(name.removeprefix("val/") for name in names)]
        lines = [head, ["---"] * len(head)]
        for step in validated:
            at = [next((value for s, value in series[name] if s == step), math.nan) for name in names]
            lines.append([f"{step:,}", *(f"{value:.4g}" for value in at)])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if "train/data_wait" in series:
        shares, memory = (
            [value for _, value in series[f"train/{key}"]] for key in ("data_wait", "memory_gib")
        )
        wait = statistics.fmean(shares)
        parts.append(
            f"Waiting for data took {wait:.1%} of the time, and memory at most {max(memory):.2f} GiB."
        )
    if "train/left_out" in series:
        steps = ", ".join(f"{step:,}" for step, _ in series["train/left_out"])
        parts.append(
            f"Left out, for losses or gradients that were not finite or spikes: steps {steps}. "
            f"`mambazoo replay {run} --step N` shows a batch."
        )
    for picture in PICTURES:
        if path := draw(run, picture, output.parent):
            parts.append(f"![{picture.replace('_', ' ')}]({path.name})")
    output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return output


def compare(runs: list[Path]) -> list[results.Row]:
    """The lines of single runs: what differs between those of one recipe is what was set in them."""
    from .runs import surroundings

    recipes = [_recipe(run) for run in runs]
    rows = []
    for run, recipe in zip(runs, recipes, strict=True):
        if not (run / "summary.json").exists():
            raise ValueError(f"{run}: is not finished; `mambazoo resume {run}`, or report it by itself")
        alike = [other for other in recipes if other["name"] == recipe["name"]]
        keys = [
            key
            for key in sorted(set().union(*alike))
            if key not in _CIRCUMSTANCES and any(other.get(key) != recipe.get(key) for other in alike)
        ]
        over = {key: recipe.get(key) for key in keys}
        row = {"recipe": recipe["name"], "over": over, "overrides": [], "seed": recipe.get("seed_everything")}
        command = surroundings(run)["command"]
        rows.append({**row, **results.outcome(run), "command": command})
    return rows


def _lines(source: str) -> Path | None:
    """The file of JSON lines that a source is or holds."""
    path = Path(source)
    if path.is_file():
        return path
    from .sweep import RESULTS

    return path / RESULTS if (path / RESULTS).is_file() else None


def _run(source: str) -> Path:
    from .find import latest_run

    return latest_run(Path(source))


def _recipe(run: Path) -> dict[str, object]:
    """The recipe that a run keeps, by dotted keys."""
    return flat(yaml.safe_load((run / KEPT).read_text(encoding="utf-8")))
