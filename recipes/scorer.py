"""From variants to scores: what a model of DNA thinks of a genome with either allele.

A causal model gives the log-likelihood of a whole window: the changed bases, and as much of the reference before and
behind them. The windows of both alleles hold the same flanks, so that their lengths differ by what is inserted or
deleted. A model that sees both sides gives that of the changed base, hidden among all the others (a
pseudo-likelihood), which single substitutions alone have. On both strands, it is the mean of the two.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..datamodules.alphabet import BASES, COMPLEMENT, EOS
from ..datamodules.genome import Genome
from ..datamodules.variants import Change, Pieces, Skip, Variant, Windows, changes_of
from ..zoo.generate import fetch
from ..zoo.genomics import GenomeModel
from ..zoo.scoring import Packed, log_likelihoods, log_probabilities_at
from .device import autocast

# of an ALT allele: the log-likelihoods with REF and with ALT in nats, or why there are none
Outcome = list[float] | Skip
Scored = list[tuple[Variant, list[Outcome]]]


class Scorer:
    """Score variants in windows of a genome.

    Args:
        window: bases that are read round a single one that changes; a longer change has the same flanks.
        both_strands: read each window from both sides.
    """

    def __init__(self, model: GenomeModel, genome: Genome, window: int, *, both_strands: bool) -> None:
        self.model, self.genome, self.window = model, genome, window
        self.strands = (False, True) if both_strands else (False,)
        self.causal = model.backbone.config.causal

    def changes(self, variant: Variant) -> list[Change | Skip]:
        """What each ALT allele changes, or why it cannot be scored."""
        found = changes_of(variant, self.genome, self.window)
        if self.causal:
            return found
        other = Skip("no_substitution", "a model that sees both sides scores single substitutions alone")
        return [
            other if isinstance(one, Change) and not one.end - one.start == len(one.alt) == 1 else one
            for one in found
        ]

    def run(self, batches: Iterable[list[Variant]]) -> Iterator[Scored]:
        """The outcomes of every variant; a GPU is given a batch before those of the one before are waited for."""
        waiting = None
        for batch in batches:
            found = [self.changes(variant) for variant in batch]
            changes = [one for ones in found for one in ones if isinstance(one, Change)]
            started = batch, found, fetch(self.score(changes)) if changes else list
            if waiting is not None:
                yield _outcomes(*waiting)
            waiting = started
        if waiting is not None:
            yield _outcomes(*waiting)

    def score(self, changes: list[Change]) -> Tensor:
        """The log-likelihoods in nats with the reference and with the alternative of each change, (changes, 2)."""
        windows = Windows(self.genome, changes, (self.window - 1) // 2)
        alleles = torch.from_numpy(windows.alleles).to(self.model.device)
        try:
            with autocast(self.model.device):
                values = [self._of_alleles(windows, reverse) for reverse in self.strands]
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{len(changes)} alleles at a time do not fit the memory of the GPU: give a smaller --batch-size, and "
                "the same command goes on where it stopped"
            ) from None
        return torch.stack(values).mean(0)[alleles]

    def _of_alleles(self, windows: Windows, reverse: bool) -> Tensor:
        """The log-likelihood of every allele of the windows, on one strand."""
        place = torch.from_numpy(windows.place)
        if self.causal:
            prefixes, suffixes = map(_packed, windows.parted(reverse=reverse))
            return log_likelihoods(self.model, prefixes, suffixes, place, start=EOS, scored=BASES)
        pieces, at = windows.masked(reverse=reverse)
        of_places = log_probabilities_at(self.model, _packed(pieces), torch.from_numpy(at))
        letters = torch.tensor(COMPLEMENT if reverse else range(BASES))[windows.letters.tolist()]
        return of_places[place.to(of_places.device), letters.to(of_places.device)]


def _packed(pieces: Pieces) -> Packed:
    return Packed(torch.from_numpy(pieces.tokens), torch.from_numpy(pieces.lengths))


def _outcomes(
    batch: list[Variant], found: list[list[Change | Skip]], scores: Callable[[], list[list[float]]]
) -> Scored:
    pairs = iter(scores())
    return [
        (variant, [one if isinstance(one, Skip) else next(pairs) for one in ones])
        for variant, ones in zip(batch, found, strict=True)
    ]
