"""The Mamba mixer: project, convolve, scan with steps and matrices chosen by the input, gate, project back.

    x -+- u - conv - silu -+- scan - * - out
       |                   +- delta, B, C
       +- z ------ silu -----------'                 (Mamba, section 3.4 and algorithm 2)

Parameters carry the reference implementation's names and initial values, so that its checkpoints fit.

B2S6 (Yu and Erichson, 2505.09022, section 6) is the same with channels in blocks j, each of which chooses by its own
channels alone, and with a bias of B in every channel i; delta then has a projection of its own, so that it can learn at
a rate of its own:

    delta_i = softplus(dt_proj_i delta_proj_j u_j + dt_proj.bias_i),   B_i = x_proj_j u_j + B_bias_i,   C = x_proj_j u_j
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.conv import causal_conv1d, causal_conv1d_update
from ..kernels.scan import selective_scan
from ..kernels.scan_part import selective_scan_part
from ..kernels.step import selective_state_update
from .config import MambaConfig
from .mixer import Mixer
from .parts import Parts


class MambaState(NamedTuple):
    """All a Mamba layer remembers: the last inputs of the convolution and the state of the scan."""

    conv: Tensor  # (b, d_conv - 1, d_inner)
    ssm: Tensor  # (b, d_inner, n), float32 or complex64


class Mamba(Mixer):
    """A selective state space model over d_inner = expand * d_model channels."""

    in_proj: nn.Linear
    out_proj: nn.Linear
    # the ranks that a sequence is split over, while it is (context.py)
    parts: Parts | None = None

    def __init__(self, d_model: int, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.d_inner, self.heads = config.expand * d_model, config.heads
        self.dt_rank = config.dt_rank or math.ceil(d_model / (16 * self.heads))
        self.complex = config.a_init == "s4d-lin"
        # states of A, and real numbers in a row of B or C
        self.n = config.d_state // 2 if self.complex else config.d_state
        widths = {"delta": self.dt_rank, "B": config.d_state, "C": config.d_state}
        self.selected = {name: width for name, width in widths.items() if name in config.selective}
        # the reference has one matrix for all; that of a block is its rows, over its channels
        own = "delta" in self.selected and (self.heads > 1 or config.B_bias)
        self.together = {
            name: width for name, width in self.selected.items() if not (own and name == "delta")
        }
        block = self.d_inner // self.heads

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=config.bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner, bias=config.conv_bias
        )
        if self.together:
            self.x_proj = nn.Linear(block, self.heads * sum(self.together.values()), bias=False)
        if own:
            self.delta_proj = nn.Linear(block, self.heads * self.dt_rank, bias=False)
        if "delta" in self.selected:
            self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        else:
            self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        for name in ("B", "C"):
            if name not in self.selected:
                self.register_parameter(name, nn.Parameter(torch.empty(self.d_inner, config.d_state)))
        if config.B_bias:
            self.B_bias = nn.Parameter(torch.empty(self.d_inner, config.d_state))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.n))
        if self.complex:
            self.A_imag = nn.Parameter(torch.empty(self.d_inner, self.n))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set initial values: S4D-type A, and steps log-uniform between dt_min and dt_max (Mamba, section 3.6)."""
        config = self.config
        n = torch.arange(self.n, dtype=torch.float32)
        rows = {
            "s4d-real": torch.log(n + 1),
            "s4d-lin": torch.full((self.n,), math.log(0.5)),
            "constant": torch.full((self.n,), math.log(0.5)),
            "random": torch.randn(self.d_inner, self.n),
        }
        self.A_log.copy_(rows[config.a_init])
        if self.complex:
            self.A_imag.copy_(n)
        self.D.fill_(1.0)
        for name in ("B", "C"):
            if name not in self.selected:
                matrix = self.get_parameter(name)
                nn.init.ones_(matrix) if name == "B" else nn.init.normal_(matrix)
        if config.B_bias:
            # as C of an S4D layer: of the product of B and C that a channel is, this alone is the channel's own
            nn.init.normal_(self.B_bias)
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

        if "delta" in self.selected:
            spread = self.dt_rank**-0.5 * config.dt_scale
            if config.dt_init == "constant":
                nn.init.constant_(self.dt_proj.weight, spread)
            else:
                nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        self.delta_bias.copy_(
            steps_before_softplus(self.d_inner, config.dt_min, config.dt_max, config.dt_floor)
        )

    @property
    def delta_bias(self) -> Tensor:
        return self.dt_proj.bias if "delta" in self.selected else self.dt_bias

    @property
    def A(self) -> Tensor:
        """The diagonal of the state matrix (d_inner, n): negative real parts, at least float32."""
        return self.keep([self.A_log, *([self.A_imag] if self.complex else [])], self._compute_A)

    def _compute_A(self) -> Tensor:
        real = -torch.exp(full(self.A_log))
        return torch.complex(real, full(self.A_imag).expand_as(real)) if self.complex else real

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the input chooses, delta (..., d_inner) before its bias, B and C (..., n), or their constants.

        With several blocks B and C are (..., heads, n).
        """
        chosen = {}
        if self.together:
            rows = self._of_blocks(self.x_proj, u)
            chosen = dict(zip(self.together, rows.split(list(self.together.values()), -1), strict=True))
        if self.selected.keys() - self.together.keys():
            chosen["delta"] = self._of_blocks(self.delta_proj, u)
        # the bias goes to the scan, which adds it in float32
        if "delta" not in chosen:
            delta = torch.zeros_like(self.dt_bias)
        elif self.heads == 1:
            delta = F.linear(chosen["delta"], self.dt_proj.weight)
        else:
            delta = linear_by_blocks(chosen["delta"], self.dt_proj.weight).flatten(-2)
        return delta, self._matrix("B", chosen), self._matrix("C", chosen)

    def _of_blocks(self, projection: nn.Linear, u: Tensor) -> Tensor:
        if self.heads == 1:
            return projection(u)
        return linear_by_blocks(u.unflatten(-1, (self.heads, -1)), projection.weight)

    def _matrix(self, name: str, chosen: dict[str, Tensor]) -> Tensor:
        matrix = chosen[name] if name in chosen else self.get_parameter(name)
        if self.complex:
            # a copy: part of a single row counts as contiguous wherever it begins, and complex numbers are aligned
            pairs = full(matrix).unflatten(-1, (-1, 2))
            return torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format))
        return matrix

    def forward(
        self, x: Tensor, *, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        y, state = self.mix(self.in_proj(x), state=state, cu_seqlens=cu_seqlens)
        return self.out_proj(y), state

    def mix(
        self, projected: Tensor, *, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        u, z = projected.chunk(2, dim=-1)
        before = None if state is None else state.conv
        if self.parts is not None:
            before = self.parts.inputs_before(u, self.config.d_conv - 1)
        u, conv_state = causal_conv1d(
            u,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=before,
            return_final_state=state is not None,
            cu_seqlens=cu_seqlens,
        )
        delta, B, C = self.select(u)
        A = self.A
        inputs = (u, delta, A, B, C, self.D, z, self.delta_bias, True)
        B_bias = self._matrix("B_bias", {}) if self.config.B_bias else None
        if self.parts is not None:
            y = selective_scan_part(
                *inputs,
                B_bias=B_bias,
                neighbours=self.parts.others(A),
                discretization=self.config.discretization,
            )
            return y, None
        y, ssm_state = selective_scan(
            *inputs,
            B_bias=B_bias,
            initial_state=None if state is None else state.ssm,
            return_final_state=state is not None,
            cu_seqlens=cu_seqlens,
            discretization=self.config.discretization,
        )
        if conv_state is None or ssm_state is None:
            return y, None
        return y, MambaState(conv_state, ssm_state)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d_update(
            u, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        delta, B, C = self.select(u)
        # a constant matrix is one of the batch with a group for every channel
        B, C = B if "B" in self.selected else B[None], C if "C" in self.selected else C[None]
        if self.config.B_bias:
            bias = self._matrix("B_bias", {}).unflatten(0, (self.heads, -1))
            B = (B.reshape(len(B), self.heads, 1, self.n) + bias).flatten(1, 2)
        y = selective_state_update(
            state.ssm,
            u,
            delta,
            self.A,
            B,
            C,
            self.D,
            z,
            self.delta_bias,
            delta_softplus=True,
            discretization=self.config.discretization,
        )
        return self.out_proj(y), state

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Zeros; the convolution's inputs are kept in `dtype`."""
        device, dtype = device or self.D.device, dtype or self.in_proj.weight.dtype
        conv = torch.zeros(batch, self.config.d_conv - 1, self.d_inner, device=device, dtype=dtype)
        ssm_dtype = torch.promote_types(self.A_log.dtype, torch.complex64 if self.complex else torch.float32)
        return MambaState(conv, torch.zeros(batch, self.d_inner, self.n, device=device, dtype=ssm_dtype))


def linear_by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each block of x (..., h, p) by its own q rows of weight (h * q, p): (..., h, q)."""
    return torch.einsum("...hp,hqp->...hq", x, weight.unflatten(0, (x.shape[-2], -1)))


def steps_before_softplus(d: int, low: float, high: float, floor: float = 0.0) -> Tensor:
    """Steps (d,), log-uniform from low to high, of which softplus is still to be taken."""
    start, end = math.log(low), math.log(high)
    step = torch.exp(torch.rand(d) * (end - start) + start).clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))


def full(x: Tensor) -> Tensor:
    """At least float32, as the state space is, whatever the weights are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
