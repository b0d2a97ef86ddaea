"""The index beside a shard, `X.tar.idx`: where each sample lies in the tar, and a checksum of its bytes.

Little endian. A header of 68 bytes, then a row of 12 bytes for each sample, in the order of the tar:

    header   8 bytes  magic                        row   uint32  offset of its first header, in blocks of 512 bytes
             uint32   version                            uint32  bytes of its members with headers and padding
             uint32   number of samples                  uint32  crc32 of those bytes
             uint64   bytes of the tar
             32 bytes sha256 of the tar
             uint32   lowest label
             uint32   highest label
             uint32   crc32 of the 64 bytes before and of all rows
"""

import errno
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.urls import folder_of, is_remote
from pretrain.errors import DataError

MAGIC = b"VITSHIDX"
VERSION = 2
BLOCK = 512
SUFFIX = ".idx"
MAX_SAMPLE_BYTES = 256 * 2**20
"""Of a sample's members with headers and padding: what a reader would take into memory at a time."""

_HEADER = struct.Struct("<8sIIQ32sIII")
_BEFORE_CRC = _HEADER.size - 4
ROW = np.dtype([("offset", "<u4"), ("length", "<u4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class ShardIndex:
    """table: structured array [samples] of `ROW`; tar_bytes, tar_sha256 (hex): the tar that it was made from;
    labels: lowest and highest in it."""

    table: npt.NDArray[np.void]
    tar_bytes: int
    tar_sha256: str
    labels: tuple[int, int]

    def to_bytes(self) -> bytes:
        table = self.table.tobytes()
        tar_sha256 = bytes.fromhex(self.tar_sha256)
        head = _HEADER.pack(MAGIC, VERSION, len(self.table), self.tar_bytes, tar_sha256, *self.labels, 0)
        head = head[:_BEFORE_CRC]
        return head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name + SUFFIX)


def require_file(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))


def read_file(path: Path) -> bytes:
    """An index or a manifest; raises `OSError`."""
    require_file(path)
    return path.read_bytes()


def index_bytes(samples: int) -> int:
    """Size of the index of a shard of that many samples."""
    return _HEADER.size + samples * ROW.itemsize


def remedy(folder: Path | str) -> str:
    """What to do about a missing or wrong index or manifest."""
    if is_remote(str(folder)):
        tars = f"'{folder}/NAME-{{000..099}}.tar'" if str(folder).startswith("http") else folder
        return (
            f"Run `pretrain shards index {tars} --out FOLDER`, in parallel and from where it was stopped,\n"
            f"  and copy the .idx files and manifest.json of FOLDER to {folder}."
        )
    return f"Run `pretrain shards index {folder}`."


def parse_index(data: bytes, path: Path | str) -> ShardIndex:
    """Read an index; raises `DataError` where its bytes are not the ones that were written, or make no sense."""

    def refuse(reason: str) -> DataError:
        return DataError(f"{path}: {reason}\n  {remedy(folder_of(str(path)))}")

    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise refuse("not an index of a shard, or cut short")
    _, version, count, tar_bytes, tar_sha256, *labels, crc = _HEADER.unpack_from(data)
    if version != VERSION:
        raise refuse(f"an index of version {version}; this program reads version {VERSION}")
    if len(data) != index_bytes(count):
        raise refuse(f"{len(data)} bytes, but {count} samples need {index_bytes(count)}")
    if zlib.crc32(memoryview(data)[_HEADER.size :], zlib.crc32(data[:_BEFORE_CRC])) != crc:
        raise refuse("damaged: its checksum does not match")
    table = np.frombuffer(data, ROW, offset=_HEADER.size)
    if count == 0 or labels[0] > labels[1]:
        raise refuse("it holds no sample, or its lowest label is above its highest")
    if not _is_sound(table, tar_bytes):
        raise refuse("its samples overlap, lie outside the tar or are too large")
    return ShardIndex(table, tar_bytes, tar_sha256.hex(), (labels[0], labels[1]))


def _is_sound(table: npt.NDArray[Any], tar_bytes: int) -> bool:
    start = table["offset"].astype(np.int64) * BLOCK
    stop = start + table["length"]
    return bool(
        (start[1:] >= stop[:-1]).all()
        and stop[-1] <= tar_bytes
        and (table["length"] > 0).all()
        and (table["length"] <= MAX_SAMPLE_BYTES).all()
        and (table["length"] % BLOCK == 0).all()
    )
