"""Which reader a data set needs, what it holds, and the order told to it ahead of time."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from pretrain.config import DataConfig, Plan
from pretrain.data.dataset import Dataset
from pretrain.data.read import LocalReader
from pretrain.data.remote import RemoteReader, held_bytes
from pretrain.data.urls import is_remote
from pretrain.draws import IntArray

EVALUATION_BLOCKS = 4
"""Evaluation reads in the order of the data set: the block it is in, and those that threads are ahead or behind."""
_MOST_REQUESTS_AHEAD = 1000

R = TypeVar("R")


def open_reader(
    dataset: Dataset, data: DataConfig, block_samples: int, blocks_in_use: int
) -> LocalReader | RemoteReader:
    """The reader of a data set. blocks_in_use: see `blocks_in_use`. Close it."""
    if any(map(is_remote, dataset.paths)):
        return RemoteReader(dataset, data, block_samples, blocks_in_use)
    return LocalReader(dataset, block_samples)


def blocks_in_use(plan: Plan, data: DataConfig) -> int:
    """Most blocks that training takes samples of at a time on one rank.

    Of each lane that it serves, in each source: a window, and what the steps under way reach beyond its end.
    """
    rows = plan.global_batch // plan.lanes
    slices = map(plan.slice_of, range(plan.world_size))
    lanes = max((stop - 1) // rows - start // rows + 1 for start, stop in slices)
    return (
        len(plan.sources)
        * lanes
        * (plan.window_blocks - (-(data.prefetch_steps + 1) * rows // plan.block_samples))
    )


def reading(dataset: Dataset, data: DataConfig, plan: Plan) -> str:
    """What reading takes, for people. A block that the end of a lane cuts is read for both lanes."""
    remote = any(map(is_remote, dataset.paths))
    read_twice = min(1.0, (plan.lanes - 1) * plan.block_samples / len(dataset))
    amplification = f"up to {1 + read_twice:.3g} bytes read for each byte of the data set"
    if not remote:
        return f"from local files, {amplification}"
    held = held_bytes(dataset, data, plan.block_samples, blocks_in_use(plan, data))
    return (
        f"{held.in_use / 2**20:,.0f} MiB of blocks in use on each rank and {held.ahead / 2**20:,.0f} MiB ahead, "
        f"in {'the cache' if data.cache_dir else 'memory'}; {amplification}"
    )


def announced(
    requests: Iterator[R],
    places: Callable[[R], tuple[IntArray, IntArray]],
    reader: LocalReader | RemoteReader,
) -> Iterator[R]:
    """The same requests; their samples are announced to the reader before they are due, while it has room.

    places: the shards and samples of a request, in the order in which they will be read.
    """
    if isinstance(reader, LocalReader):
        yield from requests
        return
    coming: deque[R] = deque()
    while True:
        while (reader.has_room or not coming) and len(coming) < _MOST_REQUESTS_AHEAD:
            request = next(requests, None)
            if request is None:
                break
            reader.announce(*places(request))
            coming.append(request)
        if not coming:
            return
        yield coming.popleft()
