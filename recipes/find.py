"""Recipes as files: where they are, what they extend, and what they say once everything is resolved.

A recipe is YAML. `extends` names what it builds on, packaged recipes or files relative to it; `vars` holds
values that several keys read as ${vars.name}. Overrides are merged before anything is resolved, so that no
value is ever stale. Nothing here needs PyTorch.
"""

import json
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ..zoo.config import SIZES
from ..zoo.values import nearest

ROOT = Path(__file__).resolve().parent
SECTIONS = ("seed_everything", "model", "data", "finetune", "trainer", "callbacks", "loggers", "plugins")
# what files of recipes are called
_ENDINGS = (".yaml", ".yml")
# a run folder keeps the recipe it ran under this name
KEPT = "recipe.yaml"
# and what its test measured under this one
TESTED = "test.json"
# the key whose value stands for several others
_SIZE = "model.backbone.size"


@dataclass(frozen=True)
class Recipe:
    """A recipe that was found: its name, its file."""

    name: str
    path: Path

    @property
    def head(self) -> list[str]:
        """The comment at its top, a line each."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        head = []
        for line in lines:
            if not line.startswith("#"):
                break
            head.append(line.lstrip("# ").rstrip())
        return head

    @property
    def runs(self) -> bool:
        """Whether it is a whole run and not a fragment that others extend."""
        return any(line.startswith("mambazoo ") for line in self.head)


def packaged() -> list[Recipe]:
    """The recipes and fragments that come with the package."""
    files = sorted(ROOT.rglob("*.yaml"))
    return [Recipe(file.relative_to(ROOT).with_suffix("").as_posix(), file) for file in files]


def find(name: str) -> Recipe:
    """The recipe that a packaged name, a path or a run folder stands for.

    Raises:
        FileNotFoundError: when there is none; the message names the nearest.
    """
    for recipe in packaged():
        if recipe.name == name:
            return recipe
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in _ENDINGS:
        return Recipe(path.stem, path)
    if path.exists():
        try:
            run = latest_run(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{name} is no recipe: give a {_ENDINGS[0]} file, a run folder, or a name that `mambazoo ls` lists"
            ) from None
        return Recipe(_kept_name(run), run / KEPT)
    from difflib import get_close_matches

    names = [recipe.name for recipe in packaged() if recipe.runs]
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "`mambazoo ls` lists the recipes"
    raise FileNotFoundError(f"there is no recipe, file or run folder {name!r}; {hint}")


def latest_run(path: Path) -> Path:
    """A run folder, or the newest of the runs in runs/<recipe>.

    Raises:
        FileNotFoundError: when there is none.
    """
    if (path / KEPT).is_file():
        return path
    runs = (
        [run for run in path.iterdir() if run.name.isdigit() and (run / KEPT).is_file()]
        if path.is_dir()
        else []
    )
    if not runs:
        raise FileNotFoundError(f"{path} is no run folder and holds none")
    return max(runs, key=lambda run: int(run.name))


def compose(recipe: Recipe, overrides: list[str]) -> dict[str, Any]:
    """The recipe with what it extends and with key=value overrides, every ${...} resolved, as plain values.

    Raises:
        ValueError: for YAML that cannot be read, a cycle, an override without =, a missing value, an interpolation
            that leads nowhere; the message names the file or key.
    """
    config = _load(recipe.path, ())
    # a size first, so that numbers beside it count
    for override in sorted(overrides, key=lambda override: not override.startswith(f"{_SIZE}=")):
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not key=value, as in trainer.max_steps=1000")
        named = config.get("vars") or {}
        if key.startswith("vars.") and (name := key.split(".")[1]) not in named:
            # nothing reads it
            raise ValueError(f"{key}: there is no such key{nearest(name, map(str, named))}")
        try:
            layer = _parse(key, value)
            config = _merge(config, layer)
        except Exception as error:
            raise ValueError(f"{key}: {value!r} cannot be set here ({_first_line(error)})") from None
        _check_sections(layer)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key}: must be given, as in {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or recipe.name}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    plain.pop("vars", None)
    known = {key: plain.pop(key) for key in SECTIONS if key in plain}
    return {**known, **{str(key): value for key, value in plain.items()}}


def _parse(key: str, value: str) -> DictConfig:
    """What an override says. What begins with * is a reference in YAML, with [ a list; here, a glob or text too."""
    try:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    except yaml.YAMLError as error:
        return OmegaConf.from_dotlist([f"{key}={_with_globs(value, error)}"])


def _with_globs(value: str, error: yaml.YAMLError) -> str:
    """The same value with its globs in quotes; they are all of it or items of its list."""
    value = value.strip()
    if re.fullmatch(r"\[.*\]", value, re.DOTALL):
        # at commas, but for those in quotes and brackets
        items = re.findall(r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|[^,])+""", value[1:-1])
        return f"[{', '.join(item if _is_yaml(item) else _with_globs(item, error) for item in items)}]"
    # which may begin with a choice of letters, as an expression may
    if re.match(r"(\[[^],]+\])?\*|\[[^],]+\].", value):
        return json.dumps(value, ensure_ascii=False)
    raise error


def _is_yaml(text: str) -> bool:
    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return True


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, item in value.items()
        for key, leaf in flat(item, f"{prefix}.{name}".lstrip(".")).items()
    }


def copy(recipe: Recipe, path: Path) -> None:
    """Copy a recipe to edit it.

    Raises:
        ValueError: when there is a file of that name, or it is no name of a recipe.
        OSError: when it cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} exists; name another file")
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path} must end in {' or '.join(_ENDINGS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.path.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be written ({error.strerror}); name another file"
        ) from None


def _load(path: Path, below: tuple[Path, ...]) -> DictConfig:
    """A file merged over what it extends."""
    path = path.resolve()
    if path in below:
        raise ValueError(f"{path.name} extends itself: {' -> '.join(file.name for file in (*below, path))}")
    try:
        own = _read(path)
    except FileNotFoundError:
        raise ValueError(f"{below[-1].name} extends {path}, which does not exist") from None
    _check_sections(own, f"{path.name}, ")
    extends = own.pop("extends", None) or []
    parts = [extends] if isinstance(extends, str) else extends
    if not isinstance(parts, list | ListConfig) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{path.name}, extends: must be a name or a list of names, not {extends}")
    files = [path.parent / part if part.endswith(_ENDINGS) else ROOT / f"{part}.yaml" for part in parts]
    return reduce(_merge, (*(_load(file, (*below, path)) for file in files), own))


def _read(path: Path) -> DictConfig:
    try:
        found = OmegaConf.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        # with the line that it is in, which comes last
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, DictConfig):
        raise ValueError(f"{path} must hold sections such as model, data and trainer")
    return found


def _check_sections(layer: DictConfig, where: str = "") -> None:
    """Raise ValueError where a section is something else than keys with values, or nothing."""
    for key in ("vars", *SECTIONS[1:]):
        value = OmegaConf.select(layer, key, throw_on_resolution_failure=False)
        if not isinstance(value, DictConfig | None):
            raise ValueError(f"{where}{key}: must be a section of keys, not {value}")


def _merge(below: DictConfig, above: DictConfig) -> DictConfig:
    """One layer over another. A size that the upper one names is all its numbers: the lower one's give way."""
    shape = OmegaConf.select(below, _SIZE.rpartition(".")[0])
    if isinstance(shape, DictConfig):
        for key in SIZES.get(OmegaConf.select(above, _SIZE), ()):
            shape.pop(key, None)
    merged = OmegaConf.merge(below, above)
    assert isinstance(merged, DictConfig)
    return merged


def _kept_name(run: Path) -> str:
    """The name of the recipe that a run folder, runs/<name>/<number>, was made from."""
    return str(_read(run / KEPT).get("name", run.name))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
