"""What simple models reach on the same split: the numbers that a trained model has to be better than.

A Markov model of order k predicts a symbol from the k before it by how often each followed them in the training data,
one added to every count. A k-mer regression tells sequences apart by how often each word of k bases occurs in them, on
either strand; the longer ones have more words, so it knows their length too.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .alphabet import BASES

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
    features = [torch.from_numpy(kmer_counts(sequences, k)) for sequences, _ in (train, held_out)]
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
