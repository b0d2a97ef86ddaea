"""Images out of parquet, so that they can be read one by one.

A cell of a parquet file cannot be read without its row group, and shards are in the order of a hash. So row groups are
unpacked first: their images one after the other in `NAME.bin`, and where each begins in `NAME.npy`, int64 [images + 1].
In memory is less than a row group at a time.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH = 64
_BUFFER = 2**20
_BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Row groups [first, stop) of a file, and their column of images. name: other after any change of the file."""

    path: str
    column: str
    first: int
    stop: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}, row groups {self.first} to {self.stop - 1}"

    def unpack(self, folder: Path) -> int:
        """See `Part`. Raises `DataError` for a row without bytes and for a file that cannot be read."""
        content, table = folder / f"{self.name}.bin", folder / f"{self.name}.npy"
        if table.exists():  # it comes last
            return len(_starts(table)) - 1
        starts = [0]
        with _written(content) as out:
            for data in self._images():
                out.write(data)
                starts.append(starts[-1] + len(data))
        with _written(table) as out:
            np.save(out, np.array(starts, np.int64))
        return len(starts) - 1

    def _images(self) -> Iterator[memoryview]:
        number = 0
        with parquet_file(Path(self.path), pre_buffer=False, buffer_size=_BUFFER) as file:
            is_struct = self.column not in file.schema.names  # a struct has its fields there
            wanted = [f"{self.column}.{_BYTES}" if is_struct else self.column]
            for group in range(self.first, self.stop):
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=wanted, use_threads=False):
                    column = batch.column(0)
                    for cell in column.flatten()[0] if is_struct else column:
                        if not cell.is_valid:
                            raise DataError(
                                f"{self}: the image of row {number} of these is empty: it is not in the file\n"
                                "  Write the data set again with the images embedded, or pack the image files."
                            )
                        yield memoryview(cell.as_buffer())
                        number += 1


@dataclass(frozen=True, slots=True)
class Cell:
    """An image in unpacked row groups. size: about."""

    part: RowGroups
    row: int
    size: int

    def __str__(self) -> str:
        return f"{self.part.path}, an image"

    def read(self, unpacked: Path) -> bytes:
        starts = _starts(unpacked / f"{self.part.name}.npy")
        start, stop = int(starts[self.row]), int(starts[self.row + 1])
        with (unpacked / f"{self.part.name}.bin").open("rb") as file:
            data = os.pread(file.fileno(), stop - start, start)
        if len(data) < stop - start:
            raise DataError(
                f"{unpacked}: {self.part.name}.bin is cut short; delete this folder and start again"
            )
        return data

    def identity(self) -> str:
        return f"{self.part.name} {self.row}"


@contextlib.contextmanager
def parquet_file(path: Path, **options: int) -> Iterator["pq.ParquetFile"]:
    """An open file; what goes wrong inside the block is taken for its fault and raised as `DataError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, **options) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as parquet: {reason}") from None


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that is there, whole and on the disk, after the block, or not at all."""
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@lru_cache(maxsize=256)
def _starts(table: Path) -> npt.NDArray[np.int64]:
    starts: npt.NDArray[np.int64] = np.load(table, mmap_mode="r")
    return starts
