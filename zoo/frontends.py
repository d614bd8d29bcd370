"""What turns a batch's inputs into the vectors that the backbone mixes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padded(vocab_size: int) -> int:
    """The rows of an embedding: a multiple of 8, which matrix units want; those past the vocabulary are never read."""
    return -(-vocab_size // 8) * 8


class TokenEmbedding(nn.Module):
    """A vector for each token: (b, l) integers to (b, l, d_model).

    With the complement of each token (vocab_size,), that token's vector stands beside its own: (b, l, 2 d_model), what
    a backbone that reads both strands takes (strands.py).
    """

    complement: Tensor | None

    def __init__(self, vocab_size: int, d_model: int, complement: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(padded(vocab_size), d_model), std=0.02))
        self.register_buffer("complement", complement, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if self.complement is None:
            return x
        return torch.cat([x, F.embedding(self.complement[tokens], self.weight)], dim=-1)


class Patches(nn.Linear):
    """A vector for every `size` neighbours: (b, l, d) to (b, l / size, d_out), rounded up; zeros fill the last one."""

    def __init__(self, d: int, size: int, d_out: int) -> None:
        super().__init__(size * d, d_out)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.size
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return super().forward(x.unflatten(1, (-1, self.size)).flatten(2).to(self.weight.dtype))
