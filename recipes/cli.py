"""The command `mambazoo VERB ...`. Verbs that only read recipes start without PyTorch.

Exit codes: 0 done, 1 the run failed, 2 what was asked for is wrong, 75 a rank was stuck, 128 + n stopped by signal n.
"""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from .launchers import is_first, tie_ranks

# what each verb that takes a recipe or a run and key=value overrides does
_TRAINING = {
    "fit": "train a recipe: mambazoo fit language/demo trainer.max_steps=1000",
    "finetune": "train a recipe from a pretrained model: mambazoo finetune language/finetune model.pretrained=NAME",
    "resume": "go on with a run, exactly, from its newest checkpoint, or anew where it has none yet",
    "validate": "measure a run's best checkpoint",
    "test": "measure a run's best checkpoint on its test split",
    "predict": "write what a run's best checkpoint says of each held-out sequence",
    "baseline": "what simple models reach on a recipe's data",
}
# those of them that take a recipe
_STARTING = ("fit", "finetune", "baseline")
# the modules of verbs that take flags
_FLAGS = (
    "generate", "score", "embed", "bench", "info", "sweep", "report", "replay", "export", "importing",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError) as error:
        if not _is_ours(error):
            raise
        print(_message(error), file=sys.stderr)
        # a disk that fills up is nobody's mistake in asking
        code = 1 if isinstance(error, OSError) and error.errno == errno.ENOSPC else 2
    except FloatingPointError as error:
        # all ranks found the same; a launcher that sees another than the first end with an error kills that
        code = int(is_first())
        if code:
            print(f"mambazoo: {error}", file=sys.stderr)
    sys.exit(code)


def _run(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mambazoo", description="A model zoo on one Mamba backbone.")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    listing = verbs.add_parser("ls", help="list the recipes and the models")
    listing.add_argument(
        "filter", nargs="?", default="", help="a part of their names; of a model's whole name, all of it"
    )
    for verb, summary in (
        ("show", "print a recipe with everything resolved"),
        ("check", "find all that is wrong with one"),
    ):
        _with_overrides(
            verbs.add_parser(verb, help=summary), "a packaged recipe, a YAML file, or a run folder"
        )
    copying = verbs.add_parser("cp", help="copy a recipe to edit it")
    copying.add_argument("recipe")
    copying.add_argument("path", nargs="?", help="where to; the recipe's own name by default")
    for verb, summary in _TRAINING.items():
        what = "a packaged recipe, a YAML file, or a run folder" if verb in _STARTING else "a run folder"
        _with_overrides(verbs.add_parser(verb, help=summary), what)
    modules: dict[str, Any] = {}
    for name in _FLAGS:
        # their flags are declared beside their code, which imports PyTorch only when it runs
        module = __import__(f"{__package__}.{name}", fromlist=["run"])
        modules[module.NAME] = module
        module.add_arguments(verbs.add_parser(module.NAME, help=module.SUMMARY))

    options = parser.parse_args(given)
    if options.version:
        from .. import __version__

        print(__version__)
        return 0
    if options.verb is None:
        parser.print_help()
        return 2
    if options.verb in modules:
        return modules[options.verb].run(options)
    if options.verb in _TRAINING:
        # before what takes long to import
        tie_ranks()
        logging.basicConfig(format="%(message)s")
        with _ending_at_once():
            from . import train

        call: Callable[[str, list[str]], int] = getattr(train, options.verb)
        return call(options.recipe, options.overrides)
    return {"ls": _ls, "show": _show, "cp": _cp, "check": _check}[options.verb](options)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process: C++ that is being imported makes an ImportError of it, which others pass over."""
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if raises:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _with_overrides(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("recipe", help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="values to change, as in trainer.devices=4",
    )


def _ls(options: argparse.Namespace) -> int:
    from ..checkpoints.registry import entries
    from .find import packaged

    recipes = [recipe for recipe in packaged() if recipe.runs and options.filter in recipe.name]
    models = [entry for entry in entries() if options.filter in entry.name]
    if not recipes and not models:
        raise ValueError(
            f"no recipe and no model has {options.filter!r} in its name; `mambazoo ls` lists all"
        )
    for recipe in recipes:
        print(f"{recipe.name:24} {recipe.head[0]}")
    if recipes and models:
        print()
    for entry in models:
        said = [f"{entry.parameters / 1e6:,.4g}M parameters", entry.data, entry.metric]
        print(f"{entry.name:24} {entry.domain}: {'; '.join(filter(None, said))}")
        if entry.name == options.filter:
            kept = {key: value for key, value in asdict(entry).items() if value is not None and key != "name"}
            print("".join(f"  {key:12} {value}\n" for key, value in kept.items()), end="")
    return 0


def _show(options: argparse.Namespace) -> int:
    import yaml

    from .find import compose, find

    print(
        yaml.safe_dump(compose(find(options.recipe), options.overrides), sort_keys=False, allow_unicode=True),
        end="",
    )
    return 0


def _cp(options: argparse.Namespace) -> int:
    from .find import copy, find

    path = Path(options.path or f"{options.recipe.rpartition('/')[2]}.yaml")
    copy(find(options.recipe), path)
    print(f"{path}: edit it, then `mambazoo fit {path}`")
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import check

    return check(options.recipe, options.overrides)


def _message(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return "\n".join(f"mambazoo: {line}" for line in text.splitlines())


def _is_ours(error: BaseException) -> bool:
    """Whether an error says what to do: our own code raised it, or the system, of a file; others keep their trace."""
    if os.environ.get("MAMBAZOO_TRACEBACK"):
        return False
    if isinstance(error, OSError) and error.strerror and error.filename:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(
        Path(__file__).resolve().parents[1]
    )
