"""From a resolved recipe to a model, its data and a trainer: jsonargparse checks every value and builds them.

LightningCLI is used as its parser and builder alone (`run=False`): recipes are composed before it sees them, and verbs
call the trainer themselves, so that a checkpoint never overrides the command line.
"""

import contextlib
import ctypes
import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ..zoo.finetune import FineTuning
from ..zoo.values import Config, nearest
from .find import SECTIONS

# what a model starts from, which is no argument of its class
PRETRAINED = "pretrained"
# the section that says which of its weights are trained
FINETUNE = "finetune"
# sections that hold named objects, each with a class_path of its own
_OBJECTS = ("callbacks", "loggers", "plugins")
# names of ours for trainer.strategy, beside Lightning's; context-4 splits a sequence over four ranks
_SHARDED, _CONTEXT = "mambazoo.zoo.sharding.FullySharded", "mambazoo.zoo.context.ContextParallel"
_STRATEGIES: dict[str, dict[str, Any]] = {
    "fsdp2": {"class_path": _SHARDED},
    "fsdp2-sharded": {"class_path": _SHARDED, "init_args": {"checkpoint": "sharded"}},
    "context": {"class_path": _CONTEXT},
}


class Launch(LightningCLI):
    """The objects of a recipe: `model`, `datamodule`, `trainer`.

    Raises:
        ValueError: with every key that is wrong, a line each, before anything is built.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.classes, self.values, self.problems = _split_classes(config)
        with quiet():
            super().__init__(
                self.classes["model"],
                self.classes["data"],
                args=self.values,
                run=False,
                seed_everything_default=False,
                save_config_callback=None,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                parser_class=_Parser,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, class_ in self.classes.items():
            if key.startswith("callbacks.") or key == FINETUNE:
                parser.add_lightning_class_args(class_, key)
            elif "." in key:
                parser.add_class_arguments(class_, key)
        # what the data knows and the model must
        accepted = inspect.signature(self.classes["model"]).parameters
        for name in getattr(self.classes["data"], "PROVIDES", ()):
            if name in accepted and name not in self.values["model"]:
                parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        problems = self.problems + _config_problems(self.classes, args)
        args["trainer"]["strategy"] = _strategy(args["trainer"].get("strategy", "auto"))
        steps = args["trainer"].get("max_steps")
        if steps is None or (isinstance(steps, int) and steps < 1):
            args["trainer"]["max_steps"] = 1
            problems.append(
                "trainer.max_steps: must be given and above 0; the learning rate's schedule ends there"
            )
        while True:
            try:
                self.config = parser.parse_object(args)
                break
            except _Problem as problem:
                message, key = problem.explain(parser)
                # what it went on without may be required
                if not any(known.startswith(f"{message.partition(':')[0]}:") for known in problems):
                    problems.append(message)
                # go on without the key, to find what else is wrong
                if not _drop(args, key):
                    break
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))

    def callback(self, kind: type[Any]) -> Any:
        """The recipe's callback of a kind, or None."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, kind)), None)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        # without a logger Lightning would make one of its own
        for section, argument, none in (("loggers", "logger", False), ("plugins", "plugins", None)):
            objects = self._get(self.config_init, section)
            kwargs[argument] = list(vars(objects).values()) if objects else none
        return super().instantiate_trainer(**kwargs)


class _Problem(Exception):
    """What jsonargparse says of a value."""

    def explain(self, parser: LightningArgumentParser) -> tuple[str, str]:
        """A sentence for the user, and the key it is about."""
        text = str(self)
        if match := re.search(r"(?:Group '([\w.]+)' does not|Option) ?(?:accept option )?'([\w.]+)'", text):
            group, option = match.groups()
            key = f"{group}.{option}" if group else option
            known = [
                name.removeprefix(f"{group}.")
                for name in _keys(parser)
                if not group or name.startswith(f"{group}.")
            ]
            return f"{key}: there is no such key{nearest(option, known)}", key
        if match := re.search(r'Parser key "([\w.]+)":\s*(.*)', text, re.DOTALL):
            key, detail = match.groups()
            return f"{key}: {_plain(detail)}", key
        if match := re.search(r"arguments are required: ([\w., ]+)", text):
            keys = match[1].split(", ")
            return f"{keys[0]}: must be given, as in {keys[0]}=VALUE", ""
        return _plain(text), ""


class _Parser(LightningArgumentParser):
    """A parser whose errors are raised and not printed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _Problem(message) from ex


def reuse_memory() -> None:
    """Have the C library keep large blocks that are freed, for a process that computes on the CPU.

    glibc gives them back to the system, which hands out zeroed pages anew on every step: at 65,536 tokens
        that took a third of the time. Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no block of its own for a large one
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice and advertisements off the screen; its errors, and warnings of ours, pass."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def objections(config: dict[str, Any]) -> list[str]:
    """What data module and callbacks of a recipe, built by themselves, object to."""
    try:
        classes, values, _ = _split_classes(config)
    except ValueError as error:
        return str(error).splitlines()
    found: list[str] = []
    for key, class_ in classes.items():
        section, _, name = key.partition(".")
        if section in ("data", "callbacks", FINETUNE):
            # a TypeError: it is not given something that it cannot do without
            with contextlib.suppress(TypeError):
                try:
                    class_(**(values[section][name] if name else values[section]))
                except (ValueError, OSError) as error:
                    found += str(error).splitlines()
    return found


def _split_classes(config: dict[str, Any]) -> tuple[dict[str, type], dict[str, Any], list[str]]:
    """The classes that a recipe names, by key, its values without them, and what is wrong so far.

    Raises:
        ValueError: when there is no model or no data to go on with.
    """
    problems = [
        f"{key}: there is no such section{nearest(key, SECTIONS)}" for key in config if key not in SECTIONS
    ]
    classes: dict[str, type] = {}
    values: dict[str, Any] = {"trainer": dict(config.get("trainer") or {})}
    if config.get(FINETUNE) is not None:
        classes[FINETUNE], values[FINETUNE] = FineTuning, dict(config[FINETUNE])
    if "seed_everything" in config:
        values["seed_everything"] = config["seed_everything"]
    places: list[tuple[str, Any]] = [(key, config.get(key)) for key in ("model", "data")]
    for section in _OBJECTS:
        named = config.get(section) or {}
        places += [(f"{section}.{name}", value) for name, value in named.items() if value is not None]
    for key, value in places:
        if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
            problems.append(f"{key}.class_path: must name the class to build")
            continue
        try:
            classes[key] = import_class(value["class_path"])
        except ValueError as error:
            problems.append(f"{key}.class_path: {error}")
            continue
        section, _, name = key.partition(".")
        left_out = ("class_path", PRETRAINED) if key == "model" else ("class_path",)
        rest = {option: setting for option, setting in value.items() if option not in left_out}
        if name:
            values.setdefault(section, {})[name] = rest
        else:
            values[section] = rest
    if "model" not in classes or "data" not in classes:
        raise ValueError("\n".join(problems))
    return classes, values, problems


def _strategy(given: Any) -> Any:
    """What a name of ours for a strategy stands for; any other is Lightning's."""
    if isinstance(given, str) and (match := re.fullmatch(r"context-(\d+)", given)):
        return {"class_path": _CONTEXT, "init_args": {"size": int(match[1])}}
    return _STRATEGIES.get(given, given) if isinstance(given, str) else given


def import_class(path: str) -> type:
    """The class of a dotted path.

    Raises:
        ValueError: when there is none; the message names the nearest.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be imported ({error})") from None
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [other for other, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"{module_name} has no class {name!r}{nearest(name, classes)}")
    return found


def _config_problems(classes: dict[str, type], values: dict[str, Any]) -> list[str]:
    """What is wrong in the configs that a class takes as dicts and builds inside."""
    problems = []
    for key, class_ in classes.items():
        configs: dict[str, type[Config]] = getattr(class_, "CONFIGS", {})
        for name, config in configs.items():
            given = values.get(key, {}).get(name)
            if isinstance(given, dict):
                try:
                    problems += config.problems(given, f"{key}.{name}")
                except ValueError as error:
                    problems.append(str(error))
    return problems


def _keys(parser: LightningArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]


def _drop(values: dict[str, Any], key: str) -> bool:
    """Remove a dotted key; false when it is not there."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.get(section, {})
        if not isinstance(values, dict):
            return False
    return values.pop(last, values) is not values


def _plain(detail: str) -> str:
    """jsonargparse's account of a wrong type on one line."""
    line = " ".join(detail.split())
    if match := re.search(r"Expected an? <class '([\w.]+)'>\. Got value: (.*)", line):
        words = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
            "list": "a list",
        }
        return f"must be {words.get(match[1], match[1])}, not {match[2]!r}"
    if match := re.search(r"Expected an? typing\.Literal\[(.*?)\]\. Got value: (.*)", line):
        options = match[1].replace("'", "")
        return f"must be one of {options}, not {match[2]!r}"
    if match := re.search(r"Subtypes: \[(.*?)\] .*Given value: (.*)", line):
        kinds = re.sub(r"<class '([\w.]+)'>", r"\1", match[1]).replace("NoneType", "null")
        return f"must be one of {kinds}, not {match[2]}"
    return line
