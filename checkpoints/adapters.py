"""Adapters by themselves: what fine-tuning with LoRA has changed, a small file beside the name of what it was added to.

An adapter folder holds adapter.safetensors (the parts of each adapter under the name of its weight, and what was
trained whole) and adapter.json (the model it was added to, and what builds the one that it makes).
"""

import hashlib
import json
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..zoo.lora import merge, split
from ..zoo.optim import HEADS
from .files import write_folder
from .remote import read_json

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
_PARTS = ("up", "down", "whole", "scale")


class Adapter(NamedTuple):
    """What adapter.json says, and the weights beside it."""

    base: str
    fingerprint: str
    task: str
    arguments: dict[str, Any]
    vocabulary: dict[str, Any] | None
    weights: dict[str, Tensor]

    def base_from(self, folder: Path) -> str:
        """Where the model is that the adapter was added to: a path in it is one from its own folder."""
        if not isinstance(self.base, str) or (near := folder / self.base).resolve() == folder.resolve():
            raise ValueError(f"{folder / CONFIG} is damaged: `base` must be a model, not {self.base!r}")
        return str(near) if near.exists() else self.base

    def on(
        self, base: dict[str, Tensor], names: Iterable[str], folder: Path, place: str
    ) -> dict[str, Tensor]:
        """The weights of a model with these names: those of the base with the adapter added.

        They have at least the precision of the adapter, in which the base was when it was trained.

        Raises:
            ValueError: when the base is another model than the adapter was trained on.
        """
        if fingerprint(base) != self.fingerprint:
            raise ValueError(
                f"{folder} was trained on another model than {place}: name the right one as `base` in {CONFIG}"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for name, value in self.weights.items():
            weight, _, part = name.rpartition(".")
            if part in _PARTS:
                parts.setdefault(weight, {})[part] = value
            else:
                whole[name] = value
        # a scale says nothing: it is always in float32
        kinds = {value.dtype for name, value in self.weights.items() if not name.endswith(".scale")}
        plain = {**base, **whole}
        found = {name: plain[name] for name in names if name in plain}
        for name, value in found.items():
            if value.is_floating_point():
                found[name] = value.to(reduce(torch.promote_types, kinds, value.dtype))
        return merge(found, parts)


def read(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        FileNotFoundError, ValueError: when a file is missing, damaged or something else.
    """
    values = read_json(folder / CONFIG)
    try:
        named = {key: values[key] for key in ("base", "fingerprint", "task", "arguments", "vocabulary")}
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} is not the config of an adapter ({error} is missing)") from None
    try:
        return Adapter(**named, weights=load_file(folder / WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None


def save(folder: Path, adapter: Adapter, texts: dict[str, str]) -> None:
    """Write an adapter folder, whole or not at all; `texts` holds more files by name."""
    config = {key: value for key, value in adapter._asdict().items() if key != "weights"}
    write_folder(folder, adapter.weights, {**texts, CONFIG: json.dumps(config, indent=2)}, WEIGHTS)


def take(weights: dict[str, Tensor], fresh: Iterable[str]) -> dict[str, Tensor]:
    """Of the state dict of a model with adapters, what belongs into adapter.safetensors."""
    plain, parts = split(weights)
    alone = {f"{weight}.{part}": value for weight, of in parts.items() for part, value in of.items()}
    return {**alone, **{name: plain[name] for name in fresh}}


def fingerprint(weights: dict[str, Tensor]) -> str:
    """A digest of the vectors (norms, biases, D) below a model's head: small, and of no two trained models the same."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        if weights[name].ndim == 1 and not name.startswith(HEADS):
            digest.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()
