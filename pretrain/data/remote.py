"""Samples from shards in a store: whole I/O blocks by ranged reads, held in memory or in the node's cache.

    order  ->  announce: the blocks of coming samples, while there is room      (the caller's thread)
               fetch: the index of their shard once, then one ranged read each  (threads of `Blocks`)
    rows   ->  read: samples out of held blocks, each checked against the index (decode threads)

A sample whose bytes are not those that were indexed is an error of the way to it: its block is forgotten, also by the
cache, and fetched again a few times before that is fatal and named. Shards on local file systems in the same data set
are left to `LocalReader`.
"""

import hashlib
import threading
import zlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data.blocks import Blocks
from pretrain.data.cache import IN_USE, NodeCache
from pretrain.data.dataset import Dataset
from pretrain.data.index import BLOCK, ShardIndex, index_bytes, remedy
from pretrain.data.manifest import Shard
from pretrain.data.read import FEWEST_KEPT, Key, LocalReader, checked_index, load_index
from pretrain.data.store import Stores, Version
from pretrain.data.tar import Sample, parse_sample
from pretrain.data.urls import folder_of, is_remote
from pretrain.draws import IntArray
from pretrain.errors import DataError
from pretrain.hardware import descriptors_to_use, ranks_here
from pretrain.logs import log

FETCHES = 8
"""Ranged reads that a reader has under way at a time, beside those that decode threads wait for."""
TRIES = 3
"""Times that a block or an index is fetched whose bytes do not match their checksum."""
_OTHER_FORMAT = 4096
"""Bytes that the index of another version may have more: it is read to say so."""
_MIB, _GIB = 2**20, 2**30


class _Held(Protocol):
    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Bytes [start, stop) of the block; fewer where it is damaged."""


class _InMemory:
    def __init__(self, content: bytes | bytearray) -> None:
        self._content = memoryview(content)

    def read(self, start: int, stop: int) -> memoryview:
        return self._content[start:stop]


class RemoteReader:
    """Reads samples of a data set of which some shards lie in stores. Thread-safe; `close` ends its threads."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        block_samples: int,
        blocks_in_use: int,
        share: float = 1.0,
    ) -> None:
        """blocks_in_use: blocks that the order takes samples of at a time; share: see `held_bytes`.

        Raises `DataError` where neither the memory nor the cache that the settings allow holds so many.
        """
        self._dataset, self._block_samples = dataset, block_samples
        self._remote = np.fromiter(map(is_remote, dataset.paths), np.bool_, len(dataset.paths))
        self._local = LocalReader(dataset, block_samples, blocks_in_use)
        self._most_indexes = max(FEWEST_KEPT, 2 * blocks_in_use)  # of blocks in use, and of those ahead
        self._stores = Stores(data.read_timeout_seconds)
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        held = held_bytes(dataset, data, block_samples, blocks_in_use, share)
        self._room, limit = held.ahead, held.in_use + held.ahead
        self._cache: NodeCache | None = None
        if data.cache_dir is not None:
            # What is held is a descriptor: where they are few, a block is opened again; the disk has the bytes.
            limit = min(limit, held.block * descriptors_to_use())
            patience = 2 * data.read_timeout_seconds
            bound = _cache_bytes(data.cache_gib or 0)
            self._cache = NodeCache(Path(data.cache_dir), bound, patience, limit)
        self._blocks: Blocks[Key, _Held] = Blocks(self._fetch, self._size, limit, FETCHES)

    def read(self, shards: IntArray, samples: IntArray) -> list[Sample]:
        """Samples by (shard, number in the shard), in the order given.

        Raises `DataError` naming shard and sample where the bytes cannot be had, or are not those that were indexed.
        """
        found: list[Sample] = []
        remote = self._remote[shards]
        edges = [0, *(np.flatnonzero(remote[1:] != remote[:-1]) + 1).tolist(), len(shards)]
        for start, stop in pairwise(edges):
            if not remote[start]:
                found += self._local.read(shards[start:stop], samples[start:stop])
                continue
            for shard, sample in zip(shards[start:stop].tolist(), samples[start:stop].tolist(), strict=True):
                found.append(self._sample(shard, sample))
        return found

    def begin(self) -> None:
        """Of what was announced and never read nothing is expected any more."""
        self._blocks.begin()

    def announce(self, shards: IntArray, samples: IntArray) -> None:
        """Begin to fetch the blocks of samples that will be read, in the order in which they will be."""
        for key in self._keys(shards, samples):
            self._blocks.announce(key)

    def has_room(self, shards: IntArray, samples: IntArray) -> bool:
        """Whether the blocks of these samples can be read ahead without letting go of any that is in use."""
        return self._blocks.ahead + self._blocks.missing(self._keys(shards, samples)) <= self._room

    def _keys(self, shards: IntArray, samples: IntArray) -> list[Key]:
        """The blocks of samples in stores, each once, in the order of their first sample."""
        remote = self._remote[shards]
        keys = np.stack((shards[remote], samples[remote] // self._block_samples), axis=1)
        return [Key(*key) for key in dict.fromkeys(map(tuple, keys.tolist()))]

    def close(self) -> None:
        self._stores.close()
        self._blocks.close()
        self._local.close()
        if self._cache is not None:
            self._cache.close()

    @property
    def requests(self) -> int:
        """Requests made so far."""
        return self._stores.requests

    @property
    def bytes(self) -> int:
        """Bytes that arrived so far."""
        return self._stores.bytes

    def _sample(self, number: int, sample: int) -> Sample:
        key = Key(number, sample // self._block_samples)
        where = f"{self._dataset.paths[number]}, sample {sample}"
        for _ in range(TRIES):
            block = self._blocks.get(key)
            shard = self._shard(number)
            start, _ = shard.span(key.number * self._block_samples, 1)
            begin, end = shard.span(sample, 1)
            content = memoryview(block.read(begin - start, end - start))
            if zlib.crc32(content) == shard.crc32(sample):
                return parse_sample(content, where)
            log.warning("%s: its checksum does not match; fetching its block again", where)
            self._blocks.drop(key)
            if self._cache is not None:
                self._cache.drop(shard.digest(key.number, self._block_samples))
        raise DataError(
            f"{where}: its bytes are not those that were indexed (checksum), fetched {TRIES} times\n"
            "  The object or the way to it is damaged. Bring the shard back from its source and start again."
        )

    def _fetch(self, key: Key) -> _Held:
        shard = self._shard(key.shard)
        if self._cache is None:
            return _InMemory(shard.block(key.number, self._block_samples))
        begin, end = shard.span(key.number * self._block_samples, self._block_samples)
        return self._cache.piece(
            shard.digest(key.number, self._block_samples),
            end - begin,
            lambda: shard.block(key.number, self._block_samples),
        )

    def _size(self, key: Key) -> int:
        """About what a block takes; known before its index is."""
        stated = self._dataset.shards[key.shard]
        return -(-stated.bytes * min(self._block_samples, stated.samples) // stated.samples)

    def _shard(self, number: int) -> "_Shard":
        with self._lock:
            shard = self._shards.get(number)
            if shard is None:
                paths = self._dataset.paths[number], self._dataset.index_of(number)
                shard = self._shards[number] = _Shard(
                    *paths, self._dataset.shards[number], self._stores, self._cache
                )
                if len(self._shards) > self._most_indexes:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(number)
        shard.load()
        return shard


class _Shard:
    """One shard in a store: its index, fetched once, and the version of the tar that its first read met."""

    def __init__(self, url: str, index: str, stated: Shard, stores: Stores, cache: NodeCache | None) -> None:
        """index: its path or URL."""
        self._url, self._index_at, self._stated = url, index, stated
        self._stores, self._cache = stores, cache
        self._lock = threading.Lock()
        self._index: ShardIndex | None = None
        self._version: Version | None = None
        self._failures: list[DataError] = []

    def load(self) -> None:
        """Fetch the index, if no thread has done so. Who waited for one that failed fails with it: the time is over."""
        before = len(self._failures)
        with self._lock:
            if self._index is not None:
                return
            if len(self._failures) > before:
                raise self._failures[-1]
            try:
                self._index = self._load_index()
            except DataError as error:
                self._failures.append(error)
                raise

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Where samples [first, first + count) begin and end in the tar; fewer at its end."""
        table = self._table
        last = table[min(first + count, len(table)) - 1]
        return int(table[first]["offset"]) * BLOCK, int(last["offset"]) * BLOCK + int(last["length"])

    def crc32(self, sample: int) -> int:
        return int(self._table[sample]["crc32"])

    def digest(self, number: int, block_samples: int) -> str:
        """The key of a block in the cache: what it is, not where it came from."""
        begin, end = self.span(number * block_samples, block_samples)
        return hashlib.sha256(f"{self._stated.sha256} {begin} {end}".encode()).hexdigest()

    def block(self, number: int, block_samples: int) -> bytearray:
        begin, end = self.span(number * block_samples, block_samples)
        content = self._stores.read(self._url, begin, end, self._version)
        self._version = content.version
        if content.version.size != self._stated.bytes:
            raise DataError(
                f"{self._url}: {content.version.size:,} bytes, but its manifest says {self._stated.bytes:,}: cut short, "
                f"or replaced\n  Bring the object back; or, if it was changed on purpose: {remedy(folder_of(self._url))}"
            )
        return content.data

    @property
    def _table(self) -> npt.NDArray[np.void]:
        assert self._index is not None  # `load` was called
        return self._index.table

    def _load_index(self) -> ShardIndex:
        """From the cache or the store; what the cache has is held against the manifest once more."""
        if not is_remote(self._index_at):
            return self._made_at_first_contact()
        if self._cache is None:
            return checked_index(self._fetch_index(), self._index_at, self._stated)
        size = index_bytes(self._stated.samples)
        key = hashlib.sha256(f"index {self._stated.index_sha256}".encode()).hexdigest()
        content = self._cache.piece(key, size, self._fetch_index).read(0, size)
        try:
            return checked_index(content, self._index_at, self._stated)
        except DataError as error:
            log.warning("in the cache, %s; fetching it again", str(error).partition("\n")[0])
        self._cache.drop(key)
        content = self._cache.piece(key, size, self._fetch_index).read(0, size)
        return checked_index(content, self._index_at, self._stated)

    def _made_at_first_contact(self) -> ShardIndex:
        try:
            return load_index(Path(self._index_at), self._stated)
        except DataError as error:
            raise DataError(
                f"{str(error).partition(chr(10))[0]}\n"
                f"  It was made when {self._url} was first met. Set XDG_CACHE_HOME to a folder that all nodes see, or put\n"
                f"  the indexes beside the tars: {remedy(folder_of(self._url))}"
            ) from None

    def _fetch_index(self) -> bytes:
        """The index that the manifest names, fetched again a few times where another arrives."""
        url = self._index_at
        for attempt in range(1, TRIES + 1):
            content = self._stores.read_whole(url, index_bytes(self._stated.samples) + _OTHER_FORMAT)
            try:
                checked_index(content, url, self._stated)
                break
            except DataError as error:
                if attempt == TRIES:
                    raise
                log.warning("%s; fetching it again", str(error).partition("\n")[0])
        return content


def _cache_bytes(gib: float) -> int:
    return round(gib * _GIB)


class HeldBytes(NamedTuple):
    """What one rank holds of a remote data set: one block; the blocks that the order is in; those fetched ahead."""

    block: int
    in_use: int
    ahead: int


def held_bytes(
    dataset: Dataset, data: DataConfig, block_samples: int, blocks_in_use: int, share: float = 1.0
) -> HeldBytes:
    """See `HeldBytes`; raises `DataError` where the settings do not allow for it.

    share: of what the settings allow a rank, what is left to this reader by those beside it.
    """
    block = max(1, round(block_samples * dataset.num_bytes / len(dataset)))
    in_use = min(blocks_in_use * block, dataset.num_bytes)
    name, bound = "data.block_memory_mib", data.block_memory_mib * _MIB
    if data.cache_gib is not None:
        # Ranks of a node share it, and each keeps what it is reading.
        name, bound = "data.cache_gib", IN_USE * _cache_bytes(data.cache_gib) / ranks_here()
    bound *= share
    ahead = min(in_use, bound - in_use) if data.read_ahead_mib is None else data.read_ahead_mib * _MIB
    if in_use + max(ahead, 0) > bound:
        raise DataError(
            f"{dataset.source}: the sample order takes samples of {in_use / _MIB:,.0f} MiB of blocks at a time on each rank, "
            f"and {max(ahead, 0) / _MIB:,.0f} MiB are to be read ahead; {name} allows each {bound / _MIB:,.0f} MiB\n"
            "  Raise it, give data.cache_dir, use more ranks, or set smaller data.lanes, data.window_blocks or data.block_mib."
        )
    return HeldBytes(block, in_use, int(ahead))
