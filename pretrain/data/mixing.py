"""Which of several sources gives which position, as a pure function of a seed and a position.

    ratio 3 : 1       a block of positions holds each source exactly by its ratio: at least `MIN_BLOCK` of them
    base              a a a a a a a a a b b b
    block m           a b a a a a b a b a a a      the base, permuted by (seed, m)
    position p        block p // P; its source there, and how many of that source the block holds before it
    number            m x (the source's share of a block) + that: the position in the order of the source

So each source is walked from its first position to its second to its third, without a gap: what its own order
guarantees holds in any mixture, and how far each source got is known at any position without replaying.
"""

from collections.abc import Sequence

import numpy as np

from pretrain.draws import IntArray, Stream, permutation, split64

MIN_BLOCK = 1024
"""Positions among which sources are shuffled at least: with few, neighbours would alternate in step."""


class Mix:
    """A mixture of sources. Not thread-safe: it keeps the blocks that it was last asked for."""

    def __init__(self, ratios: Sequence[int], seed: int) -> None:
        """ratios: positive whole numbers; of the positions of a block each source has its part."""
        self._seed = seed
        self._ratios = np.asarray(ratios, dtype=np.int64)
        self._share = self._ratios * -(-MIN_BLOCK // int(self._ratios.sum()))
        self._base = np.repeat(np.arange(len(ratios)), self._share)
        self._kept: tuple[range, IntArray, IntArray] | None = None

    def deal(self, first: int, count: int) -> tuple[IntArray, IntArray]:
        """Source of each position first..first+count-1, and its number among the positions of that source."""
        if len(self._ratios) == 1:
            return np.zeros(count, dtype=np.int64), np.arange(first, first + count)
        size = len(self._base)
        blocks = range(first // size, (first + count - 1) // size + 1)
        if self._kept is None or self._kept[0] != blocks:
            source, number = self._blocks(np.array(blocks))
            self._kept = blocks, source.ravel(), number.ravel()
        begin = first - blocks.start * size
        return self._kept[1][begin : begin + count], self._kept[2][begin : begin + count]

    def before(self, position: int) -> IntArray:
        """How many positions before this one each source has: int64 [sources]."""
        block, rest = divmod(position, len(self._base))
        whole = block * self._share
        if rest == 0 or len(self._ratios) == 1:
            return whole + rest
        source, _ = self.deal(block * len(self._base), rest)
        return whole + np.bincount(source, minlength=len(self._ratios))

    def _blocks(self, block: IntArray) -> tuple[IntArray, IntArray]:
        """Sources and their numbers in whole blocks: int64 [blocks, positions of a block] twice."""
        source = self._base[permutation(self._seed, Stream.MIXING, len(self._base), *split64(block))]
        by_source = np.argsort(source, axis=-1, kind="stable")
        within = np.arange(len(self._base)) - np.repeat(np.cumsum(self._share) - self._share, self._share)
        number = np.empty_like(source)
        np.put_along_axis(number, by_source, within + block[:, None] * self._share[self._base], axis=-1)
        return source, number
