"""Language modelling: predict the next token of text, measured in bits per byte and perplexity."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from .backbone import Backbone
from .config import BackboneConfig
from .frontends import TokenEmbedding
from .heads import IGNORE, TokenHead, cross_entropy
from .task import Batch, Task


class LanguageModel(Task):
    """A next-token model over a vocabulary, with constant-size state.

    Args:
        backbone: the fields of BackboneConfig, or {"size": "mamba-130m"} and what differs from it.
        vocab_size: how many tokens there are; a recipe leaves it to the data module.
        tie_embeddings: read out with the embedding's weight, as every released Mamba does.
        optimizer: the fields of OptimizerConfig.
    """

    CONFIGS: ClassVar = {**Task.CONFIGS, "backbone": BackboneConfig}

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int,
        tie_embeddings: bool = True,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer)
        config = BackboneConfig.from_dict(backbone, "model.backbone")
        self.save_hyperparameters(
            {
                "backbone": config.to_dict(),
                "vocab_size": vocab_size,
                "tie_embeddings": tie_embeddings,
                "optimizer": self.optimizer_config.to_dict(),
            },
            logger=False,
        )
        self.embedding = TokenEmbedding(vocab_size, config.d_model)
        self.backbone = Backbone(config)
        self.head = TokenHead(vocab_size, config.d_model, self.embedding if tie_embeddings else None)
        self.nll = MeanMetric().set_dtype(torch.float64)
        self.bits_per_byte = MeanMetric().set_dtype(torch.float64)

    def forward(
        self, tokens: Tensor, *, state: list[Any] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Any] | None]:
        """Logits (b, l, vocab_size) of the token after each of (b, l) and, if a state came in, the state after them."""
        y, state = self.backbone(self.embedding(tokens), state=state, cu_seqlens=cu_seqlens)
        return self.head(y), state

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits (b, vocab_size) of the token after tokens (b,); the state is moved on in place."""
        y, state = self.backbone.step(self.embedding(tokens), state)
        return self.head(y), state

    def init_state(self, batch: int) -> list[Any]:
        """The state before the first token of `batch` sequences."""
        return self.backbone.init_state(batch)

    def token_losses(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of every target in nats (b, l), 0 where it is ignored."""
        logits, _ = self(batch["inputs"], cu_seqlens=batch.get("cu_seqlens"))
        return cross_entropy(logits, batch["targets"])

    def training_loss(self, batch: Batch) -> Tensor:
        losses = self.token_losses(batch)
        return losses.sum() / (batch["targets"] != IGNORE).sum().clamp(min=1)

    def measure(self, batch: Batch, stage: str) -> None:
        total, tokens = self.token_losses(batch).sum(), (batch["targets"] != IGNORE).sum().clamp(min=1)
        self.nll.update(total / tokens, tokens)
        self.log(f"{stage}/loss", self.nll, on_epoch=True, prog_bar=True)
        if "bytes" in batch:
            size = batch["bytes"].sum()
            self.bits_per_byte.update(total / size / math.log(2), size)
            self.log(f"{stage}/bits_per_byte", self.bits_per_byte, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, float]]:
        """For each sequence of a batch, its targets and their negative log-likelihood in nats."""
        losses, counted = self.token_losses(batch).detach(), batch["targets"] != IGNORE
        if "cu_seqlens" in batch:
            sizes = batch["cu_seqlens"].diff().tolist()
            rows = zip(losses[0].split(sizes), counted[0].split(sizes), strict=True)
        else:
            rows = zip(losses, counted, strict=True)
        return [{"tokens": int(used.sum()), "nll": float(row.sum())} for row, used in rows]

    def on_validation_epoch_end(self) -> None:
        self.log("val/perplexity", torch.exp(self.nll.compute()))

    def on_test_epoch_end(self) -> None:
        self.log("test/perplexity", torch.exp(self.nll.compute()))
