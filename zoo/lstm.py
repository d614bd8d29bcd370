"""The mixer of recurrent networks, a control: a layer of LSTM (Hochreiter and Schmidhuber, 1997).

Its state chooses what to keep, as Mamba's does, but is not linear in itself: time has to be walked.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from ..kernels.sequences import boundaries
from .config import LSTMConfig
from .mixer import Mixer


class LSTMState(NamedTuple):
    """All an LSTM remembers: its last output and its cells."""

    h: Tensor  # (b, d_inner)
    c: Tensor  # (b, d_inner)


class LSTM(Mixer):
    """A layer of d_inner = expand * d_model cells, and a projection back."""

    out_proj: nn.Linear

    def __init__(self, d_model: int, config: LSTMConfig) -> None:
        super().__init__()
        d_inner = config.expand * d_model
        self.in_proj = nn.Identity()
        self.lstm = nn.LSTM(d_model, d_inner, batch_first=True)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(
        self, x: Tensor, *, state: LSTMState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LSTMState | None]:
        y, state = self.mix(x, state=state, cu_seqlens=cu_seqlens)
        return self.out_proj(y), state

    def mix(
        self, projected: Tensor, *, state: LSTMState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LSTMState | None]:
        x = projected
        if not x.numel():
            return x.new_zeros(*x.shape[:2], self.lstm.hidden_size), state
        if cu_seqlens is not None:
            return self._mix_packed(x, state, boundaries(cu_seqlens, x.shape[1]))
        y, after = self.lstm(x, _layers(state))
        return y, None if state is None else _state(after)

    def step(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        y, after = self.lstm(x[:, None], _layers(state))
        for old, new in zip(state, _state(after), strict=True):
            old.copy_(new)
        return self.out_proj(y[:, 0]), state

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LSTMState:
        """Zeros."""
        zeros = self.out_proj.weight.new_zeros(batch, self.lstm.hidden_size, device=device, dtype=dtype)
        return LSTMState(zeros, zeros.clone())

    def _mix_packed(
        self, x: Tensor, state: LSTMState | None, bounds: list[int]
    ) -> tuple[Tensor, LSTMState | None]:
        sizes = torch.tensor(bounds).diff().tolist()
        # PyTorch refuses sequences without a token
        filled = [i for i, size in enumerate(sizes) if size]
        pieces = x[0].split(sizes)
        packed = pack_sequence([pieces[i] for i in filled], enforce_sorted=False)
        before = None if state is None else LSTMState(*(old[filled] for old in state))
        y, after = self.lstm(packed, _layers(before))
        y = torch.cat(unpack_sequence(y))[None]
        if state is None:
            return y, None
        rows = torch.tensor(filled, device=x.device)
        return y, LSTMState(
            *(
                old.index_copy(0, rows, new.to(old.dtype))
                for old, new in zip(state, _state(after), strict=True)
            )
        )


def _layers(state: LSTMState | None) -> tuple[Tensor, Tensor] | None:
    """A state as PyTorch has it, layers first."""
    return None if state is None else (state.h[None].contiguous(), state.c[None].contiguous())


def _state(layers: tuple[Tensor, Tensor]) -> LSTMState:
    return LSTMState(layers[0][0], layers[1][0])
