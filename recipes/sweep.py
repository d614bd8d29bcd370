"""The verb `sweep`: train a recipe at every point of a small grid and with several seeds, one run after the other.

Each cell is a run of `fit`, or of `finetune` where the recipe starts from a pretrained model, in a process of its own,
in runs/<recipe>/sweep-<digest>/<cell>. The digest is of the recipe as it stands with its overrides and of which keys
vary: the same command goes on where it stopped, and one with more values or seeds adds to what there is. Finished
cells are skipped, an interrupted one is resumed from its newest checkpoint (or starts again where it has none), one
that failed is tried again; it does not keep the others from running. results.jsonl gets a line a run, report.md the
table of them all.
"""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

NAME, SUMMARY = "sweep", "train a recipe over a grid of values and seeds"

RESULTS = "results.jsonl"


class Cell(NamedTuple):
    """What one run of a sweep changes in the recipe."""

    over: dict[str, Any]
    overrides: list[str]
    seed: int

    @property
    def seeds(self) -> list[str]:
        """One seed for all that is drawn: weights, dropout, and the order of the data."""
        return [f"seed_everything={self.seed}", f"data.seed={self.seed}"]

    @property
    def folder(self) -> str:
        # a value may have a dot too
        parts = [override.partition("=") for override in self.overrides]
        named = [f"{key.rpartition('.')[2]}={value}" for key, _, value in parts]
        text = ",".join([*named, f"seed={self.seed}"])
        # values may hold anything; what a folder cannot be called by is told apart by a digest
        plain = re.sub(r"[^\w.,=+*-]+", "_", text)[:150]
        return plain if plain == text else f"{plain}-{_digest(text)}"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="a packaged recipe or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values to change in every run"
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="values to try in turn; repeated, all combinations are tried",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="how many seeds (0, 1, ...), of the model and of the data's order",
    )
    parser.add_argument(
        "--test", action="store_true", help="measure each run on its test split too, as `mambazoo test` does"
    )


def run(arguments: Namespace) -> int:
    from .find import compose, find
    from .report import write_page
    from .results import append, experiments, identity, read, table

    if arguments.seeds < 1:
        raise ValueError(f"--seeds: must be 1 or more, not {arguments.seeds}")
    recipe, grid = find(arguments.recipe), dict(map(_values, arguments.over))
    for key in (*grid, *(override.partition("=")[0] for override in arguments.overrides)):
        if key in ("seed_everything", "data.seed"):
            raise ValueError(f"{key}: is what --seeds sets; leave it out")
    cells = _cells(grid, arguments.seeds)
    # an override that cannot be set is said before the first run
    composed = [compose(recipe, [*arguments.overrides, *cell.overrides, *cell.seeds]) for cell in cells]
    verb = "finetune" if composed[0]["model"].get("pretrained") else "fit"
    common = compose(recipe, [*arguments.overrides, *(f"{key}=null" for key in grid)])
    digest = _digest([common, sorted(grid)])
    folder = Path(common["trainer"]["default_root_dir"]) / recipe.name / f"sweep-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS
    given = [arguments.recipe, *arguments.overrides, *(f"--over={values}" for values in arguments.over)]
    options = [f"--seeds={arguments.seeds}", *(["--test"] if arguments.test else [])]
    command = shlex.join(["mambazoo", "sweep", *given, *options])

    def asked_for() -> dict[str, dict[str, Any]]:
        """The lines of this command's cells that there are, the last of each."""
        rows = read(results) if results.exists() else []
        newest = {identity(row) + str(row["seed"]): row for row in rows}
        return {key: newest[key] for key in map(key_of, cells) if key in newest}

    def key_of(cell: Cell) -> str:
        return identity(row_of(cell)) + str(cell.seed)

    def row_of(cell: Cell) -> dict[str, Any]:
        return {
            "recipe": recipe.name,
            "over": cell.over,
            "overrides": arguments.overrides,
            "seed": cell.seed,
            "command": command,
        }

    with _Stopping() as stopping:
        for number, cell in enumerate(cells, 1):
            known = asked_for().get(key_of(cell), {"failed": None})
            if "failed" not in known and ("test" in known or not arguments.test):
                continue
            print(f"[{number}/{len(cells)}] {' '.join([*cell.overrides, *cell.seeds])}", flush=True)
            values = [*arguments.overrides, *cell.overrides, *cell.seeds]
            root, test = folder / cell.folder, arguments.test
            outcome = _train(verb, arguments.recipe, recipe.name, values, root, stopping, test=test)
            if stopping.received:
                print(f"stopped; go on with\n  {command}")
                return 128 + stopping.received
            append(results, row_of(cell) | outcome)

    rows = list(asked_for().values())
    page = write_page([results], rows, folder / "report.md")
    for experiment in experiments(rows):
        print(f"\n{table(experiment)}")
    print(f"\n  lines  {results}\n  page   {page}", flush=True)
    failed = sum("failed" in row for row in rows)
    if failed:
        print(f"{failed} of {len(cells)} failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


class _Stopping:
    """Asked to stop, by Ctrl-C or SIGTERM, wait for the run that is training to stop, with its checkpoint."""

    def __init__(self) -> None:
        self.received = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Stopping":
        self._before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        for number, _ in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def run(self, arguments: list[str]) -> int:
        """Run the command in a process of its own; return its exit code."""
        with subprocess.Popen([sys.executable, "-m", "mambazoo", *arguments]) as self.process:
            return self.process.wait()

    def _handle(self, number: int, frame: object) -> None:
        self.received = number
        # Ctrl-C reaches the run by itself, and twice would tell it to stop at once
        if self.process is not None and number == signal.SIGTERM:
            self.process.send_signal(number)


def _train(
    verb: str, recipe: str, name: str, values: list[str], root: Path, stopping: _Stopping, *, test: bool
) -> dict[str, Any]:
    """Take a cell to its end from where it is; return what its line says of that."""
    from .find import TESTED, latest_run
    from .results import outcome

    def newest() -> Path | None:
        try:
            return latest_run(root / name)
        except FileNotFoundError:
            return None

    run, code = newest(), 0
    if run is None or not (run / "summary.json").exists():
        if run is not None and any((run / "checkpoints").glob("*.ckpt")):
            code = stopping.run(["resume", str(run)])
        else:
            code = stopping.run([verb, recipe, *values, f"trainer.default_root_dir={root}"])
        run = newest()
    if run is not None and test and not code and not stopping.received and not (run / TESTED).exists():
        code = stopping.run(["test", str(run)])
    if code or run is None or not (run / "summary.json").exists():
        return {"failed": code, **({"run": str(run)} if run else {})}
    return outcome(run)


def _values(given: str) -> tuple[str, list[str]]:
    """The key and the values of key=a,b,c; commas inside brackets are part of a value."""
    key, equals, text = given.partition("=")
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    values = [part.strip() for part in parts]
    if not equals or not key or not all(values):
        raise ValueError(f"--over: {given!r} is not key=a,b,c, as in --over model.optimizer.lr=1e-3,3e-3")
    return key, list(dict.fromkeys(values))


def _cells(grid: dict[str, list[str]], seeds: int) -> list[Cell]:
    """Every combination with every seed; a seed is done for all before the next, so that a part says most."""
    from omegaconf import OmegaConf

    cells = []
    for seed in range(seeds):
        for values in product(*grid.values()):
            overrides = [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            # numbers as numbers, as the recipe reads them
            over = {
                key: OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[call-overload,index]
                for key, value in zip(grid, values, strict=True)
            }
            cells.append(Cell(over, overrides, seed))
    return cells


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
