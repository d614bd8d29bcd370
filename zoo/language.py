"""Language modelling: predict the next token of text, measured in bits per byte and perplexity."""

import math
from typing import Any

import torch
from torchmetrics import MeanMetric

from .task import Batch
from .tokens import TokenModel


class LanguageModel(TokenModel):
    """A next-token model over a vocabulary, with constant-size state.

    Args:
        backbone: the fields of BackboneConfig, or {"size": "mamba-130m"} and what differs from it.
        vocab_size: how many tokens there are; a recipe leaves it to the data module.
        tie_embeddings: read out with the embedding's weight, as every released Mamba does.
        optimizer: the fields of OptimizerConfig.
        bptt: see TokenModel.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int,
        tie_embeddings: bool = True,
        optimizer: dict[str, Any] | None = None,
        bptt: int | None = None,
    ) -> None:
        super().__init__(backbone, vocab_size, tie_embeddings, optimizer, bptt=bptt)
        if not self.backbone.config.causal:
            raise ValueError(
                "model.backbone: a model of the next token must not see it; leave out bidirectional and "
                "reverse_complement"
            )
        self.bits_per_byte = MeanMetric().set_dtype(torch.float64)

    def measure(self, batch: Batch, stage: str) -> None:
        nll = self.log_loss(batch, self.hidden(batch), stage)
        if "bytes" in batch:
            size = batch["bytes"].sum()
            self.bits_per_byte.update(nll / size.clamp(min=1) / math.log(2), size)
            self.log(f"{stage}/bits_per_byte", self.bits_per_byte, on_epoch=True, prog_bar=True)
