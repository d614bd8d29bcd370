"""What turns a batch's inputs into the vectors that the backbone mixes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """How loud each band of a sound is around every size-th sample: (b, l, 1) to (b, l / size, d_out), rounded up.

    Complex filters that are learnt start as Gabor wavelets, spaced as an ear's, and their energy is averaged over a
    window (TD-filterbanks, Zeghidour et al., 1711.01161). Before a logarithm it is measured by how loud that band is in
    the whole of the sequence, and by the sequence itself (as in PCEN, Wang et al., 1607.05666): that takes away what a
    microphone does to a band and how loud a voice is, and leaves silence 0. Every vector so depends on all samples,
    padding too. Two convolutions over bands and time, which halve the bands, then see alike what higher and lower
    voices say.
    """

    # the length of a window, in steps from a vector to the next
    SPAN = 2.5
    # how much of the measure is the band's own loudness, and the energy, of that, at which the logarithm begins
    OWN, LEAST = 0.8, 0.01
    # of the convolutions
    CHANNELS = 32

    window: Tensor

    def __init__(self, filters: int, size: int, d_out: int) -> None:
        super().__init__()
        self.size = size
        # energies are taken ten times from a vector to the next, or at every sample
        self.step = max(step for step in range(1, max(1, size // 10) + 1) if size % step == 0)
        self.filters = nn.Parameter(
            _gabor(filters, 2 * round(self.SPAN * size / 2) + 1).flatten(0, 1)[:, None]
        )
        window = torch.hann_window(2 * round(self.SPAN * size / self.step / 2) + 3, periodic=False)[1:-1]
        self.register_buffer("window", (window / window.sum())[None, None], persistent=False)
        self.near = nn.Conv2d(1, self.CHANNELS, 3, stride=(2, 1), padding=1)
        self.far = nn.Conv2d(self.CHANNELS, self.CHANNELS, 3, stride=(2, 1), padding=1)
        self.out = nn.Linear(self.CHANNELS * -(-filters // 4), d_out)

    def forward(self, x: Tensor) -> Tensor:
        # quiet bands have energies that 16 bits do not tell apart
        with torch.autocast(x.device.type, enabled=False):
            y = self._energies(x[..., 0].to(self.filters.dtype))
            # a power of 0 has no derivative
            loud = y.mean(2, keepdim=True) + 1e-10
            usual = loud**self.OWN * loud.mean(1, keepdim=True) ** (1 - self.OWN)
            y = torch.log1p(y / (self.LEAST * usual))
        y = F.gelu(self.far(F.gelu(self.near(y[:, None]))))
        return self.out(y.flatten(1, 2).mT)

    def _energies(self, x: Tensor) -> Tensor:
        """Samples (b, l) to what each filter lets through of them around the middle of every group (b, filters, m)."""
        edge, parts, reach = self.filters.shape[2] // 2, self.size // self.step, self.window.shape[2] // 2
        x = F.pad(x, (edge, edge + -x.shape[1] % self.size))[:, None]
        y = F.conv1d(x, self.filters, stride=self.step).unflatten(1, (2, -1)).square().sum(1)
        sides = (reach - parts // 2, reach - (parts - 1) // 2)
        return F.conv1d(F.pad(y, sides).flatten(0, 1)[:, None], self.window, stride=parts).view(
            *y.shape[:2], -1
        )


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
