"""The verb `check`: everything that is wrong with a recipe at once, and what it will take, before anything runs."""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any


def check(name: str, overrides: list[str]) -> int:
    """Print what is wrong, a line each, and return 2; or what will run, and return 0."""
    from .find import compose, find

    config = compose(find(name), overrides)
    config.pop("name", None)
    from .finetune import Start
    from .launch import PRETRAINED
    from .train import launched

    with tempfile.TemporaryDirectory() as folder:
        start = None
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                if PRETRAINED in (config.get("model") or {}):
                    start = Start(config)
                    config = start.complete(config, Path(folder))
                launch = launched(config)
            if start is not None:
                start.hand_over(launch, config)
        except (ValueError, OSError) as error:
            problems = _all_problems(config, str(error).splitlines())
            print("\n".join(f"mambazoo: {problem}" for problem in problems), file=sys.stderr)
            return 2
        _report(launch)
    return 0


def _all_problems(config: dict[str, Any], found: list[str]) -> list[str]:
    """Beside what was found first, what else is found where that is left out, until there is nothing new."""
    from .launch import objections
    from .train import launched

    problems: list[str] = []
    while found:
        problems += found
        wrong = {key for problem in problems for key in problem.partition(": ")[0].split(", ")}
        config, found = _without(config, wrong), []
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                launched(config)
            # a TypeError: what is left out is something that it cannot do without
            except (ValueError, OSError, TypeError) as error:
                found = str(error).splitlines() if not isinstance(error, TypeError) else []
        found += objections(config)
        # what is left out has another value now, or none, and keys that went with it are none of their own
        new = {
            problem: problem.partition(": ")[0].split(", ")
            for problem in found
            if "no such key" not in problem
        }
        found = [problem for problem, keys in new.items() if not wrong & set(keys)]
    return list(dict.fromkeys(problems))


def _without(section: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections but for those of dotted keys."""
    kept = {name: value for name, value in section.items() if prefix + name not in keys}
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in kept.items()
    }


def _report(launch: Any) -> None:
    import torch

    from ..kernels.backend import choose
    from ..zoo.config import BackboneConfig
    from .info import training_memory

    trainer, model, data = launch.trainer, launch.model, launch.datamodule
    device = trainer.strategy.root_device
    count = sum(p.numel() for p in model.parameters())
    print(f"model     {type(model).__name__}, {count:,} parameters")
    print(f"data      {type(data).__name__}, {data.describe()}")
    print(
        f"trainer   {trainer.max_steps:,} steps on {trainer.num_devices} x {device.type}, {trainer.precision}"
    )
    print(f"kernels   {choose(None, torch.empty(0, device=device.type))} back end")
    if "backbone" in model.hparams and hasattr(data, "length"):
        tokens = data.batch_size * data.length
        size = 2 if "16" in str(trainer.precision) else 4
        memory = training_memory(model, BackboneConfig.from_dict(model.hparams["backbone"]), tokens, size)
        print(f"memory    about {memory / 2**30:.1f} GiB a device for {tokens:,} tokens a batch")
