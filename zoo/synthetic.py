"""Tasks made up to show what a mixer can do: answers asked at a few places of a row, measured by accuracy."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from .heads import IGNORE
from .task import Batch
from .tokens import TokenModel


class SyntheticTask(TokenModel):
    """A model that says a token where it is asked for one. It logs the share of answers, and of rows, that are right.

    Rows of several lengths are also told apart by length: test/accuracy_4096.

    Args:
        backbone: the fields of BackboneConfig, or {"size": ...} and what differs from it.
        vocab_size: how many tokens there are; a recipe leaves it to the data module.
        tie_embeddings: read out with the embedding's weight.
        chunk: how many positions are measured at once; a longer row is read in parts with the state handed on, in
            memory that does not grow with it.
        optimizer: the fields of OptimizerConfig.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int,
        tie_embeddings: bool = False,
        chunk: int = 16384,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, vocab_size, tie_embeddings, optimizer)
        if chunk < 1:
            raise ValueError(f"model.chunk: must be 1 or more, not {chunk}")
        self.chunk = chunk
        self.accuracy, self.sequence_accuracy = MeanMetric(), MeanMetric()
        self.by_length = nn.ModuleDict()

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For each target of a batch (n,): its row, whether the most likely token is it, and its loss in nats."""
        l, found = batch["inputs"].shape[1], []
        in_parts = l > self.chunk and self.backbone.config.causal
        state = self.init_state(len(batch["inputs"])) if in_parts else None
        size = self.chunk if in_parts else l
        for inputs, targets in zip(
            batch["inputs"].split(size, 1), batch["targets"].split(size, 1), strict=True
        ):
            y, state = self.mix(inputs, state=state)
            row, place = (targets != IGNORE).nonzero(as_tuple=True)
            logits, wanted = self.head(y[row, place]).float(), targets[row, place]
            found.append(
                (row, logits.argmax(-1) == wanted, F.cross_entropy(logits, wanted, reduction="none"))
            )
        rows, right, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
        return rows, right, losses

    def measure(self, batch: Batch, stage: str) -> None:
        rows, right, losses = self.answers(batch)
        if not len(rows):
            return
        asked = torch.zeros(len(batch["inputs"]), device=rows.device)
        asked, said = (
            asked.index_add(0, rows, torch.ones_like(losses)),
            asked.index_add(0, rows, right.float()),
        )
        whole = (asked == said)[asked > 0]
        self.loss.update(losses.mean(), len(rows))
        self.accuracy.update(right.float().mean(), len(rows))
        self.sequence_accuracy.update(whole.float().mean(), len(whole))
        length = str(batch["inputs"].shape[1])
        if length not in self.by_length:
            self.by_length[length] = MeanMetric().to(rows.device)
        of_length: Any = self.by_length[length]
        of_length.update(right.float().mean(), len(rows))

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        metrics: dict[str, Any] = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "sequence_accuracy": self.sequence_accuracy,
        }
        if len(self.by_length) > 1:
            metrics |= {f"accuracy_{length}": metric for length, metric in self.by_length.items()}
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric.compute().float(), prog_bar=name in ("loss", "accuracy"))
            metric.reset()
        self.by_length.clear()
