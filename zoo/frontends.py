"""What turns a batch's inputs into the vectors that the backbone mixes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import BatchNorm


def padded(vocab_size: int) -> int:
    """The rows of an embedding: a multiple of 8, which matrix units want; those past the vocabulary are never read."""
    return -(-vocab_size // 8) * 8


class TokenEmbedding(nn.Module):
    """A vector for each token: (b, l) integers to (b, l, d_model).

    With the complement of each token (vocab_size,), that token's vector stands beside its own: (b, l, 2 d_model), what
    a backbone that reads both strands takes (strands.py).
    """

    complement: Tensor | None

    def __init__(self, vocab_size: int, d_model: int, complement: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(padded(vocab_size), d_model), std=0.02))
        self.register_buffer("complement", complement, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if self.complement is None:
            return x
        return torch.cat([x, F.embedding(self.complement[tokens], self.weight)], dim=-1)


class Patches(nn.Linear):
    """A vector for every `size` neighbours: (b, l, d) to (b, l / size, d_out), rounded up; zeros fill the last one."""

    def __init__(self, d: int, size: int, d_out: int) -> None:
        super().__init__(size * d, d_out)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.size
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        return super().forward(x.unflatten(1, (-1, self.size)).flatten(2).to(self.weight.dtype))


class Filterbank(nn.Module):
    """What is loud in a sound around every size-th sample: (b, l, 1) to (b, l / size, d_out), rounded up.

    The energy that Gabor wavelets let through, spaced as an ear's, is averaged over a window, as where TD-filterbanks
    start (Zeghidour et al., 1711.01161). They are not learnt: at the rate of other weights they soon are no wavelets,
    and less is heard right (docs/log.md). Before a logarithm an energy is measured by how loud that band is in the
    whole of the sequence, and by the sequence itself (as in PCEN, Wang et al., 1607.05666): that takes away what a
    microphone does to a band and how loud a voice is. Every vector so depends on all samples, padding too. While it
    trains, bands and times are left out by lot (SpecAugment, Park et al., 1904.08779).

    Convolutions over bands and time then see alike what higher and lower voices say. After each only the largest of two
    bands stays, and after the first ones of two times, so that a vector stands for `HOPS` energies.
    """

    # energies from a vector to the next, and the length of their window in steps from one to the next
    HOPS, SPAN = 4, 2.5
    # how much of the measure is the band's own loudness, and the energy, of that, at which the logarithm begins
    OWN, LEAST = 0.8, 0.3
    # how many stretches are left out, and the largest share of all bands and of all times that one is
    MASKS, BANDS, TIMES = 2, 0.2, 0.15
    # of each convolution the channels, and of how many times the largest stays
    CONVOLUTIONS = ((32, 2), (48, 2), (64, 1), (96, 1), (128, 1))

    filters: Tensor
    window: Tensor

    def __init__(self, filters: int, size: int, d_out: int) -> None:
        super().__init__()
        if size % self.HOPS:
            raise ValueError(
                f"model.patch: with model.filters it must be a multiple of {self.HOPS}, a vector being made of so many "
                f"energies, not {size}"
            )
        self.size, self.hop = size, size // self.HOPS
        # filters are taken ten times from an energy to the next, or at every sample
        self.step = max(step for step in range(1, max(1, self.hop // 10) + 1) if self.hop % step == 0)
        waves = _gabor(filters, 2 * round(self.SPAN * self.hop / 2) + 1)
        self.register_buffer("filters", waves.flatten(0, 1)[:, None], persistent=False)
        window = torch.hann_window(2 * round(self.SPAN * self.hop / self.step / 2) + 3, periodic=False)[1:-1]
        self.register_buffer("window", (window / window.sum())[None, None], persistent=False)
        widths = (1, *(channels for channels, _ in self.CONVOLUTIONS))
        self.convolutions = nn.ModuleList(
            _Convolution(before, *convolution)
            for before, convolution in zip(widths, self.CONVOLUTIONS, strict=False)
        )
        self.out = nn.Linear(widths[-1] * -(-filters // 2 ** len(self.CONVOLUTIONS)), d_out)

    def forward(self, x: Tensor) -> Tensor:
        # quiet bands have energies that 16 bits do not tell apart
        with torch.autocast(x.device.type, enabled=False):
            y = self._energies(x[..., 0].to(torch.promote_types(x.dtype, torch.float32)))
            # so that silence is not 0 / 0
            loud = y.mean(2, keepdim=True) + 1e-10
            usual = loud**self.OWN * loud.mean(1, keepdim=True) ** (1 - self.OWN)
            y = torch.log1p(y / (self.LEAST * usual))
        if self.training:
            y = y * self._kept(y, 1, self.BANDS) * self._kept(y, 2, self.TIMES)
        y = y[:, None].to(self.out.weight.dtype)
        for convolution in self.convolutions:
            y = convolution(y)
        return self.out(y.flatten(1, 2).mT)

    def _energies(self, x: Tensor) -> Tensor:
        """Samples (b, l) to what each filter lets through of them around the middle of every hop (b, filters, m)."""
        edge, parts, reach = self.filters.shape[2] // 2, self.hop // self.step, self.window.shape[2] // 2
        filters, window = self.filters.to(x.dtype), self.window.to(x.dtype)
        x = F.pad(x, (edge, edge + -x.shape[1] % self.size))[:, None]
        y = F.conv1d(x, filters, stride=self.step).unflatten(1, (2, -1)).square().sum(1)
        y = F.pad(y, (reach - parts // 2, reach - (parts - 1) // 2))
        return F.conv1d(y.flatten(0, 1)[:, None], window, stride=parts).view(*y.shape[:2], -1)

    def maps(self, samples: int) -> list[int]:
        """How many numbers each convolution makes of so many samples."""
        bands, times = self.filters.shape[0] // 2, -(-samples // self.size) * self.HOPS
        found = []
        for channels, fewer in self.CONVOLUTIONS:
            found.append(channels * bands * times)
            bands, times = -(-bands // 2), times // fewer
        return found

    def _kept(self, y: Tensor, axis: int, most: float) -> Tensor:
        """1 where y (b, bands, times) is kept and 0 in stretches along an axis, of a share up to `most` of it each."""
        b, n = len(y), y.shape[axis]
        length, start = torch.rand(2, b, self.MASKS, 1, device=y.device)
        length = most * length
        start = (1 - length) * start
        place = (torch.arange(n, device=y.device) + 0.5) / n
        kept = ((place < start) | (place >= start + length)).all(1).to(y.dtype)
        return kept.unsqueeze(3 - axis)


class _Convolution(nn.Module):
    """Over bands and time, normed; of two bands, and so many times, the largest stays: (b, c, bands, times) to such."""

    def __init__(self, before: int, after: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = BatchNorm(after, eps=1e-5)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).movedim(1, -1))[0].movedim(-1, 1)
        return F.max_pool2d(F.relu(y), (2, self.times), ceil_mode=True)


def _gabor(filters: int, width: int) -> Tensor:
    """Gabor wavelets (2, filters, width), real parts and imaginary ones, of frequencies up to half the samples'.

    They are spaced evenly below an eighth of the highest, and ever wider above, as an ear's are.
    """
    places = torch.arange(filters + 2, dtype=torch.float64) / (filters + 1)
    frequencies = (9**places - 1) / 16
    spread = (frequencies[2:] - frequencies[:-2]) / 4
    # in time as wide as its band is narrow, but within the filter
    lengths = (1 / (2 * math.pi * spread)).clamp(max=width / 5)[:, None]
    t = torch.arange(width, dtype=torch.float64) - width // 2
    bells = torch.exp(-0.5 * (t / lengths).square())
    turns = 2 * math.pi * frequencies[1:-1, None] * t
    waves = torch.stack([turns.cos(), turns.sin()]) * (bells / bells.sum(1, keepdim=True))
    return waves.float()
