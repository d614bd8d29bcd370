"""Weights as files: read where they lie, without a copy, and written whole or not at all. No code is ever run."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..zoo.saving import read_tensors, sync_folder
from .remote import CARD, CONFIG, TOKENIZER, WEIGHTS, shards

# the weights of a folder that is written here, and what else may lie in it
_WEIGHTS = {*WEIGHTS, "adapter.safetensors"}
_BESIDE = {CARD, CONFIG, TOKENIZER, "tokenizer_config.json", "recipe.yaml", "metrics.json", "adapter.json"}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, mapped from its files: pages are read when they are used.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when a file is damaged, or would have to run code.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has a config but no {WEIGHTS[0]}")
    if not name.endswith(".index.json"):
        return _read_file(folder / name)
    weights: dict[str, Tensor] = {}
    for shard in shards(folder / name):
        weights |= _read_file(folder / shard)
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        weights = read_tensors(path, mmap=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"{path} holds something else than weights by name")
        return weights
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_folder(
    folder: Path, weights: dict[str, Tensor], texts: dict[str, str], name: str = WEIGHTS[0]
) -> None:
    """Write weights and texts, by file name, to a folder that is there whole or not at all; it replaces a model's.

    Raises:
        ValueError: see `check_replaced`.
        OSError: when it cannot be written.
    """
    check_replaced(folder, texts)
    given, folder, building = folder, folder.resolve(), None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        for file, text in texts.items():
            (building / file).write_text(text, encoding="utf-8")
        if name.endswith(".safetensors"):
            alone = {name: value.contiguous() for name, value in _once(weights).items()}
            save_file(alone, building / name, metadata={"format": "pt"})
        else:
            torch.save(weights, building / name)
        for path in building.iterdir():
            path.chmod(0o644)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        building.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_folder(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        code, reason = getattr(error, "errno", errno.EIO), getattr(error, "strerror", str(error))
        raise OSError(code, f"{given} cannot be written ({reason})") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def check_replaced(folder: Path, own: Iterable[str] = ()) -> None:
    """Raise ValueError where a folder that is to be replaced holds anything but a model, or files of `own` names."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is there and no folder; name another")
    found = {path.name for path in folder.iterdir()}
    other = found - _WEIGHTS - _BESIDE - set(own)
    if not found & _WEIGHTS:
        # a card and a config are there of other things too
        other = found
    if other:
        raise ValueError(f"{folder} holds {min(other)}, which is no part of a model; name another folder")


def _once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the further names of those that have several."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, value in weights.items():
        first.setdefault((value.data_ptr(), tuple(value.shape)), name)
    return {name: weights[name] for name in first.values()}
