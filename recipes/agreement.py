"""What a model must agree on with its data, and a recipe with the checkpoint that it is run from."""

import sys
from typing import Any

from .find import flat
from .finetune import complete_backbone
from .launch import Launch

# what of the model a resumed run may change: it is no part of any state
_FREE = ("model.optimizer.anomaly", "model.optimizer.spike")


def as_it_was(config: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A run's recipe where its model decides what is left to the backbone's defaults, which may have changed since."""
    stored, model = checkpoint.get("hyper_parameters", {}).get("backbone"), config["model"]
    if not stored:
        return config
    return {**config, "model": {**model, "backbone": complete_backbone(model.get("backbone") or {}, stored)}}


def must_know_classes(launch: Launch) -> None:
    """Refuse a model that was told of fewer classes than its data have, or of some where they have none."""
    told, data = launch.model.hparams.get("num_classes"), launch.datamodule
    if told is None or "num_classes" not in getattr(data, "PROVIDES", ()):
        return
    if data.num_classes is None:
        raise ValueError(
            f"model.num_classes: is {told}, and the data have no classes; give data.labels, or leave it out"
        )
    if data.num_classes > told:
        raise ValueError(
            f"model.num_classes: is {told}, and the data have {data.num_classes} classes; leave it out"
        )


def must_fit(launch: Launch, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, or of one that reads other tokens."""
    before, after = flat(checkpoint.get("hyper_parameters", {})), flat(dict(launch.model.hparams))
    # what the checkpoint does not know was not there then
    known = [key for key in after if key in before and not key.startswith("optimizer.")]
    changed = [key for key in known if before[key] != after[key]]
    if changed:
        raise ValueError(
            "\n".join(
                f"{key}: the checkpoint has {before[key]!r}, the recipe {after[key]!r}" for key in changed
            )
        )
    kept = checkpoint.get(type(launch.datamodule).__qualname__, {}).get("vocabulary")
    given = launch.datamodule.vocabulary
    if kept is not None and kept != given:
        of_sound = given is not None and kept.get("kind") == given["kind"] == "waveform"
        for key in ("encoding", "sample_rate") if of_sound else ():
            if kept[key] != given[key]:
                raise ValueError(f"data.{key}: the checkpoint has {kept[key]!r}, the recipe {given[key]!r}")
        if of_sound:
            raise ValueError(
                f"data.labels: the checkpoint has {kept.get('classes')!r}, the data {given['classes']!r}"
            )
        raise ValueError("data.tokenizer: is not the one that the checkpoint was trained with")


def refuse_changes(config: dict[str, Any], kept: dict[str, Any]) -> None:
    """Say what a resumed run cannot change: the model, and what the optimiser's saved state would override."""
    before, after = flat(kept), flat(config)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    refused = [key for key in changed if key.startswith(("model.", "finetune.")) and key not in _FREE]
    if refused:
        raise ValueError(
            "\n".join(
                f"{key}: is {before.get(key)!r} in this run and cannot become {after.get(key)!r}"
                for key in refused
            )
            + "\nthese are the run's; `mambazoo fit` starts a new run"
        )
    for key in changed:
        if key.startswith("data.") or key == "trainer.max_steps":
            print(
                f"{key}: was {before.get(key)!r}; the run will differ from one that never stopped",
                file=sys.stderr,
            )
