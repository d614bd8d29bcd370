"""What simple models reach on the same split: the numbers that a trained model has to be better than.

A Markov model of order k predicts a symbol from the k before it by how often each followed them in the training data,
one added to every count. Linear prediction guesses a sample of sound from those before it, and a table says what
follows each guess. A k-mer regression tells sequences apart by how often each word of k bases occurs in them, on either
strand; the longer ones have more words, so it knows their length too. One on spectra tells clips of sound apart by how
loud each band of pitch is at each time.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .alphabet import BASES
from .waveform import LEVELS, Waveform

# symbols that are counted at a time
_BLOCK = 1 << 22


def markov_bits(
    train: Iterable[NDArray[np.integer]], held_out: Iterable[NDArray[np.integer]], symbols: int, order: int
) -> float:
    """The mean of -log2 p over the symbols of sequences (l,) held out; what is no symbol is neither seen nor predicted.

    A sequence starts, and goes on after what is no symbol, as if symbol 0 had been before it.

    Raises:
        ValueError: where a table of symbols^(order + 1) counts would not fit into memory, or nothing is held out.
    """
    if symbols ** (order + 1) > 1 << 28:
        raise ValueError(f"a Markov model of order {order} over {symbols} symbols needs too large a table")
    counts = np.zeros(symbols ** (order + 1), dtype=np.int64)
    for block in _words(train, symbols, order):
        counts += np.bincount(block, minlength=len(counts))
    rows = counts.reshape(-1, symbols)
    bits = np.log2(rows.sum(1, keepdims=True) + symbols) - np.log2(rows + 1)
    total, number = 0.0, 0
    for block in _words(held_out, symbols, order):
        total, number = total + float(bits.reshape(-1)[block].sum()), number + len(block)
    if not number:
        raise ValueError("there is not a symbol held out")
    return total / number


def _words(sequences: Iterable[NDArray[np.integer]], symbols: int, order: int) -> Iterator[NDArray[np.int64]]:
    """For every symbol, itself and the `order` before it as one number, block by block."""
    for sequence in sequences:
        for start in range(0, len(sequence), _BLOCK):
            before = min(order, start)
            block = np.asarray(sequence[start - before : start + _BLOCK]).astype(np.int64)
            block = np.concatenate([np.zeros(order - before, dtype=np.int64), block])
            known = (block >= 0) & (block < symbols)
            block[~known] = 0
            words = np.zeros(len(block) - order, dtype=np.int64)
            for i in range(order + 1):
                words = words * symbols + block[i : i + len(words)]
            yield words[known[order:]]


def prediction_bits(
    train: Iterable[NDArray[np.uint8]],
    held_out: Iterable[NDArray[np.uint8]],
    waveform: Waveform,
    order: int = 32,
) -> float:
    """The mean of -log2 p over the codes of recordings (l,) held out, from a linear prediction of each sample.

    The coefficients are those of least squares (the autocorrelation method), the same for all recordings; the table has
    how often each code followed each code that was predicted, one added to every count.
    """
    train = list(train)
    coefficients = _least_squares([waveform.decode(codes) for codes in train], order)

    def pairs(recordings: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.int64]]:
        for codes in recordings:
            samples = waveform.decode(codes).astype(np.float64)
            guesses = waveform.encode(np.convolve(samples, [0.0, *coefficients])[: len(codes)])
            yield guesses * np.int64(LEVELS) + codes

    counts = sum(np.bincount(block, minlength=LEVELS**2) for block in pairs(train))
    rows = np.asarray(counts).reshape(LEVELS, LEVELS)
    bits = np.log2(rows.sum(1, keepdims=True) + LEVELS) - np.log2(rows + 1)
    found = np.concatenate([bits.reshape(-1)[block] for block in pairs(held_out)])
    return float(found.mean())


def _least_squares(recordings: list[NDArray[np.float32]], order: int) -> NDArray[np.float64]:
    """What each of the samples 1, 2, ... before counts in the prediction of the next one."""
    correlation = np.zeros(order + 1)
    for recording in recordings:
        x = recording.astype(np.float64)
        for lag in range(min(order + 1, len(x))):
            correlation[lag] += x[lag:] @ x[: len(x) - lag]
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    # a little noise, for what is silent or periodic
    noise = (1e-9 * correlation[0] + 1e-12) * np.eye(order)
    return np.linalg.solve(correlation[lags] + noise, correlation[1:])


def kmer_accuracy(
    train: tuple[list[NDArray[np.uint8]], NDArray[np.int64]],
    held_out: tuple[list[NDArray[np.uint8]], NDArray[np.int64]],
    classes: int,
    k: int,
    decay: float = 1e-2,
) -> float:
    """The share of held-out sequences that a multinomial regression on k-mer counts puts into the right class.

    Args:
        train, held_out: tokens of sequences, and their classes (n,).
        decay: what the mean of the squared weights counts beside the mean cross-entropy.
    """
    counts = [(kmer_counts(sequences, k), labels) for sequences, labels in (train, held_out)]
    return regression_accuracy(counts[0], counts[1], classes, decay)


def length_accuracy(
    train: tuple[NDArray[np.int64], NDArray[np.int64]],
    held_out: tuple[NDArray[np.int64], NDArray[np.int64]],
    classes: int,
    neighbours: int = 5,
) -> float:
    """The share of held-out sequences that their length alone puts into the right class.

    Each gets the class that is commonest where lengths are as near to its own as those of so many neighbours.

    Args:
        train, held_out: lengths of sequences (n,), and their classes (n,).
    """
    (lengths, labels), (own, wanted) = train, held_out
    right = 0
    for length in np.unique(own):
        distances = np.abs(lengths - length)
        reach = np.sort(distances)[min(neighbours, len(distances)) - 1]
        guess = np.bincount(labels[distances <= reach], minlength=classes).argmax()
        right += int((wanted[own == length] == guess).sum())
    return right / len(own)


def spectrum_accuracy(
    train: tuple[list[NDArray[np.float32]], NDArray[np.int64]],
    held_out: tuple[list[NDArray[np.float32]], NDArray[np.int64]],
    rate: int,
    classes: int,
    decay: float = 1e-2,
) -> float:
    """The share of held-out clips that a multinomial regression on their spectra puts into the right class.

    Args:
        train, held_out: the samples of clips at `rate`, and their classes (n,).
        decay: see kmer_accuracy.
    """
    spectra = [(log_mel_spectra(clips, rate), labels) for clips, labels in (train, held_out)]
    return regression_accuracy(spectra[0], spectra[1], classes, decay)


def regression_accuracy(
    train: tuple[NDArray[np.float32], NDArray[np.int64]],
    held_out: tuple[NDArray[np.float32], NDArray[np.int64]],
    classes: int,
    decay: float = 1e-2,
) -> float:
    """The share of held-out examples that a multinomial regression on features (n, k) puts into the right class (n,).

    Args:
        train, held_out: features, which are brought to one mean and scale, and classes.
        decay: see kmer_accuracy.
    """
    features = [torch.from_numpy(features) for features, _ in (train, held_out)]
    mean, scale = features[0].mean(0), features[0].std(0).clamp(min=1e-6)
    x, tested = ((feature - mean) / scale for feature in features)
    labels = torch.from_numpy(train[1])
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        fit.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    fit.step(loss)
    with torch.no_grad():
        guesses = F.linear(tested, weight, bias).argmax(1)
    return float((guesses == torch.from_numpy(held_out[1])).float().mean())


def log_mel_spectra(clips: list[NDArray[np.float32]], rate: int) -> NDArray[np.float32]:
    """The logarithm of the power, over a clip's highest, in 40 mel bands at each of 8 parts of clips (n,): (n, 320)."""
    from torchaudio.transforms import MelSpectrogram

    # windows of 32 ms, every 16 ms
    size = 1 << round(np.log2(0.032 * rate))
    spectrogram = MelSpectrogram(rate, size, hop_length=size // 2, n_mels=40)
    table = []
    for clip in clips:
        padded = F.pad(torch.from_numpy(clip), (0, max(0, 4 * size - len(clip))))
        power = spectrogram(padded)
        logs = (power / power.max().clamp(min=1e-9) + 1e-5).log()
        table.append(F.adaptive_avg_pool1d(logs[None], 8).flatten().numpy())
    return np.stack(table)


def kmer_counts(sequences: list[NDArray[np.uint8]], k: int) -> NDArray[np.float32]:
    """How often each word of k bases occurs in tokens of sequences (n,), on either strand: (n, 4^k)."""
    words = np.arange(BASES**k)
    opposite = sum((BASES - 1 - words // BASES**i % BASES) * BASES ** (k - 1 - i) for i in range(k))
    table = np.zeros((len(sequences), len(words)), dtype=np.float32)
    for row, sequence in zip(table, sequences, strict=True):
        # a word that holds what is no base is more than any word can be
        letters = np.where(sequence < BASES, sequence, len(words)).astype(np.int64)
        codes = np.zeros(max(0, len(letters) - k + 1), dtype=np.int64)
        for i in range(k):
            codes += letters[i : i + len(codes)] * BASES ** (k - 1 - i)
        counts = np.bincount(codes[codes < len(words)], minlength=len(words))
        row += counts + counts[opposite]
    return table
