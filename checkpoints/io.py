"""Models as files: one way to read a folder, a .ckpt file, a run, or what has a name, and the folder to keep and share.

A model folder holds model.safetensors, config.json (the task, its arguments, its vocabulary) and, for a vocabulary of
subwords, tokenizer.json. Folders of other layouts (hub.py) and adapters (adapters.py) are read as well. Nothing in a
checkpoint is ever executed: weights are read as tensors, and the class named in it must be one of this package or the
one that the caller gives.
"""

import importlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..zoo.lora import merge, split
from ..zoo.optim import cast
from ..zoo.saving import BEST, LAST, newest_checkpoint, read_checkpoint
from ..zoo.task import Task, name_of
from . import adapters, hub
from .files import read_weights, write_folder
from .registry import Entry, locate
from .remote import CONFIG, TOKENIZER, WEIGHTS, read_json, tokenizer_from_hub

log = logging.getLogger(__name__)

# what `vocabulary` of a data module says in a trainer's checkpoint
_PACKAGE = __name__.partition(".")[0]
# of weights that do not fit, how many are named
_NAMED = 3


class Stored(NamedTuple):
    """A model as it is stored: what builds it, what its vocabulary is rebuilt from, and its weights, not yet read."""

    place: Path
    task: str
    arguments: dict[str, Any]
    vocabulary: dict[str, Any] | None
    weights: dict[str, Tensor]


def from_pretrained(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    task: type[Task] | None = None,
) -> Task:
    """Build a trained model, ready to use.

    Args:
        path: a model folder, a .ckpt file, a run (its best checkpoint; of runs/<recipe>, the newest run), a name that
            `mambazoo ls` lists, or owner/name of the Hugging Face Hub.
        device: where it goes.
        dtype: what its weights become, but for the state space, which stays in float32; None leaves them.
        task: the class to build where it is none of this package's.

    Raises:
        FileNotFoundError: when there is nothing.
        OSError: when it cannot be fetched.
        ValueError: when it is damaged, is no model, does not fit its config, or would have to run code.
    """
    model, _ = load(path, task=task)
    if dtype is not None:
        cast(model, dtype)
    return model.to(device).eval()


def load(path: str | Path, *, task: type[Task] | None = None) -> tuple[Task, dict[str, Any] | None]:
    """Build a model as `from_pretrained` does, and return what datamodules/vocab.py rebuilds its vocabulary from."""
    stored = read(path)
    return build(stored, task), stored.vocabulary


def read(path: str | Path, *, weights: bool = True) -> Stored:
    """What a path or name as `from_pretrained` takes it stands for; without `weights`, none of them are fetched."""
    place, entry = locate(path, weights=weights)
    place = resolve(place)
    if place.is_file():
        return _read_checkpoint(place)
    if (place / adapters.CONFIG).is_file():
        return _read_adapter(place, weights)
    stored = _read_folder(place, weights)
    if stored.vocabulary is None and entry is not None and entry.tokenizer is not None:
        return stored._replace(vocabulary=_tokenizer(entry))
    return stored


def resolve(path: Path) -> Path:
    """The model folder or .ckpt file that a path stands for.

    Raises:
        FileNotFoundError: when it stands for none.
    """
    if path.name in (CONFIG, adapters.CONFIG, *WEIGHTS, adapters.WEIGHTS) and path.is_file():
        # of a model folder, one of its files
        path = path.parent
    if path.is_file() or any((path / name).is_file() for name in (CONFIG, adapters.CONFIG)):
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


def build(stored: Stored, task: type[Task] | None = None) -> Task:
    """The model that is stored, on the weights as they are mapped: nothing is copied, and none is made in vain.

    Raises:
        ValueError: when it is of no class of this package, or its weights do not fit.
    """
    if task is None:
        # whatever a config says, nothing has memory before it fits the weights
        _fill(empty(stored), stored)
    with _Unallocated():
        model = _construct(stored, task)
    _fill(model, stored)
    if any(buffer.is_meta for buffer in model.buffers()):
        # a class of the caller's that makes buffers as we make weights
        weights = model.state_dict()
        model = _construct(stored, task)
        model.load_state_dict(weights)
    return model


def empty(stored: Stored) -> Task:
    """The model that is stored, without values and without memory: it has shapes alone."""
    with torch.device("meta"):
        return _construct(stored, None)


def save_pretrained(
    model: Task, vocabulary: dict[str, Any] | None, folder: Path, extra: dict[str, str] | None = None
) -> None:
    """Write a model folder, whole or not at all, adapters merged; `extra` holds texts of more files by name."""
    weights = merge(*split(model.state_dict()))
    stored = Stored(folder, name_of(model), dict(model.hparams), vocabulary, weights)
    save(stored, folder, extra)


def save(stored: Stored, folder: Path, extra: dict[str, str] | None = None) -> None:
    """Write what is stored as a model folder, as `save_pretrained` does."""
    config = {"task": stored.task, "model": stored.arguments}
    texts = dict(extra or {}) | vocabulary_texts(stored.vocabulary, config)
    write_folder(folder, stored.weights, {**texts, CONFIG: json.dumps(config, indent=2)})


def export(
    stored: Stored, layout: str, folder: Path, extra: dict[str, str] | None = None, eos: int | None = None
) -> None:
    """Write a language model in another layout, with its tokenizer.json where it has one.

    Args:
        stored: what `read` returned.
        layout: one of hub.LAYOUTS.
        folder: where to; it is replaced.
        extra: texts of more files by name.
        eos: the token that separates documents.

    Raises:
        ValueError: when the layout cannot say what the model is.
    """
    if "head.weight" not in stored.weights or "vocab_size" not in stored.arguments:
        raise ValueError(
            f"{stored.place} is a {stored.task.rpartition('.')[2]}; only language models have {layout}"
        )
    dtype = str(stored.weights["embedding.weight"].dtype).removeprefix("torch.")
    config = hub.config_to(stored.arguments, layout, dtype=dtype, eos=eos)
    texts = dict(extra or {}) | vocabulary_texts(stored.vocabulary, {})
    if TOKENIZER in texts and layout == "transformers":
        texts["tokenizer_config.json"] = json.dumps(hub.tokenizer_config(texts[TOKENIZER], eos), indent=2)
    texts[CONFIG] = json.dumps(config, indent=2)
    weights = hub.weights_to(stored.weights, stored.arguments, layout)
    # mamba_ssm looks for no other file
    name = "pytorch_model.bin" if layout == "state-spaces" else WEIGHTS[0]
    write_folder(folder, weights, texts, name)


def vocabulary_texts(vocabulary: dict[str, Any] | None, config: dict[str, Any]) -> dict[str, str]:
    """Put a vocabulary into a config, and return the file, by name, of what would be large in it."""
    kept = dict(vocabulary) if vocabulary else None
    tokenizer = kept.pop("json", None) if kept else None
    config["vocabulary"] = kept
    return {} if tokenizer is None else {TOKENIZER: tokenizer}


def read_vocabulary(folder: Path, vocabulary: dict[str, Any] | None) -> dict[str, Any] | None:
    """The inverse of `vocabulary_texts`."""
    if vocabulary and (folder / TOKENIZER).is_file():
        return {**vocabulary, "json": (folder / TOKENIZER).read_text(encoding="utf-8")}
    return vocabulary


def _read_checkpoint(path: Path) -> Stored:
    checkpoint = read_checkpoint(path, mmap=True)
    vocabularies = [value["vocabulary"] for value in checkpoint.values() if _has_vocabulary(value)]
    weights = merge(*split(checkpoint["state_dict"]))
    arguments = dict(checkpoint.get("hyper_parameters", {}))
    return _tied(
        Stored(path, str(checkpoint.get("task")), arguments, next(iter(vocabularies), None), weights)
    )


def _read_folder(folder: Path, weights: bool) -> Stored:
    config = read_json(folder / CONFIG)
    if "task" not in config:
        arguments = hub.arguments_from(config, str(folder / CONFIG))
        found = hub.weights_from(read_weights(folder), arguments["vocab_size"]) if weights else {}
        vocabulary = {"kind": "subwords"} if (folder / TOKENIZER).is_file() else None
        return _tied(Stored(folder, hub.TASK, arguments, read_vocabulary(folder, vocabulary), found))
    try:
        name, arguments, vocabulary = str(config["task"]), dict(config["model"]), config.get("vocabulary")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not the config of a model of this package ({error})"
        ) from None
    _check_sections(folder / CONFIG, arguments, vocabulary)
    found = read_weights(folder) if weights else {}
    return _tied(Stored(folder, name, arguments, read_vocabulary(folder, vocabulary), found))


def _check_sections(path: Path, arguments: Any, vocabulary: Any) -> None:
    """Raise ValueError where a config has something else in the place of several values by name."""
    named = arguments if isinstance(arguments, dict) else {"backbone": arguments}
    sections = {key: named[key] for key in ("backbone", "optimizer") if key in named}
    for key, value in {**sections, "vocabulary": vocabulary}.items():
        if not isinstance(value, dict) and (value is not None or key == "backbone"):
            raise ValueError(f"{path} is damaged: {key} must be values by name, not {value!r}")


def _read_adapter(folder: Path, weights: bool) -> Stored:
    adapter = adapters.read(folder)
    _check_sections(folder / adapters.CONFIG, adapter.arguments, adapter.vocabulary)
    vocabulary = read_vocabulary(folder, adapter.vocabulary)
    stored = Stored(folder, str(adapter.task), adapter.arguments, vocabulary, {})
    if not weights:
        return stored
    base = read(adapter.base_from(folder))
    names = empty(stored).state_dict().keys()
    found = adapter.on(base.weights, names, folder, str(base.place))
    return _tied(stored._replace(weights=found))


def _tied(stored: Stored) -> Stored:
    """A head that shares the embedding's weight is listed whether or not it was stored."""
    if stored.arguments.get("tie_embeddings") and "embedding.weight" in stored.weights:
        return stored._replace(weights={**stored.weights, "head.weight": stored.weights["embedding.weight"]})
    return stored


def _tokenizer(entry: Entry) -> dict[str, Any] | None:
    assert entry.tokenizer is not None
    try:
        return {"kind": "subwords", "json": tokenizer_from_hub(entry.tokenizer.removeprefix("hf:"))}
    except OSError as error:
        log.warning("%s comes without its tokenizer: %s", entry.name, error)
        return None


class _Unallocated(TorchFunctionMode):
    """What weights are made of, and drawn from, is on the meta device; what a model has beside them is made."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.empty, torch.rand, torch.randn):
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _construct(stored: Stored, task: type[Task] | None) -> Task:
    """An untrained model of the class that is named, which must be one of ours or the caller's."""
    name, place = stored.task, stored.place
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
        return task(**stored.arguments)
    except TypeError as error:
        raise ValueError(f"{place} holds arguments that {task.__name__} does not take: {error}") from None
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"{place} describes no {task.__name__} that can be built: {_first_lines(error)}"
        ) from None


def _fill(model: nn.Module, stored: Stored) -> None:
    """Give a model its weights as they are; those that it shares stay shared."""
    own: dict[Tensor, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        own.setdefault(value, []).append(name)
    wrong = sorted(stored.weights.keys() - {name for names in own.values() for name in names})
    problems = [f"{name} is there and not in the model" for name in wrong]
    for value, names in own.items():
        found = next((stored.weights[name] for name in names if name in stored.weights), None)
        if found is None or found.shape != value.shape:
            there_is = "is not there" if found is None else f"is {tuple(found.shape)} there"
            problems.append(f"{names[0]} is {tuple(value.shape)} in the model and {there_is}")
            continue
        if isinstance(value, nn.Parameter):
            found = nn.Parameter(found, requires_grad=value.requires_grad)
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, found)
    if problems:
        more = [f"and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        raise ValueError(f"{stored.place} does not fit its own config: {'; '.join(problems[:_NAMED] + more)}")


def _has_vocabulary(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("vocabulary"), dict)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
