"""A backbone's vectors of sequences: one for each, or one for every position, however long they are."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .backbone import Backbone
from .frontends import TokenEmbedding

POOLINGS = ("mean", "last", "none")


class VectorReader:
    """Read sequences of tokens (l,), of one or more, to float32 vectors.

    Args:
        pooling: mean, over all positions; last, the last one, on each strand where it is read to; none, a vector for
            every position. Of a backbone that reads both strands, it is the mean of the two (strands.py).
        start: the token that every sequence begins with in training, or None; it gets no vector.
    """

    def __init__(
        self, embedding: TokenEmbedding, backbone: Backbone, pooling: str, start: int | None
    ) -> None:
        self.embedding, self.backbone, self.pooling = embedding, backbone, pooling
        self.start = torch.tensor([] if start is None else [start], dtype=torch.long)
        self.strands = backbone.config.reverse_complement

    @torch.no_grad()
    def whole(self, sequences: list[Tensor]) -> Tensor:
        """Vectors (s, d) of sequences that are read in one pass, or (t, d) of all their tokens, end to end."""
        y, _ = self._read([torch.cat([self.start, sequence]) for sequence in sequences], None)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        ends = lengths.cumsum(0)
        if len(self.start):
            seen = torch.ones(len(y), dtype=torch.bool)
            seen[ends - lengths + torch.arange(len(ends))] = False
            y = y[seen.to(y.device)]
        first, last, lengths = ((ends - lengths).to(y.device), (ends - 1).to(y.device), lengths.to(y.device))
        if self.pooling == "mean":
            y = torch.segment_reduce(y.double(), "sum", lengths=lengths) / lengths[:, None]
        elif self.pooling == "last":
            # on the other strand, what is read last is where the sequence starts
            d = self.backbone.config.d_model
            y = torch.cat([y[last, :d], y[first, d:]], dim=1)
        return (y.unflatten(1, (2, -1)).mean(1) if self.strands else y).float()

    @torch.no_grad()
    def onward(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same of one sequence that comes in pieces, with a causal backbone; vectors of positions as they come."""
        state, count = self.backbone.init_state(1), 0
        y = total = torch.zeros(())
        for piece in pieces:
            given = 0 if count else len(self.start)
            y, state = self._read([torch.cat([self.start[:given], piece])], state)
            y = y[given:]
            if self.pooling == "none":
                yield y.float()
            total, count = total + y.double().sum(0, keepdim=True), count + len(y)
        if self.pooling != "none":
            yield (y[-1:] if self.pooling == "last" else total / count).float()

    def _read(self, rows: list[Tensor], state: Any) -> tuple[Tensor, Any]:
        device = self.embedding.weight.device
        bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32).to(device)
        tokens = torch.cat(rows).to(device)
        x = self.embedding(tokens[None])
        y, state = self.backbone(x, state=state, cu_seqlens=bounds if len(rows) > 1 else None)
        return y[0], state
