"""Samples of one local shard as they lie in it, for the tools that look at every one. Training reads by `read`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pretrain.data.index import BLOCK, ShardIndex, index_path, parse_index, read_file, require_file
from pretrain.errors import DataError


@dataclass(frozen=True)
class RawShard:
    """An open tar and its index."""

    path: Path
    index: ShardIndex
    file: BinaryIO

    def __len__(self) -> int:
        return len(self.index.table)

    def read(self, number: int) -> bytes:
        """The members of a sample with their headers; fewer bytes than the index says where the tar is cut short. Raises
        `DataError` where the disk does not give them."""
        row = self.index.table[number]
        try:
            return os.pread(self.file.fileno(), int(row["length"]), int(row["offset"]) * BLOCK)
        except OSError as error:
            raise DataError(f"{self.path}, sample {number}: cannot be read: {error.strerror}") from None


@contextmanager
def opened(path: Path) -> Iterator[RawShard]:
    """Raises `DataError` where the tar or its index cannot be read, or the index is damaged."""
    index = read_index(path)
    try:
        require_file(path)
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        yield RawShard(path, index, file)


def read_index(tar: Path) -> ShardIndex:
    """The index beside a tar; raises `DataError`."""
    path = index_path(tar)
    try:
        return parse_index(read_file(path), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
