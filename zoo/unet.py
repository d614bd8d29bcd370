"""The U-Net of raw audio: stages of blocks at falling rates and back, causal, with steps (SaShiMi, 2202.09729).

    x -- stage 0 --------------------------------(+)- stage 4 -- norm -- y      every sample
            '- down -- stage 1 ---------(+)- stage 3 -- up -'                   every 4th
                          '- down -- stage 2 -- up -'                           every 16th     (pool: [4, 4])

Down makes one wider vector of a group of `pool` neighbours, up makes of one the `pool` vectors of the next group, so
that no position sees its future; to the first group nothing is added. A length need not be a multiple of anything: what
has come of a group waits in the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, Blocks
from .config import BackboneConfig, UNetConfig
from .frontends import Patches
from .norms import build_norm


def build_backbone(config: BackboneConfig) -> "Backbone | UNet":
    """What a config describes: blocks in a row, or in the stages of a U-Net."""
    return UNet(config) if isinstance(config, UNetConfig) else Backbone(config)


class PoolState(NamedTuple):
    """What waits between two stages."""

    group: Tensor  # (b, pool, d): as many vectors of the group under way as have come
    below: Tensor  # (b, pool, d): what the inner stage adds to that group


class Sequences(NamedTuple):
    """How the rows that go through a stage divide into sequences."""

    lengths: list[int]
    # int32 (s + 1,) where they are packed into one row; else all rows have the one length
    cu_seqlens: Tensor | None

    def apart(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """x (b, l, ...) as the pieces, `sizes` long, of which it is made."""
        return [x] if self.cu_seqlens is None else list(x.split(sizes, 1))

    def states(self, state: Tensor) -> list[Tensor]:
        """State (b or s, ...) as that of every piece."""
        return [state] if self.cu_seqlens is None else list(state.split(1))

    def shorter(self, lengths: list[int]) -> "Sequences":
        """The same sequences, each of another length."""
        if self.cu_seqlens is None:
            return Sequences(lengths, None)
        bounds = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        return Sequences(lengths, bounds.to(self.cu_seqlens.device))


class Pool(nn.Module):
    """The way down from a stage to the next inner one, and back."""

    def __init__(self, d: int, size: int, d_inner: int) -> None:
        super().__init__()
        self.size = size
        self.down = Patches(d, size, d_inner)
        self.up = nn.Linear(d_inner, size * d)

    def forward(
        self,
        stream: Tensor,
        inner: Callable[[Tensor, Sequences], Tensor],
        sequences: Sequences,
        phase: int,
        state: PoolState | None,
    ) -> tuple[Tensor, PoolState]:
        """What is added to the stream (b, l, d) at every position, and what waits behind its end.

        `inner` maps the groups (b, m, d_inner) that have become whole. phase: how many positions wait in state.
        """
        size, d = self.size, stream.shape[2]
        pieces = sequences.apart(stream, sequences.lengths)
        if state is None:
            below = [self.up.weight.new_zeros(len(piece), size, d) for piece in pieces]
        else:
            below, groups = sequences.states(state.below), sequences.states(state.group)
            pieces = [
                torch.cat([group[:, :phase].to(piece.dtype), piece], 1)
                for group, piece in zip(groups, pieces, strict=True)
            ]
        counts = [piece.shape[1] // size for piece in pieces]
        ends = [count * size for count in counts]
        whole = torch.cat([piece[:, :end] for piece, end in zip(pieces, ends, strict=True)], 1)
        if whole.shape[1]:
            said = self.up(inner(self.down(whole), sequences.shorter(counts))).view(whole.shape)
        else:
            said = below[0][:, :0]
        told = [
            torch.cat([first.to(said.dtype), rest], 1)
            for first, rest in zip(below, sequences.apart(said, ends), strict=True)
        ]
        added = [piece[:, phase:][:, :l] for piece, l in zip(told, sequences.lengths, strict=True)]
        rests = [piece[:, end:] for piece, end in zip(pieces, ends, strict=True)]
        after = PoolState(
            torch.cat([F.pad(rest, (0, 0, 0, size - rest.shape[1])) for rest in rests]),
            torch.cat([piece[:, end : end + size] for piece, end in zip(told, ends, strict=True)]),
        )
        return torch.cat(added, 1), after

    def init_state(self, batch: int, device: torch.device | None, dtype: torch.dtype | None) -> PoolState:
        weight = self.down.weight
        shape = (batch, self.size, self.up.out_features // self.size)
        group, below = (weight.new_zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return PoolState(group, below)


class UNet(nn.Module):
    """Map x (b, l, d_model) to y (b, l, d_model), causally.

    The state is a list: that of every stage from the first to the last, a PoolState between each two from the outermost
    inwards, and the phase, the number of positions read, modulo the period, which is one for a whole batch.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        levels = [config.stage(i) for i in range(len(config.pool) + 1)]
        self.stages = nn.ModuleList(Blocks(level) for level in [*levels, *levels[-2::-1]])
        self.pools = nn.ModuleList(
            Pool(outer.d_model, size, inner.d_model)
            for outer, size, inner in zip(levels, config.pool, levels[1:], strict=False)
        )
        self.norm_f = build_norm(levels[0])

    def forward(
        self, x: Tensor, *, state: list[Any] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, list[Any] | None]:
        """Return y and, if a state came in, the state after the last position.

        With cu_seqlens, int32 (s + 1,) beside b = 1, x holds s sequences that do not see each other, and so do states.

        Raises:
            ValueError: when a state is asked for and sequences end in different phases.
        """
        sequences = Sequences([x.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist(), cu_seqlens)
        after = None
        if state is not None:
            phases = {(state[-1] + length) % self.config.period for length in sequences.lengths}
            if len(phases) > 1:
                raise ValueError(
                    f"sequences that are continued together must have one length modulo {self.config.period}, the "
                    "product of pool: continue those of other lengths by themselves"
                )
            after = [*state[:-1], phases.pop()]
        x, residual = self._level(0, x, sequences, state, after)
        return self.norm_f(x, residual)[0], after

    def _level(
        self, i: int, x: Tensor, sequences: Sequences, state: list[Any] | None, after: list[Any] | None
    ) -> tuple[Tensor, Tensor]:
        """Stage i on the way down, what lies below, and the stage on the way up; `after` is filled with states."""

        def run(stage: int, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            before = None if state is None else state[stage]
            x, residual, own = self._stage(stage).stream(
                x, residual, state=before, cu_seqlens=sequences.cu_seqlens
            )
            if after is not None:
                after[stage] = own
            assert residual is not None
            return x, residual

        def inner(x: Tensor, groups: Sequences) -> Tensor:
            return self._add(*self._level(i + 1, x, groups, state, after))

        x, residual = run(i, x, None)
        if i == len(self.pools):
            return x, residual
        place, stream = len(self.stages) + i, x + residual
        waiting: PoolState | None = None if state is None else state[place]
        x, waits = self._pool(i)(stream, inner, sequences, self._phase(i, state), waiting)
        if after is not None and waiting is not None:
            after[place] = PoolState(*(new.to(old.dtype) for new, old in zip(waits, waiting, strict=True)))
        return run(len(self.stages) - 1 - i, x, stream)

    def step(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Map one position x (b, d_model); the state is moved on in place, but for the phase, a number of the host.

        What a step does depends on the phase alone: an inner stage moves on when a group becomes whole.
        """
        x, residual = self._level_step(0, x, state)
        state[-1] = (state[-1] + 1) % self.config.period
        return self.norm_f(x, residual)[0], state

    def _level_step(self, i: int, x: Tensor, state: list[Any]) -> tuple[Tensor, Tensor]:
        x, residual, state[i] = self._stage(i).stream_step(x, None, state[i])
        assert residual is not None
        if i == len(self.pools):
            return x, residual
        pool, waiting, t = self._pool(i), state[len(self.stages) + i], self._phase(i, state)
        stream, out = x + residual, len(self.stages) - 1 - i
        waiting.group[:, t] = stream
        x, residual, state[out] = self._stage(out).stream_step(waiting.below[:, t], stream, state[out])
        assert residual is not None
        if t == pool.size - 1:
            inner = self._add(*self._level_step(i + 1, pool.down(waiting.group)[:, 0], state))
            waiting.below.copy_(pool.up(inner).view_as(waiting.below))
        return x, residual

    def _phase(self, i: int, state: list[Any] | None) -> int:
        """How many positions of a group of stage i have come."""
        if state is None:
            return 0
        phase: int = state[-1]
        for size in self.config.pool[:i]:
            phase //= size
        return phase % self.config.pool[i]

    def _stage(self, i: int) -> Blocks:
        return self.stages[i]  # type: ignore[return-value]

    def _pool(self, i: int) -> Pool:
        return self.pools[i]  # type: ignore[return-value]

    @staticmethod
    def _add(x: Tensor, residual: Tensor) -> Tensor:
        return (x + residual).to(x.dtype)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[Any]:
        """The state before the first position of `batch` sequences."""
        stages = [self._stage(i).init_state(batch, device, dtype) for i in range(len(self.stages))]
        pools = [self._pool(i).init_state(batch, device, dtype) for i in range(len(self.pools))]
        return [*stages, *pools, 0]
