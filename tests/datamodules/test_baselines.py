"""The simple models that trained ones are compared with."""

from collections import Counter
from itertools import product
from math import log2

import numpy as np
import pytest
from mambazoo.datamodules import baselines
from mambazoo.datamodules.baselines import (
    kmer_accuracy,
    kmer_counts,
    length_accuracy,
    markov_bits,
    prediction_bits,
    spectrum_accuracy,
)
from mambazoo.datamodules.waveform import Waveform


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("block", [5, 1 << 22])
def test_a_markov_model_predicts_by_what_followed_before(
    order: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_BLOCK", block)
    rng = np.random.default_rng(0)
    train, tested = ([rng.integers(0, 5, size) for size in sizes] for sizes in ((40, 1, 23), (17, 30)))
    # 4 is no symbol
    followed: Counter[tuple[int, ...]] = Counter()
    words = {id(x): [0] * order + [int(s) if s < 4 else 0 for s in x] for x in (*train, *tested)}
    for x in train:
        followed.update(tuple(words[id(x)][i : i + order + 1]) for i, s in enumerate(x) if s < 4)
    bits = []
    for x in tested:
        for i, s in enumerate(x):
            if s < 4:
                word = tuple(words[id(x)][i : i + order + 1])
                seen = sum(followed[(*word[:-1], other)] for other in range(4))
                bits.append(-log2((followed[word] + 1) / (seen + 4)))
    assert markov_bits(train, tested, 4, order) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_a_markov_model_needs_room_and_something_to_predict() -> None:
    with pytest.raises(ValueError, match="order 20 over 4 symbols needs too large a table"):
        markov_bits([], [], 4, 20)
    with pytest.raises(ValueError, match="not a symbol held out"):
        markov_bits([np.zeros(3, np.uint8)], [np.array([7])], 4, 1)


def test_words_are_counted_on_both_strands() -> None:
    sequence = np.array([0, 1, 4, 2, 3, 3, 0, 1, 1, 2], dtype=np.uint8)
    expected = Counter()
    opposite = [3 - s if s < 4 else s for s in sequence.tolist()[::-1]]
    for strand in (sequence.tolist(), opposite):
        expected.update(tuple(strand[i : i + 3]) for i in range(len(strand) - 2))
    counts = kmer_counts([sequence, sequence[:2]], 3)
    assert counts[0].tolist() == [expected[word] for word in product(range(4), repeat=3)]
    assert counts[1].sum() == 0


def test_a_regression_tells_compositions_apart_but_not_lots() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    rich = [rng.choice(4, 100, p=[0.2, 0.3, 0.3, 0.2] if y else [0.3, 0.2, 0.2, 0.3]) for y in labels]
    even = [rng.integers(0, 4, 100) for _ in labels]
    found = []
    for sequences in (rich, even):
        tokens = [sequence.astype(np.uint8) for sequence in sequences]
        found.append(kmer_accuracy((tokens[:200], labels[:200]), (tokens[200:], labels[200:]), 2, 3))
    assert found[0] > 0.9
    assert found[1] < 0.65


def resonance(count: int, seed: int) -> np.ndarray:
    """Noise through a resonance: two samples say all that can be known of the next."""
    x = np.zeros(count + 2)
    for i, e in enumerate(np.random.default_rng(seed).normal(0, 0.02, count), 2):
        x[i] = 1.6 * x[i - 1] - 0.9 * x[i - 2] + e
    return x[2:]


def test_linear_prediction_predicts_by_its_best_coefficients() -> None:
    waveform = Waveform("linear", 8000)
    codes = [waveform.encode(resonance(size, seed)) for seed, size in enumerate((30_000, 9_000, 4_000))]
    train, tested = codes[:2], codes[2:]
    found = prediction_bits(train, tested, waveform, 2)

    # the same, sample by sample, with coefficients that are found by least squares over all rows
    samples = [waveform.decode(x).astype(float) for x in codes]
    rows = np.concatenate([np.stack([x[1:-1], x[:-2]], 1) for x in samples[:2]])
    best = np.linalg.lstsq(rows, np.concatenate([x[2:] for x in samples[:2]]), rcond=None)[0]
    counts = np.ones((256, 256))
    bits = []
    for x, seen in zip(samples, codes, strict=True):
        padded = np.concatenate([[0.0, 0.0], x])
        guesses = waveform.encode(padded[1:-1] * best[0] + padded[:-2] * best[1])
        if len(x) > 4_000:
            np.add.at(counts, (guesses, seen), 1)
        else:
            bits = np.log2(counts[guesses].sum(1) / counts[guesses, seen]).tolist()
    assert found == pytest.approx(sum(bits) / len(bits), abs=0.01)
    # one sample back is not enough
    assert found < markov_bits(train, tested, 256, 1) - 0.3
    assert found < prediction_bits(train, tested, waveform, 1) - 0.3


def test_spectra_tell_pitches_apart_but_not_loudness() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    noise = [rng.normal(0, 0.01, 3000).astype(np.float32) for _ in labels]
    tones = [np.sin(np.arange(3000) * (0.3 + 0.1 * y)) + x for x, y in zip(noise, labels, strict=True)]
    louder = [x * (1 + 9 * y) for x, y in zip(noise, labels, strict=True)]
    found = []
    for clips in (tones, louder):
        clips = [clip.astype(np.float32) for clip in clips]
        found.append(spectrum_accuracy((clips[:80], labels[:80]), (clips[80:], labels[80:]), 8000, 2))
    assert found[0] > 0.95
    assert found[1] < 0.8
    short = ([np.zeros(0, np.float32), np.ones(3, np.float32)], np.array([0, 1]))
    assert 0 <= spectrum_accuracy(short, short, 8000, 2) <= 1


def test_lengths_alone_tell_what_they_can() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    # two classes of many lengths, and one of a single length that others seldom have
    lengths = np.where(labels == 2, 200, rng.integers(100, 300, size=400))
    train, held_out = (lengths[:300], labels[:300]), (lengths[300:], labels[300:])
    found = length_accuracy(train, held_out, 3)
    assert 0.5 < found < 0.9
    assert length_accuracy((lengths[:300], labels[:300] // 2), (lengths[300:], labels[300:] // 2), 2) > 0.95
    # fewer sequences than neighbours, and lengths that nobody has
    assert length_accuracy((np.array([10]), np.array([1])), (np.array([5, 90]), np.array([1, 0])), 2) == 0.5
