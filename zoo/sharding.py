"""Training with parameters, gradients and optimiser state shared out over the ranks (FSDP2, a few blocks at a time).

A checkpoint is the one that any other run writes, so that it goes on with any number of ranks and any strategy: whole,
or with the tensors of each rank in a file of its own (shards.py).
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from .block import Block
from .norms import BatchNorm
from .ranks import together
from .saving import NAMES, nothing, read_tensors, write_part
from .shards import FOLDER, host_copy, part_name, remove_unnamed, split

KINDS = ("whole", "sharded")
# parameters that are gathered at once, where a block has fewer: the less often, the less small models wait
TOGETHER = 1 << 24
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FullySharded(ModelParallelStrategy):
    """Each rank keeps its share of every tensor, and has the others' of some blocks only while those run.

    Parameters are gathered in the precision they are kept in, float32 under bf16-mixed, so that the state space stays
    exact; autocast then computes in bfloat16.

    Args:
        checkpoint: whole, gathered by the first rank into one file; or sharded, written by each rank, which takes as
            long however many ranks there are.
    """

    def __init__(self, checkpoint: str = "whole") -> None:
        if checkpoint not in KINDS:
            raise ValueError(
                f"trainer.strategy: checkpoint must be one of {', '.join(KINDS)}, not {checkpoint!r}"
            )
        super().__init__(tensor_parallel_size=1)
        self.checkpoint = checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        # known only once there are processes
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        assert self.model is not None
        assert self.accelerator is not None
        if trainer.state.fn == TrainerFn.FITTING and any(map(_learns_statistics, self.model.modules())):
            raise ValueError(
                "model.backbone.norm, model.filters: with fsdp2 each rank has statistics of its own where batches are "
                "normed, and only the first rank's are kept; use trainer.strategy=ddp, or norm=rms and no filters"
            )
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if not isinstance(self.model, FSDPModule):
            self._shard(self.model)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, model: nn.Module) -> None:
        # the first rank's values are everyone's, as under ddp
        for tensor in [*model.parameters(), *model.buffers()]:
            torch.distributed.broadcast(tensor.detach(), 0)
        mesh = self.device_mesh["data_parallel"]
        for blocks in groups(model):
            fully_shard(blocks, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in _STEPS:
            # the trainer calls these and not forward
            register_fsdp_forward_method(model, name)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        own = self.model.state_dict()
        state = {name: share(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.model.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shared = {
                i: {name: share(value, parameters[i]) for name, value in values.items()}
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shared})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        for write in self.writes(checkpoint, Path(filepath)):
            together(write)

    def writes(self, checkpoint: dict[str, Any], path: Path) -> tuple[Callable[[], None], Callable[[], None]]:
        """See `saving.writes`."""
        first = self.is_global_zero
        if self.checkpoint == "whole":
            whole = host_copy(checkpoint, self._gather)
            return (lambda: self.checkpoint_io.save_checkpoint(whole, path)) if first else nothing, nothing
        name = self.broadcast(f"{checkpoint['global_step']}-{time.time_ns()}")
        split_up = split({**checkpoint, FOLDER: {"folder": name, "ranks": self.world_size}})
        index, parts = host_copy(split_up)
        part = path.parent / FOLDER / name / part_name(self.global_rank)

        def finish() -> None:
            self.checkpoint_io.save_checkpoint(index, path)
            remove_unnamed(path.parent, [path.with_name(name) for name in NAMES], read_tensors)

        return lambda: write_part(part, parts), finish if first else nothing

    def _gather(self, x: DTensor) -> Tensor | None:
        """The whole of a tensor that is shared out, on the first rank alone."""
        whole = x.full_tensor()
        # what one rank has alone is whole already, and trained on
        return whole.to("cpu", copy=True) if self.is_global_zero else None


def groups(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a model, those that run one after the other together until they have TOGETHER parameters."""
    found: list[list[nn.Module]] = []
    for row in model.modules():
        if not isinstance(row, nn.ModuleList):
            continue
        size = TOGETHER
        for block in row:
            if isinstance(block, Block):
                if size >= TOGETHER:
                    found.append([])
                    size = 0
                found[-1].append(block)
                size += sum(p.numel() for p in block.parameters())
    return found


def _learns_statistics(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and module.weight.requires_grad


def share(value: Any, like: Tensor | None) -> Any:
    """This rank's share of a whole tensor, where `like`, of the same shape, is shared out."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
