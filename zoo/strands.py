"""The two strands of DNA: what is read from one is there, reversed and complemented, on the other.

A model shares its parameters between the strands (Caduceus-PS, 2403.03234, sections 3.2 and 4) by reading both: vectors
are (b, l, 2 d), half of them from the sequence, half from its complement, position by position. The reverse complement
of such vectors is their reverse along l with the halves swapped; whatever maps one half as it maps the reverse of the
other is equivariant to it. The halves meet in the head alone, so a backbone computes them side by side, as a batch.

    x        A  A  C  G          half 1  E(A) E(A) E(C) E(G)    read ->
             T  T  G  C          half 2  E(T) E(T) E(G) E(C)    read <-
"""

import torch
from torch import Tensor

from ..kernels.sequences import joined, mirrored, reverse


def complement_table(complement: list[int] | None, vocab_size: int) -> Tensor:
    """The complement of every token as a tensor (vocab_size,), to index with.

    Raises:
        ValueError: when there is none, or it does not lead back when taken twice.
    """
    if complement is None:
        raise ValueError(
            "model.complement: give the complement of every token; the data module of DNA knows it"
        )
    tokens = range(vocab_size)
    if len(complement) != vocab_size or any(
        other not in tokens or complement[other] != token for token, other in enumerate(complement)
    ):
        raise ValueError(
            f"model.complement: must list the complement of each of {vocab_size} tokens, itself where it has none, so "
            f"that the complement of a complement is the token, not {complement}"
        )
    return torch.tensor(complement)


def split_strands(
    x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Both strands of x (b, l, 2 d), each in the direction it is read in: (2 b, l, d), or (1, 2 l, d) if packed.

    Beside them, where their sequences lie.
    """
    strand, other = x.chunk(2, dim=-1)
    other = reverse(other, lengths=lengths)
    if cu_seqlens is None:
        return torch.cat([strand, other]), None, None if lengths is None else lengths.repeat(2)
    l = x.shape[1]
    return torch.cat([strand, other], dim=1), joined(cu_seqlens, mirrored(cu_seqlens, l), l), None


def join_strands(y: Tensor, lengths: Tensor | None, *, packed: bool) -> Tensor:
    """The inverse of `split_strands`, (b, l, 2 d)."""
    strand, other = y.chunk(2, dim=1 if packed else 0)
    return torch.cat([strand, reverse(other, lengths=lengths)], dim=-1)


def reverse_complement(
    tokens: Tensor, complement: Tensor, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The other strand of every sequence of tokens (b, l), where it lies; what is behind `lengths` stays."""
    return complement[reverse(tokens, lengths=lengths, cu_seqlens=cu_seqlens)]
