"""Which reader a data set needs, what it holds, and the order told to it ahead of time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from pretrain.config import DataConfig, Plan
from pretrain.data.dataset import Dataset
from pretrain.data.order import Rows
from pretrain.data.read import LocalReader
from pretrain.data.remote import RemoteReader, held_bytes
from pretrain.data.tar import Sample
from pretrain.data.urls import is_remote
from pretrain.draws import IntArray

_MOST_REQUESTS_AHEAD = 1000

R = TypeVar("R")


class Reader(Protocol):
    """What decoding asks of a reader. Thread-safe."""

    def read(self, shards: IntArray, samples: IntArray) -> list[Sample]:
        """Samples by (shard, number in the shard), in the order given. Raises `DataError`."""

    def close(self) -> None:
        """End what it has under way."""


def has_remote(dataset: Dataset) -> bool:
    return any(map(is_remote, dataset.paths))


class Shares(NamedTuple):
    """Of the memory or the cache for blocks, what training and the evaluation beside it take."""

    training: float
    evaluation: float


def shares(data: DataConfig) -> Shares:
    """Evaluation reads in order and holds little; where only one of the two reads from a store, it has all."""
    val = data.val.shards if data.val is not None else ""
    both = is_remote(val) and any(map(is_remote, data.train.patterns))
    return Shares(7 / 8, 1 / 8) if both else Shares(1.0, 1.0)


def open_reader(
    dataset: Dataset, data: DataConfig, block_samples: int, blocks_in_use: int, share: float = 1.0
) -> LocalReader | RemoteReader:
    """The reader of a data set. blocks_in_use: see `blocks_in_use`; share: see `shares`. Close it."""
    if has_remote(dataset):
        return RemoteReader(dataset, data, block_samples, blocks_in_use, share)
    return LocalReader(dataset, block_samples, blocks_in_use)


def blocks_in_use(plan: Plan, data: DataConfig) -> int:
    """Most blocks that training takes samples of at a time on one rank.

    Of each lane that it serves, in each source: a window, and of the next, which is shuffled, what the steps under way
    may reach.
    """
    rows = plan.distinct_samples // plan.lanes  # copies of samples are listed after all of them
    slices = map(plan.slice_of, range(plan.world_size))
    lanes = max((stop - 1) // rows - start // rows + 1 for start, stop in slices)
    reach = min(plan.window_blocks, (data.prefetch_steps + 1) * rows)
    return len(plan.sources) * min(lanes, plan.lanes) * (plan.window_blocks + reach)


def evaluation_blocks(plan: Plan, data: DataConfig) -> int:
    """The same for evaluation, which reads in the order of the data set: what is under way, and its ends."""
    batches = data.prefetch_steps * plan.accumulation + 1
    return -(-batches * plan.micro_batch // plan.block_samples) + 2


def reading(dataset: Dataset, data: DataConfig, plan: Plan) -> str:
    """What reading takes, for people. A block that the end of a lane cuts is read for both lanes."""
    read_twice = min(1.0, (plan.lanes - 1) * plan.block_samples / len(dataset))
    amplification = f"up to {1 + read_twice:.3g} bytes read for each byte of the data set"
    if not has_remote(dataset):
        return f"from local files, {amplification}"
    held = held_bytes(dataset, data, plan.block_samples, blocks_in_use(plan, data), shares(data).training)
    return (
        f"{held.in_use / 2**20:,.0f} MiB of blocks in use on each rank and {held.ahead / 2**20:,.0f} MiB ahead, "
        f"in {'the cache' if data.cache_dir else 'memory'}; {amplification}"
    )


def announced_rows(
    reader: Reader, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]
) -> Iterator[R]:
    """The same requests, the blocks of their rows read ahead; see `announced`."""

    def places(request: R) -> tuple[IntArray, IntArray]:
        rows = list(rows_of(request))
        return np.concatenate([r.shard for r in rows]), np.concatenate([r.sample for r in rows])

    return announced(requests, places, reader)


def announced(
    requests: Iterator[R],
    places: Callable[[R], tuple[IntArray, IntArray]],
    reader: Reader,
) -> Iterator[R]:
    """The same requests; their samples are announced to the reader before they are due, while it has room.

    places: the shards and samples of a request, in the order in which they will be read.
    """
    if not isinstance(reader, RemoteReader):
        yield from requests
        return
    reader.begin()
    coming: deque[R] = deque()
    held = _with_places(next(requests, None), places)
    while held is not None or coming:
        while held is not None and len(coming) < _MOST_REQUESTS_AHEAD:
            request, where = held
            if coming and not reader.has_room(*where):
                break  # a step may need a window of every lane at once: what is in use would have to go
            reader.announce(*where)
            coming.append(request)
            held = _with_places(next(requests, None), places)
        yield coming.popleft()


def _with_places(
    request: R | None, places: Callable[[R], tuple[IntArray, IntArray]]
) -> tuple[R, tuple[IntArray, IntArray]] | None:
    return None if request is None else (request, places(request))
