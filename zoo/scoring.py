"""What a model of tokens thinks of sequences: their log-likelihoods, those that begin alike read once up to there."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .heads import IGNORE
from .tokens import TokenModel


class Packed(NamedTuple):
    """Sequences of tokens laid end to end (t,), and how long each is (s,), both on the CPU."""

    tokens: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens (t,) as integers of 64 bits, and the boundaries (s + 1,), on a device."""
        bounds = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        return self.tokens.to(device).long(), bounds.to(device)


@torch.no_grad()
def log_likelihoods(
    model: TokenModel, prefixes: Packed, suffixes: Packed, prefix: Tensor, *, start: int, scored: int
) -> Tensor:
    """The log-likelihood in nats of each suffix behind its prefix, both together, (k,) float64.

    Every prefix is read once, and each of its suffixes from the state that it leaves.

    Args:
        prefix: the number of each suffix's prefix (k,).
        start: the token that a sequence begins with, which is given.
        scored: tokens from this one on are seen but not predicted, and count for nothing.
    """
    first = torch.full_like(prefixes.lengths, start)
    before, state = _read(model, prefixes, first, model.init_state(len(first)), scored)
    numbers = prefix.to(model.device)
    state = tree_map(lambda rows: rows.index_select(0, numbers), state)
    # a prefix of no token ends with what it begins with
    ends = (prefixes.lengths.cumsum(0) - 1).masked_fill(prefixes.lengths == 0, -1)
    last = torch.cat([prefixes.tokens.long(), first[:1]])[ends]
    behind, _ = _read(model, suffixes, last[prefix], state, scored)
    return before[numbers] + behind


def _read(model: TokenModel, sequences: Packed, first: Tensor, state: Any, scored: int) -> tuple[Tensor, Any]:
    """The log-likelihood of each sequence, before which the model sees its `first` token, and the states after them."""
    tokens, bounds = sequences.to(model.device)
    # what is seen is a token behind what is predicted
    begins = (sequences.lengths.cumsum(0) - sequences.lengths)[sequences.lengths > 0].to(model.device)
    seen = tokens.roll(1).index_copy(0, begins, first[sequences.lengths > 0].to(model.device))
    y, state = model.backbone(model.embedding(seen[None]), state=state, cu_seqlens=bounds)
    targets = tokens.masked_fill(tokens >= scored, IGNORE)
    # differences of sums over a thousand bases are small: the read-out is exact whatever the backbone's dtype
    with torch.autocast(model.device.type, enabled=False):
        _, losses = model.head.loss(y[0].float(), targets)
    lengths = sequences.lengths.to(model.device)
    return -torch.segment_reduce(losses.double(), "sum", lengths=lengths), state


@torch.no_grad()
def log_probabilities_at(model: TokenModel, sequences: Packed, at: Tensor) -> Tensor:
    """The log-probability in nats of every token at places `at` (k,) of the row of sequences, (k, v)."""
    tokens, bounds = sequences.to(model.device)
    y, _ = model.backbone(model.embedding(tokens[None]), cu_seqlens=bounds)
    with torch.autocast(model.device.type, enabled=False):
        return model.head(y[0, at.to(model.device)].float()).log_softmax(-1).double()
