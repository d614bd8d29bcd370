"""Writing on: sample token after token from a model, from a state whose size never changes.

Prompts of any lengths go through one packed forward; then every sequence takes a step at a time. Each has its
own random numbers, so that it is continued in a batch exactly as it would be alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .language import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely; 0 is all.
        top_p: only the most likely that together reach this probability (Holtzman et al., 1904.09751).
        min_p: only those at least this likely as the most likely one (Nguyen et al., 2407.01082).
        repetition_penalty: what has occurred gets its logit divided (multiplied, below zero) by it (CTRL,
            1909.05858).
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, holds in limits.items():
            if not holds:
                raise ValueError(f"{name} cannot be {getattr(self, name)}")


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: int | None = None,
    seeds: list[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts of token ids; yield the next token of each, None for those that have ended.

    A sequence ends after `max_new_tokens`, or when it draws `stop`, which is not yielded. seeds gives each
    sequence its own; without them all have that of `sampling`.

    Raises:
        ValueError: when a prompt is empty or holds a token outside the vocabulary.
    """
    sampling = sampling or Sampling()
    device, vocab_size = model.device, model.head.vocab_size
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt must hold tokens from 0 to {vocab_size - 1}, and at least one")
    # the numbers of each sequence are drawn apart, so that none depends on its neighbours
    draws = torch.stack(
        [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds or [sampling.seed] * len(prompts)
        ]
    ).to(device)

    logits, state = prefill(model, prompts)
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    going = torch.ones(len(prompts), dtype=torch.bool)
    for i in range(max_new_tokens):
        tokens = sample(logits, draws[:, i], sampling, seen)
        chosen = tokens.tolist()
        if stop is not None:
            going &= tokens.cpu() != stop
        if not going.any():
            return
        yield [token if alive else None for token, alive in zip(chosen, going.tolist(), strict=True)]
        seen[torch.arange(len(prompts), device=device), tokens] = True
        if i + 1 < max_new_tokens:
            logits, state = model.step(tokens, state)


def prefill(model: LanguageModel, prompts: list[list[int]]) -> tuple[Tensor, list[object]]:
    """Read all prompts in one packed forward; return the logits after each (s, vocab_size) and the state."""
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)[None]
    y, state = model.backbone(
        model.embedding(tokens),
        state=model.init_state(len(prompts)),
        cu_seqlens=bounds.to(device=device, dtype=torch.int32),
    )
    assert state is not None
    # only the last position of each prompt is read out
    return model.head(y[0, (bounds[1:] - 1).to(device)]), state


def sample(logits: Tensor, draw: Tensor, sampling: Sampling, seen: Tensor) -> Tensor:
    """Draw a token for each row of logits (s, v) by the number in [0, 1) that `draw` (s,) holds for it."""
    logits = logits.double()
    if sampling.repetition_penalty != 1:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # from the most to the least likely; whatever a rule leaves out is a tail of this order
    logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    p = logits.softmax(-1)
    before = p.cumsum(-1) - p
    kept = (before < sampling.top_p) & (p >= sampling.min_p * p[:, :1])
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    cumulative = (p * kept).cumsum(-1)
    rank = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)
    return order.gather(1, rank.clamp(max=order.shape[1] - 1)).squeeze(1)
