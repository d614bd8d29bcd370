"""Making the backbone faster to train: what PyTorch fuses, and CUDA graphs where launches are what a step waits for."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F

from .backbone import Blocks
from .block import Block
from .context import ContextParallel
from .graphs import Graphs
from .sharding import FullySharded

MODES = ("default", "reduce-overhead", "graphs")


class Compile(L.Callback):
    """Compile a task's backbone in place when training starts; its state dict and its checkpoints stay the same.

    Args:
        mode: null leaves it as it is; default fuses; reduce-overhead also captures CUDA graphs, which pays where the
            model is small. Either compiles during the first steps, anew in every process, for a minute or so. graphs
            compiles nothing: it records what runs anyway, to the bit, for each shape of a batch (graphs.py), and where
            there is no GPU it leaves the backbone as it is.
    """

    def __init__(self, mode: str | None = None) -> None:
        if mode is not None and mode not in MODES:
            raise ValueError(
                f"callbacks.compile.mode: must be null or one of {', '.join(MODES)}, not {mode!r}"
            )
        self.mode = mode
        self.graphs = mode in ("reduce-overhead", "graphs")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.mode is None or stage != "fit":
            return
        backbone = getattr(pl_module, "backbone", None)
        if backbone is None:
            raise ValueError(
                f"callbacks.compile.mode: {type(pl_module).__name__} has no backbone to compile; set it to null"
            )
        device = trainer.strategy.root_device
        if self.mode == "graphs" and device.type != "cuda":
            return
        if any(isinstance(module, torch.nn.RNNBase) for module in backbone.modules()):
            raise ValueError(
                "callbacks.compile.mode: PyTorch's LSTM cannot be compiled; set it to null, or leave lstm out"
            )
        if self.graphs and device.type != "cuda":
            raise ValueError(
                f"callbacks.compile.mode: reduce-overhead captures CUDA graphs and cannot run on {device.type}; "
                "use default or null"
            )
        if isinstance(trainer.strategy, ContextParallel):
            raise ValueError(
                "callbacks.compile.mode: with context, ranks talk inside a layer, which cannot be compiled; "
                "set it to null"
            )
        if self.graphs and isinstance(trainer.strategy, FullySharded):
            raise ValueError(
                "callbacks.compile.mode: with fsdp2 parameters come and go, which CUDA graphs cannot; use default"
            )
        if self.mode == "graphs":
            if any(isinstance(m, Blocks) and m.config.checkpoint_activations for m in backbone.modules()):
                raise ValueError(
                    "callbacks.compile.mode: graphs keeps activations, which model.backbone.checkpoint_activations is "
                    "not to do; leave one of them out"
                )
            backbone.forward = Graphs(backbone)
            return
        self._try(device)
        if not isinstance(trainer.strategy, FullySharded):
            backbone.compile(mode=self.mode, fullgraph=True)
            return
        # block by block, and without the hooks that gather its parameters
        for module in backbone.modules():
            if isinstance(module, Block):
                module.forward = torch.compile(module.forward, mode=self.mode, fullgraph=True)  # type: ignore[method-assign]

    def _try(self, device: torch.device) -> None:
        """Compile next to nothing, so that a compiler that is missing is found before any work is done."""
        try:
            torch.compile(torch.nn.Softplus())(torch.ones(8, device=device))
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"callbacks.compile.mode: torch.compile does not work here ({reason}); set it to null"
            ) from error

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin(batch)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._begin(batch)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.graphs and trainer.accumulate_grad_batches > 1:
            # the graph's next run writes over its own gradients, which are the first that a parameter gets
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _forget_graphs(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        _forget_graphs(pl_module)

    def _begin(self, batch: Any) -> None:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
            pad_sequences(batch)


def _forget_graphs(task: L.LightningModule) -> None:
    backbone = getattr(task, "backbone", None)
    if backbone is not None and isinstance(backbone.forward, Graphs):
        del backbone.forward


def pad_sequences(batch: dict[str, torch.Tensor]) -> None:
    """Round the number of packed sequences up to a power of two by empty ones: there is a graph for every shape."""
    bounds = batch.get("cu_seqlens")
    if bounds is not None:
        sequences = len(bounds) - 1
        missing = (1 << (sequences - 1).bit_length()) - sequences
        batch["cu_seqlens"] = F.pad(bounds, (0, missing), value=batch["inputs"].shape[1])
