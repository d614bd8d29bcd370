"""The order of the training data: endless, seeded, and reachable at any position without walking there.

Sample number g, counted over all ranks since the first step, is sample `permute(g mod n)` of pass g // n. So the
whole state of the data is one integer, the samples consumed; workers, ranks and resumed runs share one order.
"""

from collections.abc import Callable, Iterator

_MASK = (1 << 64) - 1
# the number of a sample that is read in place of one that is not there, and counts for nothing
STAND_IN = -1


def mix(*values: int) -> int:
    """Hash integers to 64 bits (the finaliser of SplitMix64, Steele et al. 2014, applied to each in turn)."""
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = (x ^ value) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x


def permute(index: int, n: int, *key: int) -> int:
    """Where the pseudo-random permutation of range(n) that `key` chooses takes `index`, in constant time.

    A four-round Feistel network on the next even number of bits, walked on until it falls below n (Black and
    Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_ in range(4):
            left, right = right, left ^ (mix(right, round_, *key) & low)
        index = left << half | right
        if index < n:
            return index


class EndlessBatches:
    """The batches of sample numbers that one rank reads, from a position on, for ever.

    A global batch is world * batch_size samples in a row; rank r reads the r-th batch_size of them.
    """

    # so long that Lightning never looks for an end, and never fetches a batch ahead to find one
    LENGTH = 1 << 40

    def __init__(self, position: int, batch_size: int, rank: int, world: int) -> None:
        self.position, self.batch_size, self.rank, self.world = position, batch_size, rank, world

    def __len__(self) -> int:
        return self.LENGTH

    def __iter__(self) -> Iterator[list[int]]:
        start = self.position + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.world * self.batch_size


class GrowingBatches:
    """Endless batches of windows whose length doubles when given numbers of tokens have been read by all ranks.

    The position counts samples of the full length at every stage: where windows are 2^k times shorter, a sample is
    2^k of them, so that a batch always has as many tokens. An item is (k, the window's number in its own order).
    """

    def __init__(self, batches: EndlessBatches, length: int, doublings: list[int]) -> None:
        self.batches, self.length, self.doublings = batches, length, doublings

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        offset = self.batches.rank * self.batches.batch_size
        for batch in self.batches:
            read = (batch[0] - offset) * self.length
            halved = sum(read < tokens for tokens in self.doublings)
            yield [(halved, (number << halved) + i) for number in batch for i in range(1 << halved)]


class SimilarBatches:
    """Endless batches of rows of about one length, so that little of them is padding.

    Of POOL batches of all ranks in a row, the samples are sorted by length and dealt out anew, the batches in an order
    of their own. The position counts samples as ever; one at which no such batch begins, after a change of their size,
    stands for the batch that it is in.
    """

    POOL = 32

    def __init__(self, batches: EndlessBatches, length_of: Callable[[int], int], seed: int) -> None:
        self.batches, self.length_of, self.seed = batches, length_of, seed

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        world, rank = self.batches.world, self.batches.rank
        size = world * self.batches.batch_size
        turn, pool, numbers = self.batches.position // size, -1, list[int]()
        while True:
            before, (pool, place) = pool, divmod(turn, self.POOL)
            if pool != before:
                first = pool * self.POOL * size
                numbers = sorted(range(first, first + self.POOL * size), key=self.length_of)
            start = permute(place, self.POOL, self.seed, pool) * size
            # neighbours to different ranks, so that none waits for another
            yield numbers[start + rank : start + size : world]
            turn += 1


class OrderedBatches:
    """The batches of held-out sample numbers that one rank reads: every world-th sample, from first to last.

    All ranks read as many batches, since they work on them together: one that has no sample left reads a STAND_IN.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world: int) -> None:
        self.indices, self.batch_size = range(rank, count, world), batch_size
        self.batches = -(-count // (world * batch_size))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.batches):
            start = batch * self.batch_size
            yield list(self.indices[start : start + self.batch_size]) or [STAND_IN]
