"""Random numbers that a resumed run continues and validation does not disturb; Lightning 2.6 keeps neither."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch

from .ranks import gather_objects


class RandomStates(L.Callback):
    """Keep the states of every rank's generators in the checkpoint, and put them back after validation.

    The ranks of a new run draw different numbers, once the model is built. So does, in a run that goes on, a rank that
    there was not before.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []
        self._before_validation: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather_objects(random_states())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # set when training starts: what happens until then may draw numbers too
        self._restored = state["ranks"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank < len(self._restored):
            set_random_states(self._restored[trainer.global_rank])
        elif trainer.global_rank:
            seed = torch.initial_seed() + trainer.global_rank
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        self._restored = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before_validation = random_states()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._before_validation is not None:
            set_random_states(self._before_validation)


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # of the one GPU that a rank has; to ask for others would wake them
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
