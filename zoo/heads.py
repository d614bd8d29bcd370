"""What reads the backbone's output: a distribution over tokens and its loss, or one vector for a whole sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cross_entropy import linear_cross_entropy
from .frontends import TokenEmbedding, padded

IGNORE = -100
POOLINGS = ("last", "mean", "masked", "max")


class TokenHead(nn.Module):
    """Logits of tokens, (..., d_model) to (..., vocab_size), with the embedding's weight or its own.

    With the complement of each token (vocab_size,) it reads (..., 2 d_model), both strands: a token has the logit that
    one gives it and its complement has from the other (Caduceus-PS, 2403.03234, section 4).
    """

    complement: Tensor | None

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        embedding: TokenEmbedding | None = None,
        complement: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        weight = nn.init.normal_(torch.empty(padded(vocab_size), d_model), std=0.02)
        self.weight = nn.Parameter(weight) if embedding is None else embedding.weight
        if complement is not None:
            complement = torch.cat([complement, torch.arange(vocab_size, padded(vocab_size))])
        self.register_buffer("complement", complement, persistent=False)

    @property
    def matrix(self) -> Tensor:
        """What the vectors are multiplied by: a row for every token."""
        if self.complement is None:
            return self.weight
        return torch.cat([self.weight, self.weight[self.complement]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)[..., : self.vocab_size]

    def loss(self, x: Tensor, targets: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of the losses of targets (...), and each of them in nats, without gradient (cross_entropy.py)."""
        return linear_cross_entropy(
            x,
            self.matrix,
            targets,
            token_weights=token_weights,
            vocab_size=self.vocab_size,
            ignore_index=IGNORE,
        )


def pool(y: Tensor, pooling: str, lengths: Tensor | None = None, *, strands: bool = False) -> Tensor:
    """One vector (b, d) of y (b, l, d) for each sequence.

    Args:
        pooling: last, the last position; masked, the mean over positions, of which lengths (b,) says how many there are
            where sequences are padded at their end; mean, over all positions, padding included; max, over a sequence's
            own positions the largest of each number.
        lengths: None where nothing is padded.
        strands: y is (b, l, 2 d), both strands (strands.py): each is pooled in its direction, and their mean returned.
    """
    ends = y.new_full((len(y),), y.shape[1], dtype=torch.long) if lengths is None else lengths
    if pooling == "last":
        pooled = y[torch.arange(len(y), device=y.device), ends - 1]
        if strands:
            # the other strand is read from the end, and ends where the sequence starts
            d = y.shape[2] // 2
            pooled = torch.cat([pooled[:, :d], y[:, 0, d:]], dim=-1)
    elif lengths is None or pooling == "mean":
        pooled = y.amax(1) if pooling == "max" else y.mean(1)
    else:
        inside = (torch.arange(y.shape[1], device=y.device) < ends[:, None]).unsqueeze(-1)
        largest = pooling == "max"
        pooled = y.where(inside, -torch.inf).amax(1) if largest else (y * inside).sum(1) / ends[:, None]
    return pooled.unflatten(-1, (2, -1)).mean(1) if strands else pooled
