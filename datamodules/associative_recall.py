"""Multi-query associative recall: pairs are told, keys asked for later (MQAR; Zoology, 2312.04927, section 3 and C.1).

Two pairs at length 12: keys a, b of the lower half of the vocabulary, values X, Y of the upper half, each key and each
value at most once in a row. Behind the pairs every key is asked once, most of them soon (the distance follows a power
law), and any token stands between the questions.

    inputs    a  X  b  Y  q  T  b  f  a  R  n  c
    targets                     Y     X
"""

from functools import partial

import numpy as np

from .synthetic import IGNORE, Integers, SyntheticDataModule


class AssociativeRecallDataModule(SyntheticDataModule):
    """Rows of multi-query associative recall, as drawn above.

    Args:
        length: tokens a row.
        pairs: how many there are to remember.
        vocab_size: half of it are keys, half values.
        power: of the law of distances; the nearer to 0, the sooner most keys are asked.
        held_out_rows, batch_size, num_workers, seed: see SyntheticDataModule.
    """

    def __init__(
        self,
        length: int = 256,
        pairs: int = 32,
        vocab_size: int = 8192,
        power: float = 0.01,
        held_out_rows: int = 1024,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if pairs < 1 or 4 * pairs > length:
            raise ValueError(f"data.pairs: must be from 1 to a quarter of data.length, {length}, not {pairs}")
        if pairs >= vocab_size // 2:
            raise ValueError(
                f"data.vocab_size: must be above {2 * pairs} for {pairs} different keys, not {vocab_size}"
            )
        if power <= 0:
            raise ValueError(f"data.power: must be above 0, not {power}")
        draw = partial(draw_row, pairs=pairs, vocab_size=vocab_size, power=power)
        super().__init__(
            draw,
            vocab_size,
            vocab_size // 2,
            length,
            None,
            None,
            held_out_rows,
            batch_size,
            num_workers,
            seed,
        )


def draw_row(
    random: np.random.Generator, length: int, *, pairs: int, vocab_size: int, power: float
) -> tuple[Integers, Integers]:
    """Inputs and targets (length,)."""
    half, told = vocab_size // 2, 2 * pairs
    keys = random.choice(half, pairs, replace=False)
    values = half + random.choice(vocab_size - half, pairs, replace=False)
    # a question takes two positions, so that some token stands between any two
    free = (length - told) // 2
    # the first to arrive, each at its own rate, are as if drawn by the law one after the other
    arrivals = random.standard_exponential(free) * np.arange(1, free + 1) ** (1.0 - power)
    places = told + 2 * np.argsort(arrivals)[:pairs]
    inputs = random.integers(0, vocab_size, length)
    inputs[:told:2], inputs[1:told:2], inputs[places] = keys, values, keys
    targets = np.full(length, IGNORE)
    targets[places] = values
    return inputs, targets
