"""Models of raw audio: predict the next sample's code, measured in bits per sample."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .task import Batch
from .tokens import TokenModel


class WaveformModel(TokenModel):
    """A distribution over the code of the next sample, from a state of constant size.

    A batch's labels (b,) are read where the model knows classes: a vector learnt for each is added to every input. In
    the state it is the first part, so that a recording that is gone on with stays of its class.

    Args:
        backbone: the fields of BackboneConfig or, with `pool`, those of UNetConfig.
        vocab_size: how many codes there are; a recipe leaves it to the data module.
        num_classes: how many classes there are; a recipe leaves it to the data module, or says null to learn all
            recordings as one kind.
        tie_embeddings: read out with the embedding's weight.
        optimizer: the fields of OptimizerConfig.
        bptt: see TokenModel.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        vocab_size: int = 256,
        num_classes: int | None = None,
        tie_embeddings: bool = False,
        optimizer: dict[str, Any] | None = None,
        bptt: int | None = None,
    ) -> None:
        super().__init__(backbone, vocab_size, tie_embeddings, optimizer, bptt=bptt)
        self.save_hyperparameters({"num_classes": num_classes}, logger=False)
        config = self.backbone.config
        if not config.causal:
            raise ValueError(
                "model.backbone: a model of the next sample must not see it; leave out bidirectional"
            )
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"model.num_classes: must be 1 or more, or null, not {num_classes}")
        self.num_classes = num_classes
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes, config.d_model)
            nn.init.normal_(self.classes.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        *,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, list[Any] | None]:
        """Logits (b, l, vocab_size) at each of tokens (b, l) and the state; labels (b,) where none came in."""
        y, state = self.mix(tokens, state=state, cu_seqlens=cu_seqlens, labels=labels)
        return self.head(y), state

    def mix(
        self,
        tokens: Tensor,
        *,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, list[Any] | None]:
        if self.num_classes is None:
            return super().mix(tokens, state=state, cu_seqlens=cu_seqlens)
        vector = self._vectors(labels) if state is None else state[0]
        if cu_seqlens is None:
            added = vector.unsqueeze(1)
        else:
            added = vector.repeat_interleave(cu_seqlens.diff(), 0, output_size=tokens.shape[1])[None]
        before = None if state is None else state[1:]
        y, after = self.backbone(self.embedding(tokens) + added, state=before, cu_seqlens=cu_seqlens)
        return y, None if after is None else [vector, *after]

    def step(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        if self.num_classes is None:
            return super().step(tokens, state)
        y, after = self.backbone.step(self.embedding(tokens) + state[0], state[1:])
        return self.head(y), [state[0], *after]

    def init_state(self, batch: int, labels: Tensor | None = None) -> list[Any]:
        """The state before the first sample of `batch` recordings, of classes labels (b,)."""
        state = super().init_state(batch)
        return state if self.num_classes is None else [self._vectors(labels), *state]

    def start(self, batch: Batch) -> list[Any]:
        return self.init_state(len(batch["inputs"]), batch.get("labels"))

    def detached(self, state: list[Any]) -> list[Any]:
        # the vector of a class is no memory of what was read
        return (
            super().detached(state) if self.num_classes is None else [state[0], *super().detached(state[1:])]
        )

    def hidden(self, batch: Batch) -> Tensor:
        y, _ = self.mix(batch["inputs"], cu_seqlens=batch.get("cu_seqlens"), labels=batch.get("labels"))
        return y

    def measure(self, batch: Batch, stage: str) -> None:
        self.log_loss(batch, self.hidden(batch), stage)

    def log_perplexity(self, stage: str) -> Tensor:
        nll = super().log_perplexity(stage)
        self.log(f"{stage}/bits_per_sample", nll / math.log(2), prog_bar=True)
        return nll

    def _vectors(self, labels: Tensor | None) -> Tensor:
        """What is added to the inputs of recordings of classes labels (b,): (b, d_model)."""
        if labels is None:
            raise ValueError(
                f"this model knows {self.num_classes} classes of recordings: say with labels (b,) which they are"
            )
        return F.embedding(labels, self.classes.weight)
