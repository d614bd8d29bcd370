"""Induction heads: what came after the trigger, when the trigger comes again (Mamba, section 4.1.2; 2209.11895).

A row of length 10. The trigger `!` is the last token of the vocabulary; it stands at a place drawn at random and, once
more, at the end, and nowhere else. What is learnt at one length is asked at every other.

    inputs    c  a  d  !  b  a  c  d  a  !
    targets                              b
"""

from functools import partial

import numpy as np

from .synthetic import IGNORE, Integers, SyntheticDataModule


class InductionHeadsDataModule(SyntheticDataModule):
    """Rows of induction heads, as drawn above; the defaults are those of the paper's table 2.

    Args:
        length: of training rows.
        valid_lengths: of validation rows; without them, `length`.
        test_lengths: of test rows; without them, 2^6, 2^7 ... 2^20.
        vocab_size: tokens, with the trigger.
        held_out_rows: how many there are of each length.
        batch_size, num_workers, seed: see SyntheticDataModule.
    """

    def __init__(
        self,
        length: int = 256,
        valid_lengths: list[int] | None = None,
        test_lengths: list[int] | None = None,
        vocab_size: int = 16,
        held_out_rows: int = 128,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if vocab_size < 3:
            raise ValueError(
                f"data.vocab_size: two tokens to remember and the trigger are 3 or more, not {vocab_size}"
            )
        test_lengths = test_lengths or [2**k for k in range(6, 21)]
        shortest = min(length, *test_lengths, *(valid_lengths or [length]))
        if shortest < 3:
            raise ValueError(
                f"data.length: a trigger, a token and the trigger again are 3 or more, not {shortest}"
            )
        super().__init__(
            partial(draw_row, vocab_size=vocab_size), vocab_size, vocab_size - 1, length, valid_lengths,
            test_lengths, held_out_rows, batch_size, num_workers, seed,
        )  # fmt: skip


def draw_row(random: np.random.Generator, length: int, *, vocab_size: int) -> tuple[Integers, Integers]:
    """Inputs and targets (length,)."""
    trigger = vocab_size - 1
    inputs = random.integers(0, trigger, length)
    place = random.integers(0, length - 2)
    inputs[place] = inputs[-1] = trigger
    targets = np.full(length, IGNORE)
    targets[-1] = inputs[place + 1]
    return inputs, targets
