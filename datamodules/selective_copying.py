"""Copying: say again, in their order, the tokens among noise (Mamba, section 4.1.1; Arjovsky et al., 1511.06464).

Selective copying, tokens 4 at length 10: where they stand differs from row to row, so that what is noise has to be told
by what it is. Noise is `.`, which is token 0, and the last token `?` asks for the next one.

    inputs    .  b  .  .  a  c  .  .  .  b  ?  ?  ?  ?
    targets                                 b  a  c  b

Plain copying (selective: false), which every row asks at one distance, so that a fixed convolution can do it:

    inputs    b  a  c  b  .  .  .  .  .  .  ?  ?  ?  ?
    targets                                 b  a  c  b
"""

from functools import partial

import numpy as np

from .synthetic import IGNORE, Integers, SyntheticDataModule

NOISE = 0


class SelectiveCopyingDataModule(SyntheticDataModule):
    """Rows of copying, as drawn above; the defaults are those of the paper's table 1.

    Args:
        length: positions that the tokens are strewn over; the questions come behind them.
        tokens: how many tokens there are to say again.
        vocab_size: tokens, with noise and question.
        selective: strew them anew in every row, or have them stand at the start.
        held_out_rows, batch_size, num_workers, seed: see SyntheticDataModule.
    """

    def __init__(
        self,
        length: int = 4096,
        tokens: int = 16,
        vocab_size: int = 16,
        selective: bool = True,
        held_out_rows: int = 512,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if vocab_size < 4:
            raise ValueError(
                f"data.vocab_size: two tokens to copy, noise and question are 4 or more, not {vocab_size}"
            )
        if not 1 <= tokens <= length:
            raise ValueError(f"data.tokens: must be from 1 to data.length, {length}, not {tokens}")
        draw = partial(draw_row, tokens=tokens, vocab_size=vocab_size, selective=selective)
        super().__init__(
            draw, vocab_size, vocab_size - 2, length, None, None, held_out_rows, batch_size, num_workers, seed
        )


def draw_row(
    random: np.random.Generator, length: int, *, tokens: int, vocab_size: int, selective: bool
) -> tuple[Integers, Integers]:
    """Inputs and targets (length + tokens,)."""
    question = vocab_size - 1
    said = random.integers(NOISE + 1, question, tokens)
    places = np.arange(tokens)
    if selective:
        places = np.sort(random.choice(length, tokens, replace=False, shuffle=False))
    inputs = np.full(length + tokens, NOISE)
    inputs[places], inputs[length:] = said, question
    targets = np.full(length + tokens, IGNORE)
    targets[length:] = said
    return inputs, targets
