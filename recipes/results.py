"""Results as lines of JSON, one a run or a measurement, and what is made of them: tables, pictures, a page.

A run's line says the recipe, what was changed in it for all runs (`overrides`) and for this one (`over`), the seed,
what summary.json says, and the commit, command and hardware; a measurement's is what `bench` writes. Published numbers
stand beside ours where published.json names the recipe. Nothing here needs PyTorch.
"""

import hashlib
import io
import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .bench import table as measurements
from .find import ROOT, TESTED

Row = dict[str, Any]
PUBLISHED = ROOT / "published.json"


def append(path: Path, row: Row) -> None:
    """Add a line to a file and have it on the disk; what a kill left of another line is cut off first."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The lines of a file, but for one that is still being written.

    Raises:
        ValueError: for a line that is no result; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not ({"recipe", "over", "seed"} <= row.keys() or "suite" in row):
            raise ValueError(f"{path}:{number}: is no line that `mambazoo sweep` or `mambazoo bench` wrote")
        rows.append(row)
    return rows


def outcome(run: Path) -> Row:
    """What a finished run left, as the part of its line that says how it went, where and from what."""
    from .runs import surroundings

    summary, environment = json.loads((run / "summary.json").read_text()), surroundings(run)
    del summary["recipe"]
    kept = {key: environment[key] for key in ("commit", "hardware", "versions")}
    tested = {"test": json.loads((run / TESTED).read_text())} if (run / TESTED).exists() else {}
    return {**summary, **tested, "run": str(run), **kept}


def scores(row: Row) -> dict[str, float]:
    """What a run reached: the validation at its best by name, and test/... where it was tested."""
    tested = {f"test/{name}": value for name, value in row.get("test", {}).items()}
    return {**row.get("val", {}), **tested}


class Experiment(NamedTuple):
    """Runs of one recipe that differ in the same keys, by cell: what was set, and a row for every seed."""

    recipe: str
    cells: list[tuple[Row, list[Row]]]

    @property
    def name(self) -> str:
        """What its picture is called, whatever stands before it on a page."""
        over, [row, *_] = self.cells[0]
        kind = json.dumps([row.get("overrides", []), sorted(over)])
        return f"{self.recipe.replace('/', '-')}-{hashlib.sha256(kind.encode()).hexdigest()[:6]}"

    @property
    def metrics(self) -> list[str]:
        found = [name for _, rows in self.cells for row in rows for name in scores(row)]
        return list(dict.fromkeys([*found, *(entry["metric"] for entry in self.published)]))

    @property
    def published(self) -> list[Row]:
        """What papers report of it; of several experiments of theirs, the one that varies what these runs vary."""
        entries, keys = published(self.recipe), self.cells[0][0].keys()
        return [entry for entry in entries if entry.get("over", {}).keys() in (set(), keys)] or entries

    @property
    def by_length(self) -> tuple[list[str], dict[str, list[tuple[int, str]]]]:
        """The plain metrics, and by stem those of at least three names that end in a number, with that number."""
        numbered: dict[str, list[tuple[int, str]]] = {}
        for name in self.metrics:
            if match := re.fullmatch(r"(.*?)[_@/]?(\d+)", name):
                numbered.setdefault(match[1], []).append((int(match[2]), name))
        families = {stem: sorted(members) for stem, members in numbered.items() if len(members) > 2}
        along = {name for members in families.values() for _, name in members}
        return [name for name in self.metrics if name not in along], families


def experiments(rows: Iterable[Row]) -> list[Experiment]:
    """Sort the lines of runs into experiments. Where a cell ran twice with one seed, the later line counts."""
    latest: dict[str, Row] = {}
    for row in rows:
        latest[json.dumps([identity(row), row["seed"]])] = row
    grids: dict[str, dict[str, list[Row]]] = {}
    for row in latest.values():
        kind = json.dumps([row["recipe"], row.get("overrides", []), sorted(row["over"])])
        grids.setdefault(kind, {}).setdefault(identity(row), []).append(row)
    return [
        Experiment(
            next(iter(cells.values()))[0]["recipe"], [(rows[0]["over"], rows) for rows in cells.values()]
        )
        for cells in grids.values()
    ]


def identity(row: Row) -> str:
    """What tells a cell from others, whatever its seed."""
    return json.dumps([row["recipe"], row.get("overrides", []), row["over"]], sort_keys=True)


def published(recipe: str) -> list[Row]:
    """What papers report of an experiment: model, metric, value, source; `over` names the cell of ours it goes with."""
    return [entry for entry in json.loads(PUBLISHED.read_text()) if entry["experiment"] == recipe]


def table(experiment: Experiment) -> str:
    """A line a cell: mean and standard deviation over its seeds; published numbers below the cell they belong to.

    Metrics that were measured at several lengths follow in tables of their own.
    """
    plain, families = experiment.by_length
    tables = [_table(experiment, plain, plain, ("parameters", "steps", "seconds", "tokens_per_second"))]
    for stem, members in families.items():
        names, lengths = [name for _, name in members], [f"{length:,}" for length, _ in members]
        tables.append(f"`{stem}` by length:\n\n{_table(experiment, names, lengths, ())}")
    return "\n\n".join(tables)


def _table(experiment: Experiment, metrics: list[str], heads: list[str], costs: tuple[str, ...]) -> str:
    keys = list(experiment.cells[0][0])
    first = [_short(key) for key in keys] or [""]
    lines = [[*first, "seeds", *heads, *(cost.replace("_per_", "/") for cost in costs)]]
    lines.append(["---"] * len(lines[0]))

    def claim(entry: Row) -> list[str]:
        numbers = [_number(entry["values"][name]) if name in entry["values"] else "" for name in metrics]
        name = f"*published: {entry['model']} ({entry['source']})*"
        return [name, *[""] * len(first), *numbers, *[""] * len(costs)]

    waiting = [entry for entry in _by_model(experiment.published) if entry["values"].keys() & set(metrics)]
    for over, rows in experiment.cells:
        done = [row for row in rows if "failed" not in row]
        numbers = [_mean(scores(row)[name] for row in done if name in scores(row)) for name in metrics]
        taken = [_mean(row[cost] for row in done if row.get(cost) is not None) for cost in costs]
        seeds = str(len(done)) + (f" ({len(rows) - len(done)} failed)" if len(done) < len(rows) else "")
        lines.append([*([_text(over[key]) for key in keys] or [""]), seeds, *numbers, *taken])
        for entry in [entry for entry in waiting if over and entry["over"] == over]:
            lines.append(claim(entry))
            waiting.remove(entry)
    lines += [claim(entry) for entry in waiting]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(sources: list[Path], rows: list[Row], output: Path) -> str:
    """Everything that the lines of `sources` say, as Markdown; pictures go beside `output`."""
    parts = [
        "# Results\n\nMade by `mambazoo report` from "
        + ", ".join(f"`{path.name}`" for path in sources)
        + "; nothing is typed by hand. After ± stands the standard deviation over seeds."
    ]
    found = experiments(row for row in rows if "recipe" in row)
    for experiment in found:
        own = [row for _, cell in experiment.cells for row in cell]
        picture = output.with_name(f"{output.stem}-{experiment.name}.png")
        parts += [f"## {experiment.recipe}", table(experiment)]
        if draw_experiment(experiment, picture):
            parts.append(f"![{experiment.recipe}]({picture.name})")
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in own}))
        timed = [row["seconds"] for row in own if row.get("seconds")]
        took = f"; {sum(timed) / 60:,.1f} minutes of training in all" if len(timed) == len(own) else ""
        parts.append(f"{_origin(own)} Seeds {seeds}{took}.")
    suites = [row for row in rows if "suite" in row]
    for hardware in dict.fromkeys(map(_hardware, suites)):
        own = [row for row in suites if _hardware(row) == hardware]
        picture = output.with_name(f"{output.stem}-bench-{re.sub(r'[^a-z0-9]+', '-', hardware.lower())}.png")
        parts += [f"## Measured on {hardware}", measurements(own)]
        if draw_measurements(own, picture):
            parts.append(f"![measured on {hardware}]({picture.name})")
        parts.append(_origin(own))
    return "\n\n".join(parts) + "\n"


def draw_experiment(experiment: Experiment, path: Path) -> bool:
    """Draw each metric over the cells, a dot a seed, or metrics that end in a number over it; whether there is any.

    Of one cell there is nothing to compare, and only the second is drawn.
    """
    plain, families = experiment.by_length
    if len(experiment.cells) < 2:
        plain = []
    labels = [", ".join(_text(value) for value in over.values()) or "ours" for over, _ in experiment.cells]
    if not plain and not families:
        return False
    figure, panels = _panels(len(plain) + len(families))
    for axes, name in zip(panels, plain, strict=False):
        for i, (over, rows) in enumerate(experiment.cells):
            values = [scores(row)[name] for row in rows if name in scores(row)]
            axes.plot([i] * len(values), values, "o", color="C0", alpha=0.6)
            claims = [
                entry["value"]
                for entry in experiment.published
                if entry["metric"] == name and entry.get("over") == over
            ]
            axes.plot([i] * len(claims), claims, "D", color="C3", fillstyle="none", label="published")
        if len(labels) > 2:
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(range(len(labels)), labels)
        axes.set(ylabel=name, xlim=(-0.5, len(labels) - 0.5))
    for axes, (stem, members) in zip(panels[len(plain) :], families.items(), strict=True):
        for i, (_, rows) in enumerate(experiment.cells):
            for j, row in enumerate(rows):
                points = [(x, scores(row)[key]) for x, key in members if key in scores(row)]
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, "o-", color=f"C{i}", label="" if j else labels[i], alpha=0.7)
        for entry in _by_model(experiment.published):
            points = [(x, entry["values"][key]) for x, key in members if key in entry["values"]]
            if not points:
                continue
            xs, ys = [x for x, _ in points], [y for _, y in points]
            own = [i for i, (over, _) in enumerate(experiment.cells) if over == entry["over"]]
            color = f"C{own[0]}" if own else "black"
            axes.plot(
                xs, ys, "--", color=color, marker="D", fillstyle="none", label=f"{entry['model']}, published"
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="length", ylabel=stem)
        axes.legend()
    _save(figure, path)
    return True


def draw_measurements(rows: list[Row], path: Path) -> bool:
    """Draw the suites in which one number of the shape grows, over it; whether there is any."""
    curves: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if (column := _growing([other for other in rows if _like(other, row)])) is not None:
            x = [int(number) for number in re.findall(r"\d+", row["shape"])][column]
            suite = curves.setdefault((row["suite"], row["unit"]), {})
            suite.setdefault(row["name"], []).append((x, row["value"]))
    if not curves:
        return False
    figure, panels = _panels(len(curves))
    for axes, ((name, unit), lines) in zip(panels, curves.items(), strict=True):
        for line, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=line)
        axes.set_xscale("log", base=2)
        values = [value for points in lines.values() for _, value in points]
        # a scale that makes much of small differences would mislead
        axes.set_yscale("log") if max(values) > 10 * min(values) else axes.set_ylim(0, 1.1 * max(values))
        axes.set(title=name, xlabel="length or batch", ylabel=unit)
        axes.legend(fontsize="x-small")
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    """Write a figure as a picture of few colours, a quarter of the bytes."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    # by the method that keeps rare colours too
    few = Image.open(whole).convert("RGB").quantize(64, method=Image.Quantize.FASTOCTREE)
    few.save(path, optimize=True)


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
    return figure, panels[:count]


def _growing(rows: list[Row]) -> int | None:
    """Which of the numbers in the shapes of at least three rows is the only one that differs."""
    shapes = {tuple(int(number) for number in re.findall(r"\d+", row["shape"])) for row in rows}
    if len(shapes) < 3 or len({len(shape) for shape in shapes}) > 1:
        return None
    differing = [i for i, values in enumerate(zip(*shapes, strict=True)) if len(set(values)) > 1]
    return differing[0] if len(differing) == 1 else None


def _like(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("suite", "name", "unit"))


def _by_model(entries: list[Row]) -> list[Row]:
    """Published numbers of one model from one source as one entry, `values` by metric."""
    models: dict[str, Row] = {}
    for entry in entries:
        key = json.dumps([entry["model"], entry["source"], entry.get("over")], sort_keys=True)
        empty = {"over": entry.get("over"), "model": entry["model"], "source": entry["source"], "values": {}}
        models.setdefault(key, empty)["values"][entry["metric"]] = entry["value"]
    return list(models.values())


def _origin(rows: list[Row]) -> str:
    """Where lines come from, in a sentence; of commands, what their tables do not say."""
    told = {"seed_everything", "data.seed", *(key for row in rows for key in row.get("over", {}))}
    commands = ", ".join(
        f"`{command}`" for command in _distinct(_without(row.get("command"), told) for row in rows)
    )
    commits = ", ".join(commit[:7] + "+" * commit.endswith("+") for commit in _distinct(map(_commit, rows)))
    return f"{commands} at commit {commits} on {'; '.join(_distinct(map(_hardware, rows)))}."


def _without(command: str | None, keys: set[str]) -> str | None:
    """A command without its overrides of some keys."""
    if command is None or "=" not in command:
        return command
    return shlex.join(word for word in shlex.split(command) if word.partition("=")[0] not in keys)


def _distinct(values: Iterable[Any]) -> Iterator[str]:
    return iter(dict.fromkeys(str(value) for value in values if value))


def _commit(row: Row) -> str:
    return row.get("commit") or "unknown"


def _hardware(row: Row) -> str:
    return ", ".join(row.get("hardware") or ["unknown hardware"])


def _mean(values: Iterable[float]) -> str:
    """The mean, and after ± the standard deviation of more than one that differ."""
    found = list(values)
    if not found:
        return ""
    mean = _number(statistics.fmean(found))
    if len(set(found)) < 2:
        return mean
    spread = statistics.stdev(found)
    return f"{mean} ± {spread:,.0f}" if spread >= 100 else f"{mean} ± {spread:.2g}"


def _number(value: float) -> str:
    return (
        f"{value:,.0f}" if math.isfinite(value) and (abs(value) >= 1000 or value % 1 == 0) else f"{value:.4g}"
    )


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
