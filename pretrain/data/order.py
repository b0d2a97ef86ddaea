"""The elastic sample order: which sample stands at which position, as a pure function of a seed and a position.

    sources mixed by weight       a b a a b a a ...            `data.mixing`; each of them on its own:
    epoch e: shards permuted      [ shard 7 | shard 2 |   shard 5   | shard 0 | ...          ]  N samples
    cut into C lanes              |---- lane 0 ----|---- lane 1 ----| ... |-- lane C-1 --|      N/C samples each
    a lane cut into I/O blocks    |b0|b1|b2|b3|b4 |    runs of samples of one shard, read as one range
    blocks permuted in the lane   |b3|b0|b4|b1|b2 |
    samples permuted in windows   (b3 b0)(b4 b1)(b2)   of `window_blocks` blocks
    positions deal the lanes out  position g: epoch g // N, then j = g % N: lane j % C, its sample number j // C
    batch t                       positions [tD, (t+1)D), listed by lane, and that list m times: B = mD rows
    rank r of R                   rows [rB//R, (r+1)B//R)

m is how often a sample stands in a batch (`data.augment.repeats`), 1 by default. Every window [eN, (e+1)N) of a
source's positions holds every sample of it exactly once, and epochs follow one another without a seam. Neither the
number of ranks, nor of threads, nor accumulation enters; any step is computed directly, in memory proportional to the
shards of the lanes that are asked for. Arrays in, arrays out: no file is touched here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.lanes import MAX_LANES, Lanes
from pretrain.data.mixing import Mix
from pretrain.draws import IntArray

VERSION = 2
"""Of the order: two versions give different samples for the same seed. Part of every checkpoint."""


class Rows(NamedTuple):
    """Samples in the order of a batch's rows; five int64 arrays of one length.

    shard: number of the shard in the data set; sample: number of the sample in that shard; epoch: of its source;
    position: batch t has tB..(t+1)B-1, each once; repeat: 0..m-1 for the copies of a sample in its batch.
    """

    shard: IntArray
    sample: IntArray
    epoch: IntArray
    position: IntArray
    repeat: IntArray


class Share(NamedTuple):
    """A source: the next `shards` shards of the data set, and its part of the mixture."""

    shards: int
    ratio: int


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
        sources: Sequence[Share] = (),
        repeats: int = 1,
    ) -> None:
        """shard_samples: int [number of shards], samples of each; `lanes * repeats` divides `global_batch`.

        sources: what the shards are divided in, in their order; none: one source.
        """
        counts = np.asarray(shard_samples, dtype=np.int64)
        shares = list(sources) or [Share(len(counts), 1)]
        if global_batch % (lanes * repeats):
            raise ValueError(
                f"{lanes} lanes do not divide the global batch of {global_batch} / {repeats} repeats"
            )
        if lanes >= MAX_LANES:
            raise ValueError(f"{lanes} lanes; fewer than {MAX_LANES} are possible")
        self._first_shard = np.cumsum([0, *(share.shards for share in shares)])
        parts = np.split(counts, self._first_shard[1:-1])
        if self._first_shard[-1] != len(counts) or any(part.sum() < 1 for part in parts):
            raise ValueError("an order needs at least one sample in each source, and the shards of all")
        self.global_batch = global_batch
        self.distinct = global_batch // repeats
        self._mix = Mix([share.ratio for share in shares], seed)
        self._sources = [
            Lanes(
                part,
                source=s,
                seed=seed,
                lanes=lanes,
                block_samples=block_samples,
                window_blocks=window_blocks,
            )
            for s, part in enumerate(parts)
        ]

    def batch(self, step: int) -> Rows:
        """The global batch of `step` (0 is the first): `global_batch` rows."""
        return self.rows(step, 0, self.global_batch)

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the global batch of `step`; only their lanes are computed."""
        return self.several([step], start, stop)[0]

    def several(self, steps: Sequence[int], start: int, stop: int) -> list[Rows]:
        """`rows` of each of these steps, which ascend: at little more than the cost of one, since a lane is looked up
        once for all of them."""
        repeat, of_batch = np.divmod(np.arange(start, stop, dtype=np.int64), self.distinct)
        dealt = [self._mix.deal(step * self.distinct, self.distinct) for step in steps]
        row = [self._by_lane(source, number)[of_batch] for source, number in dealt]
        source = np.concatenate([deal[0][rows] for deal, rows in zip(dealt, row, strict=True)])
        number = np.concatenate([deal[1][rows] for deal, rows in zip(dealt, row, strict=True)])
        shard, sample, epoch = np.empty_like(number), np.empty_like(number), np.empty_like(number)
        for s, lanes in enumerate(self._sources):
            mine = source == s
            if mine.any():
                place = lanes.at(number[mine])
                shard[mine] = place.shard + self._first_shard[s]
                sample[mine], epoch[mine] = place.sample, place.epoch
                lanes.forget(int(number[mine].min()), int(number[mine].max()))
        places = zip(*(np.split(array, len(steps)) for array in (shard, sample, epoch)), strict=True)
        return [
            Rows(shards, samples, epochs, step * self.global_batch + repeat * self.distinct + rows, repeat)
            for step, rows, (shards, samples, epochs) in zip(steps, row, places, strict=True)
        ]

    def _by_lane(self, source: IntArray, number: IntArray) -> IntArray:
        """The batch's positions as its rows list them: by lane, whichever source they come from."""
        lane = np.empty_like(number)
        for s, lanes in enumerate(self._sources):
            mine = source == s
            lane[mine] = lanes.lane(number[mine])
        return np.argsort(lane, kind="stable")


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
