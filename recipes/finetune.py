"""What a recipe takes over from the pretrained model that it names, and how its own model gets the weights."""

import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from ..checkpoints import adapters
from ..checkpoints.io import read, vocabulary_texts
from ..checkpoints.remote import TOKENIZER
from ..datamodules.vocab import vocabulary_from_dict
from ..zoo.config import SIZES
from ..zoo.finetune import FineTuning, describe, transfer
from ..zoo.frontends import padded
from ..zoo.saving import read_checkpoint
from .launch import FINETUNE, PRETRAINED, Launch, import_class

log = logging.getLogger(__name__)

# what beside a backbone decides which weights a model has
_OF_SHAPE = ("tie_embeddings", "patch", "filters")
# what makes a code of sound what it is
_OF_SOUND = ("sample_rate", "encoding")
# what tells classes apart, and the vectors of those that a generator makes
_OF_CLASSES = ("classifier.", "classes.")


class Start:
    """The model that a recipe starts from.

    Raises:
        ValueError: when the recipe names none, or what it names is no model.
        OSError: when that is not here and cannot be fetched.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        name = (config.get("model") or {}).get(PRETRAINED)
        if not name:
            raise ValueError(
                f"model.{PRETRAINED}: must be given: a run, a model folder, a name that `mambazoo ls` lists, or "
                "owner/name of the Hugging Face Hub"
            )
        self.name = str(name)
        try:
            self.stored = read(self.name)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"model.{PRETRAINED}: {error}") from None

    def complete(self, config: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The recipe with what it leaves open and the pretrained model decides: its shape and what its tokens are.

        The tokenizer is written to the folder.
        """
        # a run is its best checkpoint now, whatever runs there will be
        place = str(self.stored.place) if Path(self.name).expanduser().exists() else self.name
        model, data, arguments = dict(config["model"]), dict(config.get("data") or {}), self.stored.arguments
        model["backbone"] = complete_backbone(model.get("backbone") or {}, arguments.get("backbone", {}))
        for key in _OF_SHAPE:
            if key in arguments and takes(model, key):
                model.setdefault(key, arguments[key])
        vocabulary = self.stored.vocabulary
        of_text = vocabulary is not None and vocabulary["kind"] in ("bytes", "subwords")
        if vocabulary and of_text and "tokenizer" not in data and takes(data, "tokenizer"):
            data["tokenizer"] = vocabulary["kind"]
            for name, text in vocabulary_texts(vocabulary, {}).items():
                (folder / name).write_text(text, encoding="utf-8")
                data["tokenizer"] = str(folder / TOKENIZER)
        if vocabulary and vocabulary["kind"] == "waveform":
            data |= {key: vocabulary[key] for key in _OF_SOUND if key not in data and takes(data, key)}
        model[PRETRAINED] = place
        return {**config, "model": model, "data": data, FINETUNE: dict(config.get(FINETUNE) or {})}

    def hand_over(self, launch: Launch, config: dict[str, Any], *, say: bool = True) -> None:
        """Give the launched model its weights, freeze what is not trained, and keep in the recipe what starts anew.

        Raises:
            ValueError: with a line for each part, when the model is another one.
        """
        tokens = self._same_tokens(launch, say)
        kind = self.stored.task.rpartition(".")[2]
        try:
            result = transfer(launch.model, self._weights(launch), tokens)
        except ValueError as error:
            raise ValueError(
                f"model.{PRETRAINED}: {self.name}, a {kind}, does not fit; leave out model.backbone, "
                "or what else is of its shape, to have its own\n"
                f"{error}"
            ) from None
        finetuning = launch.callback(FineTuning)
        finetuning.fresh = config[FINETUNE]["fresh"] = result.fresh
        finetuning.prepare(launch.model)
        if say:
            print("\n".join([f"from {self.name}, a {kind}", *result.lines]))
            print(f"  {finetuning.mode:12} {describe(launch.model)}", flush=True)

    def _weights(self, launch: Launch) -> dict[str, Tensor]:
        """The pretrained weights, without those of classes where these have other names here."""
        here = class_names(launch.model.hparams, launch.datamodule.vocabulary)
        there = class_names(self.stored.arguments, self.stored.vocabulary)
        if not here or not there or here == there:
            return self.stored.weights
        return {name: w for name, w in self.stored.weights.items() if not name.startswith(_OF_CLASSES)}

    def _same_tokens(self, launch: Launch, say: bool) -> list[tuple[int, int]] | None:
        """The pairs of tokens (here, there) that are the same; None where the vocabularies are."""
        size, size_there = launch.model.hparams.get("vocab_size"), self.stored.arguments.get("vocab_size")
        kept, kept_there = launch.datamodule.vocabulary, self.stored.vocabulary
        if kept and kept_there and kept["kind"] == kept_there["kind"] == "waveform" and say:
            for key in _OF_SOUND:
                if kept[key] != kept_there[key]:
                    log.warning(
                        "model.%s: %s heard sound of %s %s, and data.%s is %s: leave it out to have the same",
                        PRETRAINED, self.name, key, kept_there[key], key, kept[key],
                    )  # fmt: skip
        if size is None or size_there is None:
            return None
        kinds = {words and words["kind"] for words in (kept, kept_there)}
        if not kept or not kept_there or kinds == {"waveform"}:
            # without a name, as codes of sound are, a token is its number
            return None if size == size_there else [(i, i) for i in range(min(size, size_there))]
        here, there = _names(kept, size), _names(kept_there, size_there)
        if here == there and padded(size) == padded(size_there):
            return None
        places = {name: i for i, name in enumerate(there[:size_there]) if name}
        pairs = [(i, places[name]) for i, name in enumerate(here[:size]) if name in places]
        if here != there and say:
            log.warning(
                "model.%s: %s has another vocabulary: of %d tokens the rows of %d, which it knows, are kept, and %d "
                "start anew", PRETRAINED, self.name, len(here), len(pairs), len(here) - len(pairs),
            )  # fmt: skip
        return pairs


def complete_backbone(given: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The values of a backbone that are given and, where none is, those of a stored model."""
    numbers: dict[str, Any] = dict(SIZES.get(given.get("size", ""), {}))
    rest = {key: value for key, value in given.items() if key != "size"}
    merged = OmegaConf.to_container(OmegaConf.merge(_plain(stored), numbers, rest))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def save_adapter(launch: Launch, config: dict[str, Any], best: Path, folder: Path) -> int:
    """Write what a run with LoRA has learnt, alone, from its best checkpoint; return the bytes of its weights."""
    stored, fresh = read(best), launch.callback(FineTuning).fresh
    weights = adapters.take(read_checkpoint(best)["state_dict"], fresh)
    base = Path(config["model"][PRETRAINED]).expanduser()
    name = os.path.relpath(base, folder) if base.exists() else config["model"][PRETRAINED]
    values: dict[str, Any] = {}
    texts = vocabulary_texts(stored.vocabulary, values)
    adapters.save(
        folder,
        adapters.Adapter(
            name,
            adapters.fingerprint(stored.weights),
            stored.task,
            stored.arguments,
            values["vocabulary"],
            weights,
        ),
        texts,
    )
    return (folder / adapters.WEIGHTS).stat().st_size


def _names(vocabulary: dict[str, Any], size: int) -> list[bytes]:
    """What the tokens of a vocabulary are called; codes of sound are nothing that another could know."""
    return [b""] * size if vocabulary["kind"] == "waveform" else vocabulary_from_dict(vocabulary).names()


def class_names(arguments: Mapping[str, Any], vocabulary: dict[str, Any] | None) -> list[str] | None:
    """What a model calls its classes, by its arguments or, as a generator and older models of sound, its vocabulary."""
    return arguments.get("classes") or (vocabulary or {}).get("classes") or None


def takes(section: dict[str, Any], argument: str) -> bool:
    """Whether the class of a section, or one that it hands arguments on to, has such an argument."""
    try:
        kinds = import_class(str(section.get("class_path"))).__mro__
        return any(argument in inspect.signature(kind).parameters for kind in kinds[:-1])
    except ValueError:
        # what is wrong with the class is said where it is built
        return False


def _plain(value: Any) -> Any:
    """Lists for tuples, as recipes have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
