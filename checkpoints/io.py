"""Models as files: the folder to keep and share, and one way to read it, a .ckpt file or a run.

A model folder holds model.safetensors, config.json (the task, its arguments, its vocabulary) and, for a
vocabulary of subwords, tokenizer.json. Nothing in a checkpoint is ever executed: weights are read as tensors,
and the class named in it must be one of this package or the one that the caller gives.
"""

import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..zoo.optim import cast
from ..zoo.saving import BEST, LAST, newest_checkpoint, read_checkpoint, sync_folder
from ..zoo.task import Task

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
# what `vocabulary` of a data module says in a trainer's checkpoint
_PACKAGE = __name__.partition(".")[0]


def from_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    task: type[Task] | None = None,
) -> Task:
    """Build a trained model, ready to use, from a model folder, a .ckpt file, or a run (its best checkpoint).

    Args:
        path: where it is; of runs/<recipe>, the newest run.
        device: where it goes.
        dtype: what its weights become, but for the state space, which stays in float32; None leaves them.
        task: the class to build where it is none of this package's.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it is damaged, is no model, does not fit its config, or would have to run code.
    """
    model, _ = load(path, task=task)
    if dtype is not None:
        cast(model, dtype)
    return model.to(device).eval()


def load(path: str | Path, *, task: type[Task] | None = None) -> tuple[Task, dict[str, Any] | None]:
    """Build a model as `from_pretrained` does, and return what datamodules/vocab.py rebuilds its vocabulary from."""
    place = resolve(Path(path).expanduser())
    if place.is_dir():
        return _load_folder(place, task)
    checkpoint = read_checkpoint(place)
    model = _build(str(checkpoint.get("task")), checkpoint.get("hyper_parameters", {}), task, place)
    _fit_weights(model, checkpoint["state_dict"], place)
    vocabularies = [value["vocabulary"] for value in checkpoint.values() if _has_vocabulary(value)]
    return model, vocabularies[0] if vocabularies else None


def resolve(path: Path) -> Path:
    """The model folder or .ckpt file that a path stands for.

    Raises:
        FileNotFoundError: when it stands for none.
    """
    if path.is_file() or (path / CONFIG).is_file():
        return path
    runs = [path] if (path / "checkpoints").is_dir() else []
    if path.is_dir():
        numbered = [run for run in path.iterdir() if run.name.isdigit() and (run / "checkpoints").is_dir()]
        runs += sorted(numbered, key=lambda run: -int(run.name))
    for run in runs:
        if (run / "checkpoints" / BEST).is_file():
            return run / "checkpoints" / BEST
        if (run / "checkpoints" / LAST).is_file():
            return newest_checkpoint(run / "checkpoints")[0]
    raise FileNotFoundError(f"there is no checkpoint, model folder or run {path}")


def save_pretrained(
    model: Task, vocabulary: dict[str, Any] | None, folder: Path, extra: dict[str, str] | None = None
) -> None:
    """Write a model folder, whole or not at all; `extra` holds texts of more files by name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        vocabulary = dict(vocabulary) if vocabulary else None
        texts = dict(extra or {})
        if vocabulary and "json" in vocabulary:
            texts[TOKENIZER] = vocabulary.pop("json")
        task = f"{type(model).__module__}.{type(model).__qualname__}"
        config = {"task": task, "model": dict(model.hparams), "vocabulary": vocabulary}
        texts[CONFIG] = json.dumps(config, indent=2)
        save_model(model, str(building / WEIGHTS), metadata={"format": "pt"})
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")
        for file in building.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        building.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _load_folder(folder: Path, task: type[Task] | None) -> tuple[Task, dict[str, Any] | None]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, arguments, vocabulary = config["task"], config["model"], config.get("vocabulary")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not the config of a model of this package ({error})"
        ) from None
    model = _build(name, arguments, task, folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has a config but no {WEIGHTS}")
    try:
        load_model(model, str(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged or does not fit {CONFIG}: {_first_lines(error)}"
        ) from None
    if vocabulary and (folder / TOKENIZER).is_file():
        vocabulary = {**vocabulary, "json": (folder / TOKENIZER).read_text(encoding="utf-8")}
    return model, vocabulary


def _build(name: str, arguments: dict[str, Any], task: type[Task] | None, place: Path) -> Task:
    """An untrained model of the class that a checkpoint names, which must be one of ours or the caller's."""
    if task is None:
        module, _, class_name = name.rpartition(".")
        found = None
        if module.startswith(f"{_PACKAGE}.zoo."):
            try:
                found = getattr(importlib.import_module(module), class_name, None)
            except ImportError:
                found = None
        if not (isinstance(found, type) and issubclass(found, Task)):
            raise ValueError(
                f"{place} is of the task {name!r}, which is none of this package; give its class as `task`"
            )
        task = found
    try:
        return task(**arguments)
    except TypeError as error:
        raise ValueError(f"{place} holds arguments that {task.__name__} does not take: {error}") from None


def _fit_weights(model: nn.Module, weights: dict[str, torch.Tensor], place: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{place} does not fit its own config: {_first_lines(error)}") from None


def _has_vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("vocabulary"), dict)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
