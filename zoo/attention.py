"""The mixer of Transformers, the control beside the selective one: softmax attention, to what came before or all round.

    q, k, v = in(x);   y = out(softmax(q k^T / sqrt(d_head)) v), with q and k turned by their places (RoPE, 2104.09864)

With the gated MLP that a block gives it (BackboneConfig.mlp_width) this is the "Transformer++" of the Mamba paper
(appendix E.2.1). The keys and values of the last `window` tokens are the state, so that it has one size from the start:
whatever hands a state on, in parts of a sequence or token by token, treats attention as any other mixer. No token sees
further back than that.

Where a backbone is bidirectional attention does not look twice, once in each direction: one pass sees both sides.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.sequences import boundaries
from .config import AttentionConfig
from .grouping import grouped
from .mamba import full
from .mixer import Mixer, refuse_a_state


class AttentionState(NamedTuple):
    """All an attention layer remembers: token t lies in slot t % window."""

    k: Tensor  # (b, h, window, d_head), turned
    v: Tensor  # (b, h, window, d_head)
    seen: Tensor  # (b,), how many tokens have come


class Attention(Mixer):
    """Causal attention of d_model / d_head heads."""

    # tokens that look into a window at once: for each there is a row of a mask
    PART = 1024

    in_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        self.window, self.d_head = config.window, min(config.d_head, d_model)
        if d_model % self.d_head or self.d_head % 2:
            raise ValueError(
                f"attention.d_head: must be even and divide the width of {d_model}, not {self.d_head}"
            )
        self.heads = d_model // self.d_head
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, *, state: AttentionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        y, state = self.mix(self.in_proj(x), state=state, cu_seqlens=cu_seqlens)
        return self.out_proj(y), state

    def mix(
        self, projected: Tensor, *, state: AttentionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        qkv = self._apart(projected)
        if cu_seqlens is None:
            y, state = self._attend(qkv, state)
        elif state is None and torch.compiler.is_compiling():
            # a compiler cannot read where sequences begin
            y, state = self._attend_at_once(qkv, cu_seqlens), None
        elif state is None:
            y = _by_length(qkv, cu_seqlens, self.window, lambda rows, _: self._attend(rows, None)[0])
        else:
            y, state = self._attend_one_by_one(qkv, state, cu_seqlens)
        return _joined(y), state

    def _apart(self, projected: Tensor) -> Tensor:
        """Queries, keys and values of every head, (3, b, h, l, d_head)."""
        return projected.unflatten(-1, (3, self.heads, self.d_head)).permute(2, 0, 3, 1, 4)

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, 1, self.d_head)).unbind(1)
        place = state.seen[:, None]
        q, k = _turn(q, place), _turn(k, place)
        slot = (place % self.window)[:, None, :, None].expand_as(k)
        state.k.scatter_(2, slot, k.to(state.k.dtype))
        state.v.scatter_(2, slot, v.to(state.v.dtype))
        filled = torch.arange(self.window, device=x.device) <= place
        keys, values = state.k.to(q.dtype), state.v.to(q.dtype)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=filled[:, None, None])
        state.seen.add_(1)
        return self.out_proj(y.flatten(1)), state

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """An empty window; keys and values are kept in `dtype`."""
        return self._empty(batch, device or self.in_proj.weight.device, dtype or self.in_proj.weight.dtype)

    def _empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        shape = (batch, self.heads, self.window, self.d_head)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(k, v, torch.zeros(batch, device=device, dtype=torch.long))

    def _attend(self, qkv: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState | None]:
        """What rows of tokens (3, b, h, l, d_head) see, (b, h, l, d_head), and the state after them."""
        l, kept = qkv.shape[3], state is not None
        if state is None and l <= self.window:
            q, k, v = qkv
            places = torch.arange(l, device=qkv.device)
            return F.scaled_dot_product_attention(_turn(q, places), _turn(k, places), v, is_causal=True), None
        state = state or self._empty(qkv.shape[1], qkv.device, qkv.dtype)
        parts = []
        for part in qkv.split(min(self.window, self.PART), 3):
            y, state = self._go_on(part, state)
            parts.append(y)
        return torch.cat(parts, 2), state if kept else None

    def _go_on(self, qkv: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """What tokens, no more than fit in the window, see of it and of each other."""
        q, k, v = qkv
        places = state.seen[:, None] + torch.arange(q.shape[2], device=q.device)  # (b, l)
        q, k = _turn(q, places), _turn(k, places)
        # the place of the token in each slot, negative where none has come
        last = state.seen[:, None] - 1
        held = last - (last - torch.arange(self.window, device=q.device)) % self.window
        origins = torch.cat([held, places], 1)[:, None]  # (b, 1, window + l)
        back = places[:, :, None] - origins
        seen = (back >= 0) & (back < self.window) & (origins >= 0)
        keys, values = (torch.cat([old.to(new.dtype), new], 2) for old, new in ((state.k, k), (state.v, v)))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None])
        slots = (places % self.window)[:, None, :, None].expand_as(k)
        k, v = (old.scatter(2, slots, new.to(old.dtype)) for old, new in ((state.k, k), (state.v, v)))
        return y, AttentionState(k, v, state.seen + q.shape[2])

    def _attend_one_by_one(
        self, qkv: Tensor, state: AttentionState, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState]:
        """The same of sequences that go on, and the states after them."""
        parts, states = [], []
        for i, (start, end) in enumerate(pairwise(boundaries(cu_seqlens, qkv.shape[3]))):
            own = AttentionState(*(x[i : i + 1] for x in state))
            if start < end:
                y, after = self._attend(qkv[:, :, :, start:end], own)
                assert after is not None
                own = after
                parts.append(y)
            states.append(own)
        y = torch.cat(parts, 2) if parts else qkv[0]
        return y, AttentionState(*(torch.cat(rows) for rows in zip(*states, strict=True)))

    def _attend_at_once(self, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The same by a mask (l, l) of who is of one sequence."""
        q, k, v = qkv
        places = torch.arange(q.shape[2], device=q.device)
        back = places[:, None] - places
        seen = (back >= 0) & (back < self.window) & _together(places, cu_seqlens)
        return F.scaled_dot_product_attention(_turn(q, places), _turn(k, places), v, attn_mask=seen)


class BidirectionalAttention(Attention):
    """Attention to both sides at once, without a mask where the window holds a sequence: the encoder of Transformers.

    A token sees as many others ahead as back. It sees the future, so that there is no state and no step.
    """

    def forward(
        self,
        x: Tensor,
        *,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        y, _ = self.mix(self.in_proj(x), state=state, cu_seqlens=cu_seqlens, lengths=lengths)
        return self.out_proj(y), None

    def mix(
        self,
        projected: Tensor,
        *,
        state: AttentionState | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if state is not None:
            refuse_a_state()
        q, k, v = self._apart(projected)
        places = torch.arange(q.shape[2], device=q.device)
        # only distances count, so that a place in the row does for one in its sequence
        q, k = _turn(q, places), _turn(k, places)
        if cu_seqlens is None:
            # who is there to be seen; of an empty row its first position, which nobody asks for
            there = None if lengths is None else places < lengths.clamp(min=1)[:, None]
            y = self._see(q, k, v, there)
        elif torch.compiler.is_compiling():
            seen = ((places[:, None] - places).abs() < self.window) & _together(places, cu_seqlens)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:

            def see(rows: Tensor, lengths: Tensor) -> Tensor:
                there = torch.arange(rows.shape[3], device=q.device) < lengths[:, None]
                return self._see(rows[0], rows[1], rows[2], there)

            y = _by_length(torch.stack([q, k, v]), cu_seqlens, self.window, see)
        return _joined(y), None

    def step(self, x: Tensor, state: AttentionState) -> NoReturn:
        refuse_a_state()

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NoReturn:
        refuse_a_state()

    def _see(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor | None = None) -> Tensor:
        """What tokens of sequences (b, h, l, d_head) see of those that are there (b, l); long ones in parts."""
        l, window = q.shape[2], self.window
        mask = None if there is None else there[:, None, None]
        if l <= window:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        places, parts = torch.arange(l, device=q.device), []
        for start in range(0, l, self.PART):
            end = min(start + self.PART, l)
            near = slice(max(0, start - window + 1), end + window - 1)
            seen = (places[start:end, None] - places[near]).abs() < window
            if mask is not None:
                # who sees nobody behind the end of a row sees itself, and nobody asks what
                seen = seen & mask[..., near] | (places[start:end, None] == places[near])
            rows = (q[:, :, start:end], k[:, :, near], v[:, :, near])
            parts.append(F.scaled_dot_product_attention(*rows, attn_mask=seen))
        return torch.cat(parts, 2)


def _joined(y: Tensor) -> Tensor:
    """What every head (b, h, l, d_head) says, side by side (b, l, d_model)."""
    return y.transpose(1, 2).flatten(2)


def _by_length(
    qkv: Tensor, cu_seqlens: Tensor, window: int, attend: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Packed sequences (3, b, h, l, d_head), each by itself, those of about one length at once.

    `attend` takes rows (3, g, h, m, d_head) and their lengths (g,). What no window holds is alone: its masks are large.
    """
    groups, b = grouped(cu_seqlens, qkv, window), qkv.shape[1]
    parts = []
    for part, lengths in zip(groups.split(qkv), groups.lengths, strict=True):
        y = attend(part.movedim(-3, 2).flatten(1, 2), lengths.repeat(b))
        parts.append(y.unflatten(0, (b, -1)).movedim(1, -3))
    return groups.join(parts) if parts else qkv[2]


def _together(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which of the places (l,) of a row are of one sequence, (l, l)."""
    sequence = torch.searchsorted(cu_seqlens, places, right=True)
    return sequence[:, None] == sequence


def _turn(x: Tensor, places: Tensor) -> Tensor:
    """Turn pairs of channels of x (b, h, l, d_head) by angles that grow with their places (l,) or (b, l)."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    # products of large places want more than float32
    angles = (places[..., None] * speed).unsqueeze(-3)
    cos, sin = angles.cos().to(full(x).dtype), angles.sin().to(full(x).dtype)
    a, b = full(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
