"""The contract between data and tasks, and the data module that every domain's builds on.

A batch is a dict of tensors:
    inputs     (b, l) integer tokens, or (b, l, features)
    targets    (b, l) integers, -100 where nothing is to be predicted, and/or labels (b,), where alone with -100 too
    weights    (b, l), optional: what each target counts in the loss
    lengths    (b,), optional: how many inputs of each row there are; the rest are padding
    cu_seqlens (s + 1,) int32, optional, beside b = 1: sequence i is [cu_seqlens[i], cu_seqlens[i + 1])
    bytes      (), optional: the bytes of text that the targets stand for

A loader may hand over integers of 8 or 16 bits, which are cheap to move; tasks are given 64. Tasks and data modules
meet nowhere else: a data module knows no model, a task no file.
"""

import logging
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .order import STAND_IN, EndlessBatches, OrderedBatches, permute

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
IGNORE = -100
# marks the row of a stand-in on its way to the batch
_STAND_IN = "stand_in"


class Samples(Protocol):
    """A set of samples that can be read in any order, and differently on every pass (random offsets, augmentation)."""

    def __len__(self) -> int: ...

    def read(self, index: int, pass_: int) -> dict[str, Any]: ...


class DataModule(L.LightningDataModule):
    """Serve training samples in the endless order of datamodules/order.py, held-out ones from first to last.

    A subclass prepares its data in `prepare_data` and `setup`, which sets `samples`: "train", "val" and, where there is
    one, "test". PROVIDES names the attributes that a model must know and that it has from the start
    (`vocab_size`); `vocabulary` is what a checkpoint must keep to read and write tokens; `fingerprint`, where `setup`
    finds one, is a digest of all that was read, by which who goes on with changed data is warned.

    Args:
        batch_size: samples per device and step.
        num_workers: processes that read ahead; 0 reads in the main one. The order does not depend on it.
        seed: of the order.
    """

    PROVIDES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size: must be 1 or more, not {batch_size}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: must be 0 or more, not {num_workers}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.samples: dict[str, Samples] = {}
        self.fingerprint: str | None = None
        # training samples consumed over all ranks: the whole state of the order
        self.position = 0
        # among how many ranks, and as which, batches are rebuilt; None is as the trainer says
        self._rebuilding: tuple[int, int] | None = None

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        """Plain values from which datamodules/vocab.py rebuilds what turns text into tokens and back."""
        return None

    def describe(self) -> str:
        """What there is to read, in a few words."""
        return f"batches of {self.batch_size}"

    @property
    def tested(self) -> str:
        """The split that is tested and predicted: "test", or "val" where there is none."""
        return "test" if "test" in self.samples else "val"

    def names(self) -> list[str] | None:
        """After `setup`: what each sample is called that `mambazoo predict` reads, in their order, if it has a name."""
        return None

    def baselines(self) -> Iterator[tuple[str, float]]:
        """After `setup`: what simple models that learn from the training split reach on the validation split, by name.

        Each comes when it is computed, in the unit that the name ends with.
        """
        yield from ()

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of samples."""
        return default_collate(rows)

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = self._world()
        batches = EndlessBatches(self.position, self.batch_size, rank, world)
        return self._loader(Ordered(self.samples["train"], self.seed), batches)

    def rebuild(self, position: int, world: int, rank: int) -> tuple[list[Any], Batch]:
        """The training batch that one of `world` ranks read at a position, and the items of it in the endless order."""
        self.position, self._rebuilding = position, (world, rank)
        loader = self.train_dataloader()
        [items], [batch] = ([next(iter(each))] for each in (loader.batch_sampler, loader))  # type: ignore[arg-type]
        return items, self.on_after_batch_transfer(batch, 0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._held_out(self.tested)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        # called once for every batch that is about to be used, never for one that a worker has read ahead
        if self.trainer is not None and self.trainer.training:
            self.position += self.batch_size * self._world()[0]
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        small = (torch.uint8, torch.int8, torch.int16)
        return {key: value.long() if value.dtype in small else value for key, value in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "vocabulary": self.vocabulary, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        first = self.trainer is not None and self.trainer.training and self.trainer.is_global_zero
        if first and state.get("fingerprint") not in (None, self.fingerprint):
            log.warning(
                "the data are others than when this checkpoint was written; the run will differ from one that never "
                "stopped"
            )

    def _held_out(self, split: str) -> DataLoader[Any]:
        world, rank = self._world()
        batches = OrderedBatches(len(self.samples[split]), self.batch_size, rank, world)
        return self._loader(InOrder(self.samples[split]), batches)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        stand_in = any(row.pop(_STAND_IN, False) for row in rows)
        batch = self.collate(rows)
        return _count_for_nothing(batch) if stand_in else batch

    def _loader(self, dataset: Dataset[Any], batches: Any) -> DataLoader[Any]:
        return Loader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            # a generator of its own, so that opening a loader takes nothing from the global stream
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _world(self) -> tuple[int, int]:
        """Among how many the samples are shared, and which of them this is; several ranks may work on the same."""
        if self._rebuilding:
            return self._rebuilding
        sharing = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (sharing["num_replicas"], sharing["rank"]) if sharing else (1, 0)


class Loader(DataLoader[Any]):
    """A loader that counts the seconds for which it was waited for."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        asked, batches = time.monotonic(), super().__iter__()
        for batch in batches:
            self.waited += time.monotonic() - asked
            yield batch
            asked = time.monotonic()


def _leave_signals_to_the_main_process(worker: int) -> None:
    # what stops a run is sent to all its processes; the main one still needs its workers for the last step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Ordered(Dataset[Any]):
    """Training samples by their number in the endless order."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.samples.read(*self.place(number))

    def place(self, number: int) -> tuple[int, int]:
        """The index of a sample, by its number, and in which pass it is read."""
        pass_, index = divmod(number, len(self.samples))
        return permute(index, len(self.samples), self.seed, pass_), pass_


class InOrder(Dataset[Any]):
    """Held-out samples by their index, the same on every pass."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == STAND_IN:
            return {**self.samples.read(0, 0), _STAND_IN: True}
        return self.samples.read(index, 0)


def _count_for_nothing(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what is to be predicted out of a batch, so that it adds nothing to any metric."""
    batch["targets" if "targets" in batch else "labels"].fill_(IGNORE)
    if "bytes" in batch:
        batch["bytes"].zero_()
    return batch
