"""The time-invariant mixer: a diagonal state space whose steps and matrices no input chooses (S4D, 2206.11893).

    h_t = exp(delta A) h_{t-1} + gain u_t,   y_t = C . h_t + D u_t,     that is   y = K * u + D u,
    K_k = C . (exp(k delta A) gain)                                       (equations 2 to 5; B is part of C)

What never changes along time is a convolution: one Fourier transform over the whole length, where a scan walks. A
state that comes in or goes out takes products with powers of the decay. Where there are kernels of the scan, they are
faster if states are small, and for packed sequences.

It is the model that `Mamba` is with `selective: []`, started as S4D is; there delta, B and C can be given to the input
one by one, here they cannot. So pattern "s4d" beside "mamba" is the control that differs from the selective block in
selection alone (Mamba, table 6); block "s4" is the layer of S4 and SaShiMi (2202.09729).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import backend as backends
from ..kernels.conv import causal_conv1d, causal_conv1d_update
from ..kernels.reference import hold
from ..kernels.scan import selective_scan
from .config import S4DConfig
from .grouping import grouped
from .mamba import MambaState, full, steps_before_softplus
from .mixer import Mixer

# numbers of a state up to which the kernels of the scan take less of a GPU than Fourier transforms do (docs/log.md)
MOST = 32


class S4D(Mixer):
    """A time-invariant state space model over d_inner channels.

    block "mamba" has the Mamba block round it, convolution and gate:    u, z = in(x);  y = out(ssm(conv(u)) silu(z))
    block "s4" mixes the channels of x themselves, and then each other:  y = glu(out(gelu(ssm(x))))

    Of two directions (bidirectional.py) gelu sees each, and not their sum as in S4 (docs/lra.md).
    """

    def __init__(self, d_model: int, config: S4DConfig) -> None:
        super().__init__()
        self.config = config
        self.gated = config.block == "mamba"
        self.d_inner = config.expand * d_model if self.gated else d_model
        self.complex = config.a_init != "s4d-real"
        self.n = config.d_state // 2 if self.complex else config.d_state
        # a complex state stands for its conjugate too
        self._sides = 2 if self.complex else 1
        if self.gated:
            self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
            self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner)
            self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        else:
            self.in_proj = nn.Identity()
            self.out_proj = _GatedLinear(self.d_inner, 2 * d_model)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.n))
        if self.complex:
            self.A_imag = nn.Parameter(torch.empty(self.d_inner, self.n))
        self.C = nn.Parameter(torch.empty(self.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.dt_bias = nn.Parameter(torch.empty(self.d_inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set initial values: A as S4D's table 1 has it, C with variance 1, steps log-uniform (S4D, section 4)."""
        config, n = self.config, torch.arange(self.n, dtype=torch.float32)
        if self.complex:
            self.A_log.fill_(math.log(0.5))
            # as many states as d_state says, of which conjugate ones are kept once
            inverse = config.d_state / math.pi * (config.d_state / (2 * n + 1) - 1)
            self.A_imag.copy_(inverse if config.a_init == "s4d-inv" else math.pi * n)
        else:
            self.A_log.copy_(torch.log(n + 1))
        nn.init.normal_(self.C, std=0.5**0.5 if self.complex else 1.0)
        nn.init.ones_(self.D)
        self.dt_bias.copy_(steps_before_softplus(self.d_inner, config.dt_min, config.dt_max))

    def state_space(self) -> tuple[Tensor, Tensor, Tensor]:
        """delta (d_inner,), A and C (d_inner, n), at least float32, A and C complex where the state is."""
        real, C = -torch.exp(full(self.A_log)), full(self.C)
        delta = F.softplus(full(self.dt_bias))
        if not self.complex:
            return delta, real, C
        return delta, torch.complex(real, full(self.A_imag)), torch.view_as_complex(C.unflatten(-1, (-1, 2)))

    def kernel(self, l: int) -> Tensor:
        """The first l values of the convolution's kernel, (d_inner, l)."""
        delta, A, C = self.state_space()
        _, gain = hold(delta.unsqueeze(-1), A, self.config.discretization)
        return self._read(C * gain, l)

    def convolve(self, u: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """K * u + D u for u (b, l, d_inner), by Fourier transforms in float32 or better.

        After a state (b, d_inner, n) what is left of it is added, and the last state returned.
        """
        with torch.autocast(u.device.type, enabled=False):
            l, x = u.shape[1], full(u)
            size = _fast_size(2 * l - 1)
            # time last, as transforms want it
            spectrum = torch.fft.rfft(x.mT, n=size) * torch.fft.rfft(self.kernel(l), n=size)
            y = torch.addcmul(torch.fft.irfft(spectrum, n=size)[..., :l].mT, x, full(self.D))
            if before is None:
                return y, None
            delta, A, C = self.state_space()
            decay, gain = hold(delta.unsqueeze(-1), A, self.config.discretization)
            after = torch.exp(l * delta.unsqueeze(-1) * A) * before + gain * self._sum(x)
            return y + self._read(C * decay * before, l).mT, after

    def scan(
        self, u: Tensor, before: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same by a walk along time, which may be over packed sequences (kernels/scan.py).

        There a step brings in delta u, here gain u: what no input chooses goes into C, and states are measured by it.
        """
        delta, A, C = self.state_space()
        _, gain = hold(delta.unsqueeze(-1), A, self.config.discretization)
        share = gain / delta.unsqueeze(-1)
        y, after = selective_scan(
            u,
            delta,
            A,
            torch.ones_like(A),
            C * share,
            full(self.D),
            initial_state=None if before is None else before / share,
            return_final_state=before is not None,
            cu_seqlens=cu_seqlens,
        )
        return y, None if after is None else after * share

    def _compute(
        self, u: Tensor, before: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`convolve` or `scan`, whichever takes less time."""
        kernels = backends.has_kernels(u) and (cu_seqlens is not None or self.config.d_state <= MOST)
        if kernels or not u.numel():
            return self.scan(u, before, cu_seqlens)
        if cu_seqlens is None:
            return self.convolve(u, before)
        if before is not None or torch.compiler.is_compiling():
            # a compiler has no lengths to go by
            return self.scan(u, before, cu_seqlens)
        groups = grouped(cu_seqlens, u)
        parts = groups.split(u)
        rows = [self.convolve(part.flatten(0, 1))[0] for part in parts]
        return groups.join([y.view_as(part) for y, part in zip(rows, parts, strict=True)]), None

    def _read(self, rows: Tensor, l: int) -> Tensor:
        """rows (..., d_inner, n) times the powers 0 to l - 1 of the decay, summed over states: (..., d_inner, l)."""
        coarse, fine = self._powers(l)
        products = _real_row(rows.unsqueeze(-2) * coarse) @ _real_row(fine.conj()).mT
        return self._sides * products.flatten(-2)[..., :l]

    def _sum(self, x: Tensor) -> Tensor:
        """x (b, l, d_inner), each times the decay to the power of the steps behind it, summed: (b, d_inner, n)."""
        coarse, fine = self._powers(x.shape[1])
        rows, m = coarse.shape[1], fine.shape[1]
        back = F.pad(x.flip(1).mT, (0, rows * m - x.shape[1])).unflatten(-1, (rows, m))
        sums = back @ _real_row(fine)
        if self.complex:
            sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2)))
        return (sums * coarse).sum(-2)

    def _powers(self, l: int) -> tuple[Tensor, Tensor]:
        """Powers of the decay that are multiples of m, (d_inner, k, n), and those below m, (d_inner, m, n).

        Each of the first l is a product of two, so that a sum over states is one of matrices and no (d, n, l) exists.
        """
        delta, A, _ = self.state_space()
        m = 1 << (l.bit_length() // 2)
        count = -(-l // m)
        t = torch.arange(max(m, count), device=delta.device, dtype=delta.dtype).unsqueeze(-1)
        exponent = (delta.unsqueeze(-1) * A).unsqueeze(1)
        return torch.exp(m * t[:count] * exponent), torch.exp(t[:m] * exponent)

    def forward(
        self, x: Tensor, *, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        y, state = self.mix(self.in_proj(x), state=state, cu_seqlens=cu_seqlens)
        return self.out_proj(y), state

    def mix(
        self, projected: Tensor, *, state: MambaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        u, z = projected.chunk(2, dim=-1) if self.gated else (projected, None)
        conv_state = None if state is None else state.conv
        if self.gated:
            u, conv_state = causal_conv1d(
                u,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu",
                initial_state=conv_state,
                return_final_state=state is not None,
                cu_seqlens=cu_seqlens,
            )
        before = None if state is None else state.ssm
        y, ssm_state = self._compute(u, before, cu_seqlens)
        y = _activated(y, z).to(u.dtype)
        if conv_state is None or ssm_state is None:
            return y, None
        return y, MambaState(conv_state, ssm_state)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        projected = self.in_proj(x)
        u, z = projected.chunk(2, dim=-1) if self.gated else (projected, None)
        if self.gated:
            u = causal_conv1d_update(
                u, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
            )
        decay, gain, readout = self.keep(self._weights(), self._discretise)
        inputs, row = full(u), _real_row(state.ssm.mul_(decay))
        row.addcmul_(gain, inputs.unsqueeze(-1))
        y = torch.addcmul(torch.linalg.vecdot(row, readout), inputs, full(self.D))
        return self.out_proj(_activated(y, z).to(u.dtype)), state

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Zeros; the convolution's inputs are kept in `dtype`. Without a convolution there are none."""
        device, dtype = device or self.D.device, dtype or self.C.dtype
        width = self.config.d_conv - 1 if self.gated else 0
        conv = torch.zeros(batch, width, self.d_inner, device=device, dtype=dtype)
        ssm_dtype = torch.promote_types(self.A_log.dtype, torch.complex64 if self.complex else torch.float32)
        return MambaState(conv, torch.zeros(batch, self.d_inner, self.n, device=device, dtype=ssm_dtype))

    def _weights(self) -> list[Tensor]:
        """All that `_discretise` makes its values of."""
        return [self.A_log, self.C, self.dt_bias, *([self.A_imag] if self.complex else [])]

    def _discretise(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decay (d_inner, n), and by the state's real numbers the gain and what reads it out."""
        delta, A, C = self.state_space()
        decay, gain = hold(delta.unsqueeze(-1), A, self.config.discretization)
        return decay, _real_row(gain.contiguous()), self._sides * _real_row(C.conj())


class _GatedLinear(nn.Linear):
    """A linear map whose second half of outputs gates the first (GLU, 1612.08083)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x))


def _activated(y: Tensor, z: Tensor | None) -> Tensor:
    return F.gelu(y, approximate="tanh") if z is None else y * F.silu(z)


def _real_row(x: Tensor) -> Tensor:
    """(..., n) as real numbers: itself, or (..., 2 n). The product with a conjugate's is the real part of the sum."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def _fast_size(least: int) -> int:
    """An even length from `least` on that Fourier transforms are fast at."""
    power = 1 << max(3, (least - 1).bit_length())
    return min(size for size in (power * 5 // 8, power * 3 // 4, power) if size >= least)
