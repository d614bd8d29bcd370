"""What reads the backbone's output: the next token's distribution, and its loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frontends import TokenEmbedding, padded

IGNORE = -100


class TokenHead(nn.Module):
    """Logits of the next token, (..., d_model) to (..., vocab_size), with the embedding's weight or its own."""

    def __init__(self, vocab_size: int, d_model: int, embedding: TokenEmbedding | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        weight = nn.init.normal_(torch.empty(padded(vocab_size), d_model), std=0.02)
        self.weight = nn.Parameter(weight) if embedding is None else embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)[..., : self.vocab_size]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target in nats, in float32, (b, l); 0 where it is to be ignored."""
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(targets.shape)
