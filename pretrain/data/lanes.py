"""The order of one source: its samples dealt out in lanes, epoch after epoch. The picture is in `data.order`.

Nothing is listed that was not asked for. A lane knows the pieces of shards that its span consists of and where, in
the permuted order, the blocks stand that are not full; from these few hundred numbers follow the window of any of its
samples and the blocks of any window, however many blocks the lane has. An epoch costs a permutation of the shards.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pretrain.draws import IntArray, Shuffle, Stream, permutation

_LANE_BITS = 20
"""A draw's word holds the lane below and the number of the source above."""
MAX_LANES = 2**_LANE_BITS


class Place(NamedTuple):
    """Where samples lie; three int64 arrays of one length. shard: counted within the source."""

    shard: IntArray
    sample: IntArray
    epoch: IntArray


class Lanes:
    """The order of one source. Not thread-safe: it keeps the lanes that it was last asked for."""

    def __init__(
        self,
        shard_samples: IntArray,
        *,
        source: int,
        seed: int,
        lanes: int,
        block_samples: int,
        window_blocks: int,
    ) -> None:
        """shard_samples: int64 [shards], one sample at least; source: its number among the sources."""
        self.shard_samples = shard_samples
        self.num_samples = int(shard_samples.sum())
        self.seed = seed
        self.source = source << _LANE_BITS
        self.lanes = lanes
        self.block_samples = block_samples
        self.window_blocks = window_blocks
        self._epochs: dict[int, _Epoch] = {}
        self._lanes: dict[tuple[int, int], _Lane] = {}

    def lane(self, positions: IntArray) -> IntArray:
        """The lane of each position of this source."""
        return positions % self.num_samples % self.lanes

    def at(self, positions: IntArray) -> Place:
        """What stands at positions of this source, in any order."""
        epoch, j = np.divmod(positions, self.num_samples)
        number, lane = np.divmod(j, self.lanes)
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        by_lane = np.lexsort((number, lane, epoch))
        for run in _runs(epoch[by_lane], lane[by_lane]):
            rows = by_lane[run]
            place = self._lane(int(epoch[rows[0]]), int(lane[rows[0]]))
            shard[rows], sample[rows] = place.at(number[rows])
        return Place(shard, sample, epoch)

    def forget(self, first: int, last: int) -> None:
        """Keep only what the epochs of positions `first` to `last` need."""
        kept = range(first // self.num_samples, last // self.num_samples + 1)
        if not self._epochs.keys() <= set(kept):
            self._epochs = {e: value for e, value in self._epochs.items() if e in kept}
            self._lanes = {key: value for key, value in self._lanes.items() if key[0] in kept}

    def _lane(self, epoch: int, lane: int) -> "_Lane":
        if (epoch, lane) not in self._lanes:
            if epoch not in self._epochs:
                self._epochs[epoch] = _Epoch(self, epoch)
            self._lanes[epoch, lane] = _Lane(self, self._epochs[epoch], lane)
        return self._lanes[epoch, lane]


class _Epoch:
    """The shards in the order of one epoch. starts: first place of each in the concatenation, and the end."""

    def __init__(self, source: Lanes, epoch: int) -> None:
        self.number = epoch
        self.shards = permutation(source.seed, Stream.SHARDS, len(source.shard_samples), epoch, source.source)
        self.starts = np.concatenate(([0], np.cumsum(source.shard_samples[self.shards])))


class _Lane:
    """One lane of one epoch, and the window of it that was last asked for.

    A piece is what the lane's span holds of a shard, samples [begin, end) of it. Blocks are cut at multiples of
    `block_samples` from the start of the shard, not of the span: so the ranges that are read stay the same from epoch
    to epoch, except where a span ends inside a block.
    """

    def __init__(self, source: Lanes, epoch: _Epoch, lane: int) -> None:
        self._source, self._epoch, self._key = source, epoch.number, lane | source.source
        start, stop = _span(source.num_samples, source.lanes, lane)
        low = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        high = int(np.searchsorted(epoch.starts, stop, side="left"))
        place = epoch.starts[low : high + 1]
        self._shard = epoch.shards[low:high]
        self._begin = np.maximum(place[:-1], start) - place[:-1]
        self._end = np.minimum(place[1:], stop) - place[:-1]
        num_blocks = -(-self._end // source.block_samples) - self._begin // source.block_samples
        self._block_stops = np.cumsum(num_blocks)
        self._num_blocks = int(self._block_stops[-1])
        self._shuffle = Shuffle(source.seed, Stream.BLOCKS, self._num_blocks, self._epoch, self._key)
        self._place_gaps(num_blocks)
        self._window = -1, self._shard, self._begin

    def at(self, numbers: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and sample-in-shard of the lane's samples `numbers`, which ascend."""
        windows = self._window_of(numbers)
        if windows[0] == windows[-1]:
            return self._in_window(int(windows[0]), numbers)
        parts = [self._in_window(int(windows[run.start]), numbers[run]) for run in _runs(windows)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _place_gaps(self, num_blocks: IntArray) -> None:
        """Find the blocks that lack samples, the first or the last of a piece, where they stand in the lane.

        _gap_place: their places, ascending; _gap_before: what all gaps before each lack, and all together;
        _gap_stop: number of the lane's first sample after each.
        """
        size = self._source.block_samples
        at_begin, at_end = self._begin % size, -self._end % size
        alone = num_blocks == 1
        at_begin, at_end = np.where(alone, at_begin + at_end, at_begin), np.where(alone, 0, at_end)
        lacking = np.concatenate((at_begin, at_end))
        block = np.concatenate((self._block_stops - num_blocks, self._block_stops - 1))
        place = self._shuffle.place_of(block[lacking > 0])
        order = np.argsort(place)
        self._gap_place = place[order]
        self._gap_before = np.concatenate(([0], np.cumsum(lacking[lacking > 0][order])))
        self._gap_stop = (self._gap_place + 1) * size - self._gap_before[1:]

    def _window_of(self, numbers: IntArray) -> IntArray:
        passed = np.searchsorted(self._gap_stop, numbers, side="right")
        place = (numbers + self._gap_before[passed]) // self._source.block_samples
        return place // self._source.window_blocks

    def _in_window(self, window: int, numbers: IntArray) -> tuple[IntArray, IntArray]:
        if self._window[0] != window:
            self._window = window, *self._shuffled(window)
        _, shard, sample = self._window
        place = window * self._source.window_blocks
        passed = int(np.searchsorted(self._gap_place, place))
        local = numbers - (place * self._source.block_samples - self._gap_before[passed])
        return shard[local], sample[local]

    def _shuffled(self, window: int) -> tuple[IntArray, IntArray]:
        """All samples of a window, permuted."""
        source, size = self._source, self._source.block_samples
        first = window * source.window_blocks
        block = self._shuffle.at(np.arange(first, min(first + source.window_blocks, self._num_blocks)))
        piece = np.searchsorted(self._block_stops, block, side="right")
        from_end = self._block_stops[piece] - block  # 1: the last block of its piece
        in_shard = -(-self._end[piece] // size) - from_end
        begin = np.maximum(in_shard * size, self._begin[piece])
        count = np.minimum((in_shard + 1) * size, self._end[piece]) - begin
        shard = np.repeat(self._shard[piece], count)
        sample = np.repeat(begin, count) + _counted(count)
        permuted = permutation(source.seed, Stream.SAMPLES, len(shard), self._epoch, self._key, window)
        return shard[permuted], sample[permuted]


def _span(num_samples: int, lanes: int, lane: int) -> tuple[int, int]:
    """The places [start, stop) of a lane; the first N % C lanes hold one sample more."""
    size, longer = divmod(num_samples, lanes)
    start = lane * size + min(lane, longer)
    return start, start + size + (lane < longer)


def _counted(counts: IntArray) -> IntArray:
    """0..n-1 for each n of `counts`, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - counts, counts)


def _runs(*keys: IntArray) -> list[slice]:
    """Slices over which all keys stay the same."""
    changed = np.zeros(len(keys[0]) - 1, dtype=np.bool_)
    for key in keys:
        changed |= key[1:] != key[:-1]
    edges = [0, *(np.flatnonzero(changed) + 1).tolist(), len(keys[0])]
    return [slice(a, b) for a, b in pairwise(edges)]
