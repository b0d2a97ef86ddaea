"""Samples from local shards: ranged reads, each checked against the checksum in the index before anything sees it.

`LocalReader.read` is the whole interface between the order and the bytes: numbers in, samples out, from any thread.
State: the indexes of as many shards as the order is in at a time, of as many of those as there are descriptors for an open
file, and which blocks were announced to the system. The page cache holds the blocks; nothing else does.
"""

import hashlib
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np

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
"""Indexes that are kept even where the order is in fewer shards."""
_ANNOUNCED_A_BLOCK = 4
"""Announcements that are remembered for each block in use: steps ahead of the slowest thread."""
REREADS = 3
"""Further reads of a sample whose checksum does not match, before that is an error."""


class LocalReader:
    """Reads samples of a data set. Thread-safe; `close` gives the descriptors back."""

    def __init__(self, dataset: Dataset, block_samples: int, blocks_in_use: int = 1024) -> None:
        """block_samples: samples of one I/O block, counted from the start of a shard (see `data.order`).
        blocks_in_use: that samples are taken of at a time, and so the most shards."""
        self._dataset = dataset
        self._block_samples = block_samples
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _KeptShard] = OrderedDict()
        self._most_kept = max(FEWEST_KEPT, blocks_in_use)
        self._files = _Files(descriptors_to_use())
        self._announced: OrderedDict[tuple[int, int], None] = OrderedDict()

    def read(self, shards: IntArray, samples: IntArray) -> list[Sample]:
        """Samples by (shard, number in the shard), in the order given. Neighbours in a shard are one read.

        Raises `DataError` naming shard and sample where the bytes are not those that were indexed.
        """
        found: list[Sample] = []
        follows = (shards[1:] == shards[:-1]) & (samples[1:] == samples[:-1] + 1)
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(shards)]
        for start, stop in pairwise(edges):
            number, first = int(shards[start]), int(samples[start])
            shard = self._shard(number)
            self._announce(shard, number, first // self._block_samples)
            found += shard.read(first, first + stop - start)
        return found

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
        self._files.close()

    def _shard(self, number: int) -> "_KeptShard":
        with self._lock:
            shard = self._kept.get(number)
            if shard is not None:
                self._kept.move_to_end(number)
                return shard
        shard = _KeptShard(Path(self._dataset.paths[number]), self._dataset.shards[number], self._files)
        with self._lock:
            shard = self._kept.setdefault(number, shard)  # another thread may have been first
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
            return shard

    def _announce(self, shard: "_KeptShard", number: int, block: int) -> None:
        """The first read in a block asks the system for all of it, as one range: its samples come shuffled."""
        with self._lock:
            if (number, block) in self._announced:
                return
            self._announced[number, block] = None
            if len(self._announced) > _ANNOUNCED_A_BLOCK * self._most_kept:
                self._announced.popitem(last=False)
        shard.announce(block * self._block_samples, (block + 1) * self._block_samples)


class _File:
    """A descriptor. It closes with its last user, so that letting go of it needs no agreement of threads."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Files:
    """Open files, the ones used last, up to a bound. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._open: OrderedDict[Path, _File] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, path: Path) -> _File:
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                return file
        file = _File(path)
        with self._lock:
            file = self._open.setdefault(path, file)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
            return file

    def close(self) -> None:
        with self._lock:
            self._open.clear()


class _KeptShard:
    """The index of a shard, and its file for as long as there is room among the open ones."""

    def __init__(self, path: Path, stated: Shard, files: _Files) -> None:
        self._path, self._files = path, files
        table = load_index(index_path(path), stated).table
        self._offset, self._length, self._crc32 = (table[name] for name in ("offset", "length", "crc32"))

    def _start(self, number: int) -> int:
        """Where a sample begins in the tar."""
        return int(self._offset[number]) * BLOCK

    def _stop(self, number: int) -> int:
        return int(self._offset[number]) * BLOCK + int(self._length[number])

    def announce(self, first: int, stop: int) -> None:
        begin, end = self._start(first), self._stop(min(stop, len(self._offset)) - 1)
        file = self._files.get(self._path)
        os.posix_fadvise(file.descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read(self, first: int, stop: int) -> list[Sample]:
        start = self._start(first)
        data = memoryview(self._pread(self._stop(stop - 1) - start, start))
        samples = []
        for number in range(first, stop):
            content = data[self._start(number) - start : self._stop(number) - start]
            samples.append(parse_sample(self._sound(number, content), f"{self._path}, sample {number}"))
        return samples

    def _sound(self, number: int, content: memoryview) -> memoryview:
        """`content` if its checksum is the index's; else what another read finds, past the system's copy in memory."""
        start, stop = self._start(number), self._stop(number)
        stated = int(self._crc32[number])
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
                f"  if it was changed on purpose: {remedy(self._path.parent)}"
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
