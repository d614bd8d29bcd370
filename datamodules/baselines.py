"""What simple predictors take, in bits a sample, to write a waveform's codes: a model has to take fewer.

Each is fitted on training rows and measured on held-out ones. A row is codes (k + 1,), whose first is only seen. Both
end in a table of how often a code followed a context, 256 x 256, to whose counts 1/2 is added.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from .waveform import LEVELS, Waveform

Row = NDArray[np.uint8]


def order1_bits(train: Iterable[Row], held_out: Iterable[Row]) -> float:
    """Guess each code from the one before it: a Markov chain of order 1."""
    return _table_bits(*(_count((row[:-1], row[1:]) for row in rows) for rows in (train, held_out)))


def lpc_bits(train: list[Row], held_out: list[Row], waveform: Waveform, order: int = 32) -> float:
    """Guess each code from the code of what a linear predictor of the samples before it says (least squares)."""
    coefficients = _fit([waveform.decode(row) for row in train], order)

    def pairs(row: Row) -> tuple[Row, Row]:
        x = waveform.decode(row).astype(np.float64)
        predicted = np.convolve(x, np.concatenate([[0.0], coefficients]))[1 : len(x)]
        return waveform.encode(predicted), row[1:]

    return _table_bits(*(_count(pairs(row) for row in rows) for rows in (train, held_out)))


def _fit(rows: list[NDArray[np.float32]], order: int) -> NDArray[np.float64]:
    """The coefficients of the samples 1, 2, ... before, by the autocorrelation method."""
    correlation = np.zeros(order + 1)
    for row in rows:
        x = row.astype(np.float64)
        for lag in range(min(order + 1, len(x))):
            correlation[lag] += x[lag:] @ x[: len(x) - lag]
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    # a little noise, for what is silent or periodic
    ridge = 1e-9 * correlation[0] + 1e-12
    return np.linalg.solve(correlation[lags] + ridge * np.eye(order), correlation[1:])


def _count(pairs: Iterable[tuple[Row, Row]]) -> NDArray[np.float64]:
    """How often each code (columns) followed each context (rows)."""
    counts = np.zeros(LEVELS * LEVELS)
    for context, code in pairs:
        counts += np.bincount(context.astype(np.int64) * LEVELS + code, minlength=LEVELS * LEVELS)
    return counts.reshape(LEVELS, LEVELS)


def _table_bits(train: NDArray[np.float64], held_out: NDArray[np.float64]) -> float:
    p = (train + 0.5) / (train + 0.5).sum(1, keepdims=True)
    return float(-(held_out * np.log2(p)).sum() / held_out.sum())
