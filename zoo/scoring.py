"""What a model of tokens thinks of sequences: their log-likelihoods, those that begin alike read once up to there."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .heads import IGNORE
from .tokens import TokenModel


class Packed(NamedTuple):
    """Sequences of tokens laid end to end (t,), and how long each is (s,), both on the CPU."""

    tokens: Tensor
    lengths: Tensor


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
    # a prefix of no token ends with what it begins with
    ends = (prefixes.lengths.cumsum(0) - 1).masked_fill(prefixes.lengths == 0, -1)
    last = torch.cat([prefixes.tokens.long(), first[:1]])[ends]
    [numbers] = _moved(model.device, prefix)
    before, state = _read(model, prefixes, first, model.init_state(len(first)), scored)
    state = tree_map(lambda x: x.index_select(0, numbers) if isinstance(x, Tensor) else x, state)
    behind, _ = _read(model, suffixes, last[prefix], state, scored)
    return before[numbers] + behind


@torch.no_grad()
def log_probabilities_at(model: TokenModel, sequences: Packed, at: Tensor) -> Tensor:
    """The log-probability in nats of every token at places `at` (k,) of the row of sequences, (k, v) float64."""
    tokens, bounds, at = _moved(model.device, sequences.tokens, _bounds(sequences), at)
    y, _ = model.mix(tokens.long()[None], cu_seqlens=bounds)
    with torch.autocast(model.device.type, enabled=False):
        return model.head(y[0, at].float()).log_softmax(-1).double()


def _read(model: TokenModel, sequences: Packed, first: Tensor, state: Any, scored: int) -> tuple[Tensor, Any]:
    """The log-likelihood of each sequence, before which the model sees its `first` token, and the states after them."""
    if not len(sequences.tokens):
        return torch.zeros(len(first), dtype=torch.float64, device=model.device), state
    bounds, some = _bounds(sequences), sequences.lengths > 0
    tokens, bounds, begins, first, lengths = _moved(
        model.device, sequences.tokens, bounds, bounds[:-1][some].long(), first[some], sequences.lengths
    )
    tokens = tokens.long()
    # what is seen is a token behind what is predicted
    seen = tokens.roll(1).index_copy(0, begins, first)
    y, state = model.mix(seen[None], state=state, cu_seqlens=bounds)
    # scores are small differences of sums: what is read out is exact whatever the backbone computes in
    with torch.autocast(model.device.type, enabled=False):
        _, losses = model.head.loss(y[0].float(), tokens.masked_fill(tokens >= scored, IGNORE))
    # unsafe: not checked, which a GPU would have to be waited for
    return -torch.segment_reduce(losses.double(), "sum", lengths=lengths, unsafe=True), state


def _bounds(sequences: Packed) -> Tensor:
    """Where sequences begin and end, (s + 1,)."""
    return F.pad(sequences.lengths.cumsum(0), (1, 0)).to(torch.int32)


def _moved(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of the CPU on another device; a GPU is not waited for."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    return [x.pin_memory().to(device, non_blocking=True) for x in tensors]
