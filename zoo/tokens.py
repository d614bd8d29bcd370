"""Models of sequences of tokens: what language and genomes have in common, from embedding to log-likelihood."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from .config import BackboneConfig
from .frontends import TokenEmbedding
from .heads import IGNORE, TokenHead
from .ranks import ranks, sum_over_ranks
from .strands import complement_table
from .task import Batch, Task
from .unet import build_backbone


class TokenModel(Task):
    """A distribution over tokens at every position. A causal one has a state of constant size.

    Args:
        backbone: the fields of BackboneConfig, or {"size": "mamba-130m"} and what differs from it; or, with `pool`,
            those of UNetConfig.
        vocab_size: how many tokens there are; a recipe leaves it to the data module.
        tie_embeddings: read out with the embedding's weight.
        optimizer: the fields of OptimizerConfig.
        complement: the complement of every token, for a backbone that reads both strands.
        bptt: in training, read rows so many tokens at a time, the state handed on from one window to the next, and take
            gradients within windows alone (truncated backpropagation through time). Memory is that of a window, and
            its forward runs twice. None reads rows whole.
    """

    CONFIGS: ClassVar = {**Task.CONFIGS, "backbone": BackboneConfig}

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int,
        tie_embeddings: bool,
        optimizer: dict[str, Any] | None,
        complement: list[int] | None = None,
        bptt: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        config = BackboneConfig.from_dict(backbone, "model.backbone")
        if bptt is not None and bptt < 1:
            raise ValueError(f"model.bptt: must be 1 or more tokens, or null, not {bptt}")
        if bptt is not None and not config.causal:
            raise ValueError(
                "model.bptt: hands on what was read before, and a model that sees both sides has no such state"
            )
        self.bptt = bptt
        self.save_hyperparameters(
            {
                "backbone": config.to_dict(),
                "vocab_size": vocab_size,
                "tie_embeddings": tie_embeddings,
                "bptt": bptt,
                "optimizer": self.optimizer_config.to_dict(),
            },
            logger=False,
        )
        table = complement_table(complement, vocab_size) if config.reverse_complement else None
        self.embedding = TokenEmbedding(vocab_size, config.d_model, table)
        self.backbone = build_backbone(config)
        self.head = TokenHead(vocab_size, config.d_model, self.embedding if tie_embeddings else None, table)
        # of all targets alike, and as they are weighted in the loss
        self.nll = MeanMetric().set_dtype(torch.float64)
        self.loss = MeanMetric().set_dtype(torch.float64)

    def forward(
        self, tokens: Tensor, *, state: list[Any] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Any] | None]:
        """Logits (b, l, vocab_size) at each of tokens (b, l) and, if a state came in, the state after them."""
        y, state = self.mix(tokens, state=state, cu_seqlens=cu_seqlens)
        return self.head(y), state

    def mix(
        self, tokens: Tensor, *, state: list[Any] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Any] | None]:
        """What the head reads at each of tokens (b, l), (b, l, d), and the state, as in `forward`."""
        return self.backbone(self.embedding(tokens), state=state, cu_seqlens=cu_seqlens)

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits (b, vocab_size) of the token after tokens (b,); the state is moved on in place."""
        y, state = self.backbone.step(self.embedding(tokens), state)
        return self.head(y), state

    def init_state(self, batch: int) -> list[Any]:
        """The state before the first token of `batch` sequences."""
        return self.backbone.init_state(batch)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the weighted negative log-likelihoods in nats, and that of every target (b, l), not weighted.

        Only the sum has a gradient; where a target is ignored there is 0.
        """
        return self.head.loss(self.hidden(batch), batch["targets"], batch.get("weights"))

    def hidden(self, batch: Batch) -> Tensor:
        """What the head reads, (b, l, d)."""
        y, _ = self.mix(batch["inputs"], cu_seqlens=batch.get("cu_seqlens"))
        return y

    def training_loss(self, batch: Batch) -> Tensor:
        total = self.losses(batch)[0] if self.bptt is None else self._loss_in_windows(batch, self.bptt)
        return total * ranks() / sum_over_ranks(weight_of(batch))

    def _loss_in_windows(self, batch: Batch, length: int) -> Tensor:
        """The summed loss of rows that are read window after window, without gradients from one to another."""
        if "cu_seqlens" in batch:
            raise ValueError(
                "model.bptt: reads rows in windows, and packed ones lie end to end: set data.packing=false"
            )
        rows = {name: batch[name] for name in ("inputs", "targets", "weights") if name in batch}
        losses, state = [], self.start(batch)
        for begin in range(0, batch["inputs"].shape[1], length):
            window = {name: x[:, begin : begin + length] for name, x in rows.items()}
            # what a window leaves in memory is its state: the rest is made again for its gradient
            loss, state = checkpoint(self._read_window, window, state, use_reentrant=False)
            losses.append(loss)
            state = self.detached(state)
        return torch.stack(losses).sum()

    def _read_window(self, window: Batch, state: list[Any]) -> tuple[Tensor, list[Any] | None]:
        y, after = self.mix(window["inputs"], state=state)
        return self.head.loss(y, window["targets"], window.get("weights"))[0], after

    def start(self, batch: Batch) -> list[Any]:
        """The state before the first token of a batch."""
        return self.init_state(len(batch["inputs"]))

    def detached(self, state: list[Any]) -> list[Any]:
        """A state as a window after it is given: what gradients do not go through."""
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)

    def log_loss(self, batch: Batch, y: Tensor, stage: str) -> Tensor:
        """Log the loss of a held-out batch from what the head reads; return the summed negative log-likelihood."""
        total, losses = self.head.loss(y, batch["targets"], batch.get("weights"))
        weight, count = weight_of(batch), (batch["targets"] != IGNORE).sum()
        nll = losses.sum() if "weights" in batch else total
        # a batch with nothing to predict counts for nothing
        self.nll.update(nll / count.clamp(min=1), count)
        self.loss.update(total / weight, weight * (count > 0))
        self.log(f"{stage}/loss", self.loss, on_epoch=True, prog_bar=True)
        return nll

    def log_perplexity(self, stage: str) -> Tensor:
        """Log the perplexity of all held-out targets; return their mean negative log-likelihood."""
        nll = self.nll.compute()
        self.nll.reset()
        self.log(f"{stage}/perplexity", torch.exp(nll))
        return nll

    def on_validation_epoch_end(self) -> None:
        self.log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        self.log_perplexity("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, float]]:
        """For each sequence of a batch, its targets and their negative log-likelihood in nats."""
        (_, losses), counted = self.losses(batch), batch["targets"] != IGNORE
        if "cu_seqlens" in batch:
            sizes = batch["cu_seqlens"].diff().tolist()
            rows = zip(losses[0].split(sizes), counted[0].split(sizes), strict=True)
        else:
            rows = zip(losses, counted, strict=True)
        return [{"tokens": int(used.sum()), "nll": float(row.sum())} for row, used in rows]


def weight_of(batch: Batch) -> Tensor:
    """What all targets of a batch count together: their number, or the sum of their weights."""
    counted = batch["targets"] != IGNORE
    if "weights" not in batch:
        return counted.sum().clamp(min=1)
    return (batch["weights"] * counted).sum().clamp(min=1e-6)
