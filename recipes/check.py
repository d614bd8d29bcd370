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
    from .launch import PRETRAINED, objections
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
            problems = str(error).splitlines()
            problems += objections(config, problems)
            print("\n".join(f"mambazoo: {problem}" for problem in dict.fromkeys(problems)), file=sys.stderr)
            return 2
        _report(launch)
    return 0


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
