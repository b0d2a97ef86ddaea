"""The elastic sample order: which sample stands at which position, as a pure function of a seed and a position.

    epoch e: shards permuted      [ shard 7 | shard 2 |   shard 5   | shard 0 | ...          ]  N samples
    cut into C lanes              |---- lane 0 ----|---- lane 1 ----| ... |-- lane C-1 --|      N/C samples each
    a lane cut into I/O blocks    |b0|b1|b2|b3|b4 |    runs of samples of one shard, read as one range
    blocks permuted in the lane   |b3|b0|b4|b1|b2 |
    samples permuted in windows   (b3 b0)(b4 b1)(b2)   of `window_blocks` blocks
    positions deal the lanes out  position g: epoch g // N, then j = g % N: lane j % C, its sample number j // C
    batch t                       positions [tB, (t+1)B), listed by lane; rank r of R takes rows [rB//R, (r+1)B//R)

Every window [eN, (e+1)N) of positions holds every sample exactly once, and epochs follow one another without a
seam. Neither the number of ranks, nor of threads, nor accumulation enters; any step is computed directly, in memory
proportional to the blocks of the lanes that are asked for. Arrays in, arrays out: no file is touched here.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.draws import IntArray, Stream, permutation


class Rows(NamedTuple):
    """Samples in the order of a batch's rows; four int64 arrays of one length.

    shard: number of the shard in the data set; sample: number of the sample in that shard; epoch; position: the g
    of the picture above.
    """

    shard: IntArray
    sample: IntArray
    epoch: IntArray
    position: IntArray


class Order:
    """The order of one data set for one run. Not thread-safe: it caches the lanes it was last asked for."""

    def __init__(
        self,
        shard_samples: npt.ArrayLike,
        *,
        seed: int,
        global_batch: int,
        lanes: int,
        block_samples: int,
        window_blocks: int,
    ) -> None:
        """shard_samples: int [number of shards], samples of each; `lanes` divides `global_batch`."""
        self._shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.num_samples = int(self._shard_samples.sum())
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample")
        if global_batch % lanes:
            raise ValueError(f"{lanes} lanes do not divide the global batch of {global_batch}")
        self.seed = seed
        self.global_batch = global_batch
        self.lanes = lanes
        self.block_samples = block_samples
        self.window_blocks = window_blocks
        self._epochs: dict[int, _Epoch] = {}
        self._lanes: dict[tuple[int, int], _Lane] = {}

    def batch(self, step: int) -> Rows:
        """The global batch of `step` (0 is the first): `global_batch` rows."""
        return self.rows(step, 0, self.global_batch)

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the global batch of `step`; only their lanes are computed."""
        offset = np.arange(self.global_batch, dtype=np.int64)
        first = step * self.global_batch
        by_lane = np.argsort((first + offset) % self.num_samples % self.lanes, kind="stable")
        position = first + by_lane[start:stop]
        epoch, j = np.divmod(position, self.num_samples)
        number, lane = np.divmod(j, self.lanes)

        shard, sample = np.empty_like(position), np.empty_like(position)
        for run in _runs(lane, epoch):
            place = self._lane(int(epoch[run.start]), int(lane[run.start]))
            shard[run], sample[run] = place.at(number[run])
        self._forget(first // self.num_samples, (first + self.global_batch - 1) // self.num_samples)
        return Rows(shard, sample, epoch, position)

    def _lane(self, epoch: int, lane: int) -> "_Lane":
        if (epoch, lane) not in self._lanes:
            if epoch not in self._epochs:
                self._epochs[epoch] = _Epoch(self.seed, epoch, self._shard_samples)
            self._lanes[epoch, lane] = _Lane(self, self._epochs[epoch], lane)
        return self._lanes[epoch, lane]

    def _forget(self, first_epoch: int, last_epoch: int) -> None:
        """Keep what the epochs of the latest step need."""
        if self._epochs and not first_epoch <= min(self._epochs) <= max(self._epochs) <= last_epoch:
            kept = range(first_epoch, last_epoch + 1)
            self._epochs = {e: value for e, value in self._epochs.items() if e in kept}
            self._lanes = {key: value for key, value in self._lanes.items() if key[0] in kept}


class _Epoch:
    """The shards in the order of one epoch. starts: first place of each in the concatenation, and the end."""

    def __init__(self, seed: int, epoch: int, shard_samples: IntArray) -> None:
        self.number = epoch
        self.shards = permutation(seed, Stream.SHARDS, len(shard_samples), epoch)
        self.starts = np.concatenate(([0], np.cumsum(shard_samples[self.shards])))


class _Lane:
    """One lane of one epoch: its blocks in their permuted order, and the window that was last asked for."""

    def __init__(self, order: Order, epoch: _Epoch, lane: int) -> None:
        self._order, self._epoch, self._number = order, epoch.number, lane
        shard, first, count = self._blocks(epoch, *self._span())
        permuted = permutation(order.seed, Stream.BLOCKS, len(shard), epoch.number, lane)
        self._shard, self._first, self._count = shard[permuted], first[permuted], count[permuted]
        window_firsts = np.arange(0, len(shard), order.window_blocks)
        self._window_ends = np.cumsum(np.add.reduceat(self._count, window_firsts))
        self._window = -1, shard, first

    def at(self, numbers: IntArray) -> tuple[IntArray, IntArray]:
        """Shard and sample-in-shard of the lane's samples `numbers`, which ascend."""
        windows = np.searchsorted(self._window_ends, numbers, side="right")
        if windows[0] == windows[-1]:
            return self._in_window(int(windows[0]), numbers)
        parts = [self._in_window(int(windows[run.start]), numbers[run]) for run in _runs(windows)]
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _in_window(self, window: int, numbers: IntArray) -> tuple[IntArray, IntArray]:
        if self._window[0] != window:
            self._window = window, *self._shuffled(window)
        _, shard, sample = self._window
        local = numbers - (self._window_ends[window - 1] if window else 0)
        return shard[local], sample[local]

    def _shuffled(self, window: int) -> tuple[IntArray, IntArray]:
        """All samples of a window, permuted."""
        order = self._order
        blocks = slice(window * order.window_blocks, (window + 1) * order.window_blocks)
        count = self._count[blocks]
        shard = np.repeat(self._shard[blocks], count)
        sample = np.repeat(self._first[blocks], count) + _counted(count)
        permuted = permutation(order.seed, Stream.SAMPLES, len(shard), self._epoch, self._number, window)
        return shard[permuted], sample[permuted]

    def _span(self) -> tuple[int, int]:
        """The places [start, stop) of this lane; the first N % C lanes hold one sample more."""
        size, longer = divmod(self._order.num_samples, self._order.lanes)
        start = self._number * size + min(self._number, longer)
        return start, start + size + (self._number < longer)

    def _blocks(self, epoch: _Epoch, start: int, stop: int) -> tuple[IntArray, IntArray, IntArray]:
        """Blocks of a span as (shard, first sample, samples).

        They are cut at multiples of `block_samples` from the start of the shard, not of the span: so the ranges
        that are read stay the same from epoch to epoch, except where a span ends inside a block.
        """
        size = self._order.block_samples
        low = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        high = int(np.searchsorted(epoch.starts, stop, side="left"))
        shard, place = epoch.shards[low:high], epoch.starts[low : high + 1]
        begin = np.maximum(place[:-1], start) - place[:-1]
        end = np.minimum(place[1:], stop) - place[:-1]
        num_blocks = -(-end // size) - begin // size

        shard, begin, end, block = (np.repeat(x, num_blocks) for x in (shard, begin, end, begin // size))
        block += _counted(num_blocks)
        first = np.maximum(block * size, begin)
        return shard, first, np.minimum((block + 1) * size, end) - first


def evaluation_slice(
    num_samples: int, rank: int, world_size: int, batch: int
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """What `rank` evaluates: sample numbers int64 [batches, batch], and which of them count, bool of that shape.

    Samples 0..num_samples-1 are cut into contiguous slices, one a rank. All ranks have the same number of batches,
    because a sharded model needs every rank in every forward; the rows that fill up repeat a sample and do not count.
    """
    start, stop = rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    batches = -(-num_samples // (world_size * batch))
    number = start + np.arange(batches * batch, dtype=np.int64)
    counts = number < stop
    last_real = min(max(stop - 1, start), num_samples - 1)
    return np.minimum(number, last_real).reshape(batches, batch), counts.reshape(batches, batch)


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
