"""Models of genomes: predict the next base, or bases that are masked, measured in bits per base.

Which of the two a model learns is the data's choice, and its batches say it: the target of a position is the next
input, or what a masked base was. Either way the loss is the mean over targets, weighted where the batch has weights.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from ..kernels.sequences import reverse
from .heads import IGNORE
from .strands import complement_table, reverse_complement
from .task import Batch
from .tokens import TokenModel

# so many targets that all happen to be the next input are no accident
_TELLING = 16


class GenomeModel(TokenModel):
    """A distribution over bases at every position.

    Args:
        backbone: the fields of BackboneConfig, or {"size": "mamba-1.4m"} and what differs from it. One that is
            bidirectional or reads both strands predicts masked bases only: it sees the next one.
        vocab_size: how many tokens there are; a recipe leaves it to the data module.
        complement: the complement of every token, itself where it has none; a recipe leaves it to the data module.
        tie_embeddings: read out with the embedding's weight.
        optimizer: the fields of OptimizerConfig.
        bptt: see TokenModel.
    """

    complement: Tensor | None

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int,
        complement: list[int] | None = None,
        tie_embeddings: bool = True,
        optimizer: dict[str, Any] | None = None,
        bptt: int | None = None,
    ) -> None:
        super().__init__(backbone, vocab_size, tie_embeddings, optimizer, complement, bptt)
        self.save_hyperparameters({"complement": complement}, logger=False)
        table = None if complement is None else complement_table(complement, vocab_size)
        self.register_buffer("complement", table, persistent=False)
        self.accuracy = MeanMetric().set_dtype(torch.float64)
        self._sees_targets: bool | None = False if self.backbone.config.causal else None

    def average_strands(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (b, l, vocab_size) of tokens (b, l), the mean of what both strands say (Caduceus-PH, 2403.03234).

        For a model of masked bases; one of the next base predicts other bases on the other strand.
        """
        if self.complement is None:
            raise ValueError("averaging over strands needs the complement of every token: give the model one")
        logits, _ = self(tokens, cu_seqlens=cu_seqlens)
        other, _ = self(
            reverse_complement(tokens, self.complement, cu_seqlens=cu_seqlens), cu_seqlens=cu_seqlens
        )
        return (logits + reverse(other, cu_seqlens=cu_seqlens)[..., self.complement]) / 2

    def hidden(self, batch: Batch) -> Tensor:
        if self._sees_targets is None:
            self._sees_targets = targets_are_next_inputs(batch)
        if self._sees_targets:
            raise ValueError(
                "model.backbone: one that is bidirectional or reads both strands (reverse_complement) sees the next "
                "base, which this data asks for: choose masked targets in data, or leave both options out"
            )
        return super().hidden(batch)

    def measure(self, batch: Batch, stage: str) -> None:
        y, targets = self.hidden(batch), batch["targets"]
        self.log_loss(batch, y, stage)
        count = (targets != IGNORE).sum()
        # no token is IGNORE
        hits = (self.head(y).argmax(-1) == targets).sum()
        self.accuracy.update(hits / count.clamp(min=1), count)
        self.log(f"{stage}/accuracy", self.accuracy, on_epoch=True)

    def log_perplexity(self, stage: str) -> Tensor:
        nll = super().log_perplexity(stage)
        self.log(f"{stage}/bits_per_base", nll / math.log(2), prog_bar=True)
        return nll


def targets_are_next_inputs(batch: Batch) -> bool | None:
    """Whether a batch asks for the next token of each; None where it has too few targets to tell."""
    inputs, targets = batch["inputs"][:, 1:], batch["targets"][:, :-1]
    counted = targets != IGNORE
    if "cu_seqlens" in batch:
        # the last position of a sequence asks for none of this row
        ends = batch["cu_seqlens"][1:-1].long() - 1
        counted = counted.index_fill(1, ends[ends >= 0].clamp(max=counted.shape[1] - 1), False)
    if counted.sum() < _TELLING:
        return None
    # masked bases may be followed by their like, as in a run of one base, but they stand apart
    in_a_row = 2 * (counted[:, 1:] & counted[:, :-1]).sum() > counted.sum()
    return bool(in_a_row & (targets == inputs)[counted].all())
