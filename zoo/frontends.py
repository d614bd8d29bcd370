"""What turns a batch's inputs into the vectors that the backbone mixes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded(vocab_size: int) -> int:
    """The rows of an embedding: a multiple of 8, which matrix units want; those past the vocabulary are never read."""
    return -(-vocab_size // 8) * 8


class TokenEmbedding(nn.Module):
    """A vector for each token: (b, l) integers to (b, l, d_model)."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(padded(vocab_size), d_model), std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)
