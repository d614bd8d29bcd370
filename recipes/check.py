"""The verb `check`: everything that is wrong with a recipe at once, and what it will take, before anything runs."""

import contextlib
import io
import re
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
        start, complete = None, False
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                if PRETRAINED in (config.get("model") or {}):
                    start = Start(config)
                    config = start.complete(config, Path(folder))
                complete = True
                launch = launched(config)
            if start is not None:
                start.hand_over(launch, config)
        except (ValueError, OSError) as error:
            problems = _all_problems(config, str(error).splitlines(), complete)
            print("\n".join(f"mambazoo: {problem}" for problem in problems), file=sys.stderr)
            return 2
        _report(launch)
    return 0


def _all_problems(config: dict[str, Any], found: list[str], complete: bool) -> list[str]:
    """Beside what was found first, what is found where that is left out, until nothing else is or can be left out.

    Args:
        complete: whether all is there to build the model; else the other sections are looked at alone.
    """
    from .launch import objections
    from .train import launched

    def build(config: dict[str, Any]) -> list[str]:
        try:
            launched(config)
        except (ValueError, OSError) as error:
            return str(error).splitlines()
        return []

    problems, left = list(dict.fromkeys(found)), None
    wrong = {key for problem in problems for key in _keys(problem)}
    config = _without(config, wrong)
    while config != left:
        left = config
        for attempt in (build, objections) if complete else (objections,):
            # an error of another kind: what is left out is something that others cannot do without
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(Exception):
                new = [problem for problem in dict.fromkeys(attempt(config)) if not _follows(problem, wrong)]
                problems += [problem for problem in new if problem not in problems]
            wrong = {key for problem in problems for key in _keys(problem)}
            config = _without(config, wrong)
    return problems


def _keys(problem: str) -> list[str]:
    """The values that a problem is about; of a section as a whole there is none that could be left out."""
    match = re.match(r"[\w.]+(, [\w.]+)*(?=: )", problem)
    return [key for key in match[0].split(", ") if "." in key] if match else []


def _follows(problem: str, wrong: set[str]) -> bool:
    """Whether a problem is there since something wrong was left out."""
    keys = _keys(problem)
    if "no such key" in problem:
        # of what is beside it, that is
        return any(key.rpartition(".")[0] == other.rpartition(".")[0] for key in keys for other in wrong)
    return any(f"{key}.".startswith(f"{other}.") for key in keys for other in wrong)


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
