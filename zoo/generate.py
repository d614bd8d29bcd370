"""Writing on: sample token after token from a model, from a state whose size never changes.

Prompts of any lengths go through one packed forward; then every sequence takes a step at a time. Each has its
own random numbers, so that it is continued in a batch exactly as it would be alone. On a GPU a step, drawing included,
is one CUDA graph, and the next is under way before the host has read what the last one drew. A model whose steps take
turns, as those of a U-Net do, has a number for its turn in the list of its states, and a graph for each.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tokens import TokenModel


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
    model: TokenModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop: int | None = None,
    seeds: list[int] | None = None,
    state: list[Any] | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts of token ids; yield the next token of each, None for those that have ended.

    A sequence ends after `max_new_tokens`, or when it draws `stop`, which is not yielded. seeds gives each
    sequence its own; without them all have that of `sampling`. state is that before the prompts, where it is not the
    one that model.init_state gives by itself.

    Raises:
        ValueError: when there is no prompt, one is empty or holds a token outside the vocabulary, or seeds are too
            few or too many.
    """
    sampling = sampling or Sampling()
    vocab_size = model.head.vocab_size
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"a prompt must hold tokens from 0 to {vocab_size - 1}, and at least one")
    if not prompts:
        raise ValueError("prompts: give at least one")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"seeds: give one for each of the {len(prompts)} prompts, not {len(seeds)}")
    if max_new_tokens < 1:
        return
    seeds = seeds if seeds is not None else [sampling.seed] * len(prompts)
    writer = Writer(model, prompts, sampling, seeds, state)
    going = [True] * len(prompts)
    for chosen in _read_behind(writer, max_new_tokens):
        going = [alive and token != stop for alive, token in zip(going, chosen, strict=True)]
        if not any(going):
            return
        yield [token if alive else None for token, alive in zip(chosen, going, strict=True)]


class Writer:
    """Sequences that are continued by a token at a time, on tensors that stay where they are.

    Each call of `advance` moves the model on by `tokens` (b,) and draws the next ones into it. Where a step only
    changes tensors in place, a GPU runs it as a graph from the second time on, captured once for each turn.
    """

    # random numbers of a sequence that are drawn at once
    BLOCK = 1024

    def __init__(
        self,
        model: TokenModel,
        prompts: list[list[int]],
        sampling: Sampling,
        seeds: list[int],
        state: list[Any] | None = None,
    ) -> None:
        self.model, self.sampling, device = model, sampling, model.device
        # steps that are under way before the first is read: a GPU is never kept waiting, a CPU gains nothing
        self.ahead = 1 if device.type == "cuda" else 0
        self.seen = torch.zeros(len(prompts), model.head.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(self.seen, prompts, strict=True):
            row[torch.tensor(prompt, device=device)] = True
        # the numbers of each sequence are drawn apart, so that none depends on its neighbours
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.draws = torch.empty(len(prompts), self.BLOCK, dtype=torch.float64, device=device)
        self.drawn, self._left = torch.zeros(1, dtype=torch.long, device=device), 0
        self.tokens = torch.empty(len(prompts), dtype=torch.long, device=device)
        # by turn, once it has been taken: the step, the state after it, and whether a GPU has the step as a graph
        self._steps: dict[tuple[int, ...], tuple[Callable[[], object], list[Any], bool]] | None = {}
        logits, self.state = prefill(model, prompts, state)
        self._refill()
        self._draw(logits)

    def advance(self) -> None:
        """Draw the next tokens."""
        self._refill()
        if self._steps is None:
            self._move_on()
            return
        turn = tuple(part for part in self.state if isinstance(part, int))
        if turn not in self._steps:
            # this run compiles and loads what a capture must find ready
            step = self._try()
            if step is None:
                self._steps = None
            else:
                self._steps[turn] = step, self.state, False
            return
        step, after, captured = self._steps[turn]
        if not captured:
            before = self.state
            step = repeatable(step, self.tokens.device)
            self._steps[turn], self.state = (step, after, True), before
        step()
        self.state = after

    def _try(self) -> Callable[[], object] | None:
        """Take a step and return what takes it again in place; None where the state does not keep its shape."""
        before, kept = self.state, _tensors(self.state)
        self._move_on()
        moved = _tensors(self.state)
        if len(kept) != len(moved) or not all(
            isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
            for a, b in zip(kept, moved, strict=True)
        ):
            return None
        if all(a is b for a, b in zip(kept, moved, strict=True)):
            return self._move_on
        self._put_back(before, kept)
        return self._move_on_in_place

    def _move_on(self) -> None:
        logits, self.state = self.model.step(self.tokens, list(self.state))
        self._draw(logits)

    def _move_on_in_place(self) -> None:
        before, kept = self.state, _tensors(self.state)
        self._move_on()
        self._put_back(before, kept)

    def _put_back(self, before: list[Any], kept: list[Any]) -> None:
        """Copy the state into the tensors that it had before."""
        for a, b in zip(kept, _tensors(self.state), strict=True):
            if a is not b:
                a.copy_(b)
        self.state = [b if isinstance(b, int) else a for a, b in zip(before, self.state, strict=True)]

    def _draw(self, logits: Tensor) -> None:
        draw = self.draws.index_select(1, self.drawn).squeeze(1)
        self.tokens.copy_(sample(logits, draw, self.sampling, self.seen))
        self.seen.scatter_(1, self.tokens.unsqueeze(1), True)
        self.drawn += 1

    def _refill(self) -> None:
        """Have a random number for the next token of every sequence."""
        if not self._left:
            rows = [torch.rand(self.BLOCK, generator=one, dtype=torch.float64) for one in self._generators]
            self.draws.copy_(torch.stack(rows))
            self.drawn.zero_()
            self._left = self.BLOCK
        self._left -= 1


def repeatable(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What does the same as `call`, which works in place and has run before: on a GPU, a captured graph of it."""
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        call()
    return graph.replay


def leaves(state: Any) -> Iterator[Any]:
    """What a state of nested lists, tuples and dicts holds, from first to last."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for item in state:
            yield from leaves(item)
    else:
        yield state


def pick(state: Any, rows: Tensor) -> Any:
    """The state of sequences by their numbers, rows (s,): some of those that it is of, or one of them many times."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    if isinstance(state, dict):
        return {name: pick(part, rows) for name, part in state.items()}
    if isinstance(state, list | tuple):
        parts = [pick(part, rows) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def _tensors(state: list[Any]) -> list[Any]:
    """What a state holds but for the numbers in its list."""
    return list(leaves([part for part in state if not isinstance(part, int)]))


def _read_behind(writer: Writer, count: int) -> Iterator[list[int]]:
    """The tokens of `count` steps, each read on the host when `writer.ahead` more have been started."""
    waiting: deque[Callable[[], list[int]]] = deque()
    for i in range(count):
        if i:
            writer.advance()
        waiting.append(fetch(writer.tokens))
        if len(waiting) > writer.ahead:
            yield waiting.popleft()()
    for read in waiting:
        yield read()


def fetch(x: Tensor) -> Callable[[], list[Any]]:
    """Start to copy a tensor to the host; return what waits for its values."""
    host = x.to("cpu", non_blocking=True, copy=True)
    if not x.is_cuda:
        return host.tolist
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def read() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return read


def prefill(
    model: TokenModel, prompts: list[list[int]], state: list[Any] | None = None
) -> tuple[Tensor, list[Any]]:
    """Read all prompts in one packed forward; return the logits after each (s, vocab_size) and the state."""
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)[None]
    # outside of inference mode, so that it is looked at once and not in every layer
    with torch.inference_mode(False):
        cu_seqlens = torch.tensor([0, *lengths.cumsum(0).tolist()], dtype=torch.int32, device=device)
    before = model.init_state(len(prompts)) if state is None else state
    y, state = model.mix(tokens, state=before, cu_seqlens=cu_seqlens)
    assert state is not None
    # only the last position of each prompt is read out
    return model.head(y[0, (bounds[1:] - 1).to(device)]), state


def sample(logits: Tensor, draw: Tensor, sampling: Sampling, seen: Tensor) -> Tensor:
    """Draw a token for each row of logits (s, v) by the number in [0, 1) that `draw` (s,) holds for it."""
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return logits.argmax(-1)
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
