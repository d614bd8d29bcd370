"""Training on sequences that are too long for a device: the ranks of a group share each, groups train as in DDP."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from .backbone import Backbone
from .heads import IGNORE
from .mamba import Mamba
from .mixer import Mixer
from .parts import Parts

# what of a batch is as long as the sequence, and what fills it up to parts of one length
_FILL = {"inputs": 0, "targets": IGNORE, "weights": 0}


class ContextParallel(DDPStrategy):
    """Share each sequence out over `size` neighbouring ranks, and the samples over groups of them.

    The ranks of a group load the same samples, of which each keeps its part. For causal models of tokens whose mixers
    are all `mamba`; sequences are not packed.

    Args:
        size: ranks a sequence; None is all there are.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        self.parts = Parts(None, 0, 1)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {
            "num_replicas": self.world_size // self.parts.size,
            "rank": self.global_rank // self.parts.size,
        }

    def setup_environment(self) -> None:
        super().setup_environment()
        size = self.size or self.world_size
        if self.world_size % size:
            raise ValueError(
                f"trainer.strategy: {self.world_size} ranks cannot be divided into groups of {size}; change "
                "trainer.devices or the size of context"
            )
        groups = [
            torch.distributed.new_group(list(range(i, i + size))) for i in range(0, self.world_size, size)
        ]
        self.parts = Parts(groups[self.global_rank // size], self.global_rank % size, size)

    def setup(self, trainer: L.Trainer) -> None:
        model = self.lightning_module
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, Backbone) or not backbone.config.causal:
            raise ValueError(
                "trainer.strategy: context needs a causal backbone, without bidirectional, reverse_complement and pool"
            )
        if backbone.config.norm == "batch":
            raise ValueError(
                "model.backbone.norm: with context a rank has a part of each sequence, which batch would norm by "
                "itself; take rms or layer"
            )
        if getattr(model, "bptt", None) is not None:
            raise ValueError(
                "model.bptt: with context a sequence is read at once, by all ranks; set it to null"
            )
        for module in backbone.modules():
            if isinstance(module, Mamba):
                module.parts = self.parts
            elif isinstance(module, Mixer):
                raise ValueError(
                    f"trainer.strategy: context knows no {type(module).__name__}; leave model.backbone.pattern at mamba"
                )
        # a convolution looks back on no more than the part before
        self._shortest = max(
            module.config.d_conv for module in backbone.modules() if isinstance(module, Mamba)
        )
        super().setup(trainer)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return super().batch_to_device(self._part_of(batch), device, dataloader_idx)

    def _part_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "targets" not in batch:
            raise ValueError(
                "trainer.strategy: context is for models of tokens; train classifiers with ddp or fsdp2"
            )
        if "cu_seqlens" in batch:
            raise ValueError("data.packing: context splits every row alike; set it to false")
        size, rank = self.parts.size, self.parts.rank
        length = max(-(-batch["inputs"].shape[1] // size), self._shortest)
        part = dict(batch)
        for name in _FILL.keys() & batch.keys():
            x = batch[name]
            x = F.pad(x, (0, length * size - x.shape[1]), value=_FILL[name])
            part[name] = x[:, length * rank : length * (rank + 1)].contiguous()
        if "bytes" in batch:
            # shares that add up
            part["bytes"] = batch["bytes"] * (rank + 1) // size - batch["bytes"] * rank // size
        return part
