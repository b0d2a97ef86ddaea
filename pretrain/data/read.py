"""Samples from local shards: ranged reads, each checked against the checksum in the index before anything sees it.

`LocalReader.read` is the whole interface between the order and the bytes: numbers in, samples out, from any thread.
State, each up to a bound and the ones used last: of the blocks that the order is in, where their samples lie; whole indexes,
so that those of a small data set are read once; open files. The page cache holds the bytes; nothing else does.
"""

import hashlib
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import pairwise
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data.dataset import Dataset
from pretrain.data.index import BLOCK, ShardIndex, index_bytes, index_path, parse_index, remedy
from pretrain.data.manifest import Shard
from pretrain.data.tar import Sample, parse_sample
from pretrain.data.urls import folder_of
from pretrain.draws import IntArray
from pretrain.errors import DataError
from pretrain.hardware import descriptors_to_use
from pretrain.logs import log

FEWEST_KEPT = 64
"""Blocks that are kept even where the order is in fewer."""
INDEX_BYTES = 32 * 2**20
"""Of whole indexes that are kept. Where all lanes are in other shards they would be gigabytes; then each is read once a block."""
REREADS = 3
"""Further reads of a sample whose checksum does not match, before that is an error."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Key(NamedTuple):
    """A block: samples [number * block_samples, (number + 1) * block_samples) of a shard."""

    shard: int
    number: int


class LocalReader:
    """Reads samples of a data set. Thread-safe; `close` gives the descriptors back, those of reads under way as these end."""

    def __init__(self, dataset: Dataset, block_samples: int, blocks_in_use: int = 1024) -> None:
        """block_samples: samples of one I/O block, counted from the start of a shard (see `data.order`).
        blocks_in_use: that samples are taken of at a time."""
        self._dataset = dataset
        self._block_samples = block_samples
        self._files: _Recent[str, _File] = _Recent(_File, descriptors_to_use())
        self._indexes = _Recent(self._load_index, INDEX_BYTES, lambda table: table.nbytes)
        self._blocks = _Recent(self._open_block, max(FEWEST_KEPT, blocks_in_use))

    def read(self, shards: IntArray, samples: IntArray) -> list[Sample]:
        """Samples by (shard, number in the shard), in the order given. Neighbours in a block are one read.

        Raises `DataError` naming shard and sample where the bytes are not those that were indexed.
        """
        found: list[Sample] = []
        blocks = samples // self._block_samples
        follows = (
            (shards[1:] == shards[:-1]) & (samples[1:] == samples[:-1] + 1) & (blocks[1:] == blocks[:-1])
        )
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(shards)]
        for start, stop in pairwise(edges):
            block = self._blocks.get(Key(int(shards[start]), int(blocks[start])))
            first = int(samples[start])
            found += block.read(first, first + stop - start)
        return found

    def close(self) -> None:
        for kept in (self._blocks, self._indexes, self._files):
            kept.close()

    def _load_index(self, shard: int) -> npt.NDArray[np.void]:
        path = Path(self._dataset.paths[shard])
        return load_index(index_path(path), self._dataset.shards[shard]).table

    def _open_block(self, key: Key) -> "_Block":
        first = key.number * self._block_samples
        table = self._indexes.get(key.shard)[first : first + self._block_samples].copy()
        block = _Block(self._dataset.paths[key.shard], first, table, self._files)
        block.announce()
        return block


class _Recent(Generic[K, V]):
    """What was asked for last, made where it is not there, up to a bound. Thread-safe: two threads may make the same."""

    def __init__(self, make: Callable[[K], V], most: int, size: Callable[[V], int] = lambda _: 1) -> None:
        """most: of all sizes together; one is kept however large it is."""
        self._make, self._most, self._size = make, most, size
        self._lock = threading.Lock()
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._taken = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._make(key)
        with self._lock:
            if self._closed:
                return made
            if key not in self._kept:
                self._kept[key] = made
                self._taken += self._size(made)
            value = self._kept[key]
            while self._taken > self._most and len(self._kept) > 1:
                self._taken -= self._size(self._kept.popitem(last=False)[1])
            return value

    def close(self) -> None:
        """Keep nothing from now on: a read that is under way ends with what it has."""
        with self._lock:
            self._closed = True
            self._kept.clear()
            self._taken = 0


class _File:
    """A descriptor. It closes with its last user, so that letting go of it needs no agreement of threads."""

    def __init__(self, path: str) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Block:
    """Where the samples of a block lie, and its tar for as long as there is room among the open files."""

    def __init__(
        self, path: str, first: int, table: npt.NDArray[np.void], files: _Recent[str, _File]
    ) -> None:
        """first: number of the first sample in its shard; table: `index.ROW` of each."""
        self._path, self._first, self._files = path, first, files
        self._offset, self._length, self._crc32 = (table[name] for name in ("offset", "length", "crc32"))

    def _span(self, number: int) -> tuple[int, int]:
        """Where a sample of the block, counted in it, begins and ends in the tar."""
        start = int(self._offset[number]) * BLOCK
        return start, start + int(self._length[number])

    def announce(self) -> None:
        """Ask the system for all of it, as one range: its samples come shuffled."""
        start, stop = self._span(0)[0], self._span(-1)[1]
        file = self._files.get(self._path)
        os.posix_fadvise(file.descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def read(self, first: int, stop: int) -> list[Sample]:
        """Samples [first, stop) of the shard, all of them in this block."""
        spans = [self._span(number) for number in range(first - self._first, stop - self._first)]
        origin = spans[0][0]
        data = memoryview(self._pread(spans[-1][1] - origin, origin))
        samples = []
        for number, (start, end) in enumerate(spans, start=first):
            content = self._sound(number, data[start - origin : end - origin])
            samples.append(parse_sample(content, f"{self._path}, sample {number}"))
        return samples

    def _sound(self, number: int, content: memoryview) -> memoryview:
        """`content` if its checksum is the index's; else what another read finds, past the system's copy in memory."""
        start, stop = self._span(number - self._first)
        stated = int(self._crc32[number - self._first])
        for _ in range(REREADS):
            if zlib.crc32(content) == stated:
                return content
            log.warning("%s, sample %d: its checksum does not match; reading it again", self._path, number)
            self._drop_cached(start, stop)
            content = memoryview(self._pread(stop - start, start))
        if zlib.crc32(content) != stated:
            raise DataError(
                f"{self._path}, sample {number}: its bytes are not those that were indexed (checksum), "
                f"read {REREADS + 1} times\n"
                "  The file or the way to it is damaged. Bring the shard back from its source and start again;\n"
                f"  if it was changed on purpose: {remedy(folder_of(self._path))}"
            )
        return content

    def _drop_cached(self, start: int, stop: int) -> None:
        """Whole pages only: the system keeps what is asked for in part."""
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        stop = -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE
        file = self._files.get(self._path)
        os.posix_fadvise(file.descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _pread(self, length: int, start: int) -> bytes:
        """`length` bytes from `start`, in as many reads as the system takes."""
        parts, missing, file = [], length, self._files.get(self._path)
        while missing:
            try:
                part = os.pread(file.descriptor, missing, start + length - missing)
            except OSError as error:
                raise DataError(f"{self._path}: reading failed: {error.strerror}") from None
            if not part:
                raise DataError(f"{self._path}: cut short: it ends before byte {start + length:,}")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def load_index(file: Path, stated: Shard) -> ShardIndex:
    """The index in a file, if it is the one that the manifest names; else what another read finds, past the system's
    copy in memory, as for samples."""
    limit = (
        index_bytes(stated.samples) + 1
    )  # one byte more than it should have: enough to refuse what is larger
    for attempt in range(REREADS + 1):
        try:
            with file.open("rb") as opened:
                if attempt:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                content = opened.read(limit)
            return checked_index(content, str(file), stated)
        except (OSError, DataError) as error:
            failure = error
            if isinstance(error, FileNotFoundError | PermissionError) or attempt == REREADS:
                break
            log.warning("%s; reading it again", str(error).partition("\n")[0])
    if isinstance(failure, OSError):
        raise DataError(f"{file}: cannot be read: {failure.strerror}\n  {remedy(file.parent)}") from None
    raise failure


def checked_index(content: bytes, file: str, stated: Shard) -> ShardIndex:
    """What `content` says, if it is the index that the manifest names; `file`: its path or URL, for messages."""
    folder = folder_of(file)
    index = parse_index(content, file)
    if index.tar_sha256 != stated.sha256 or len(index.table) != stated.samples:
        raise DataError(f"{file}: the index of another tar than {stated.name}\n  {remedy(folder)}")
    if hashlib.sha256(content).hexdigest() != stated.index_sha256:
        raise DataError(f"{file}: not the index that the manifest names\n  {remedy(folder)}")
    return index
