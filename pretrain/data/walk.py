"""From a tar to its index. Anybody's plain tar, trusted in nothing, wherever its bytes come from."""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.data.index import BLOCK, MAX_SAMPLE_BYTES, ROW, ShardIndex
from pretrain.data.tar import BoundedReads, members, padded, parse_sample, split_name
from pretrain.errors import BadSampleError, DataError
from pretrain.logs import log

_CHUNK = 2**20


class Tar(Protocol):
    """The bytes of a tar, asked for from front to back. name: for messages; size: all of them."""

    name: str
    size: int

    def pread(self, size: int, offset: int) -> bytes:
        """Bytes [offset, offset + size); fewer at the end."""

    def let_go(self, before: int) -> None:
        """No byte before this one will be asked for again."""

    def sha256(self) -> str:
        """Of all bytes; called last."""


class LocalTar:
    """A tar that is an open file."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.name, self.size = str(path), os.fstat(file.fileno()).st_size
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def let_go(self, before: int) -> None:
        """The system keeps what it has room for."""

    def sha256(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()


@dataclass
class _Range:
    """A sample as its members are walked. sizes: bytes of the content by suffix."""

    key: str
    start: int
    stop: int
    sizes: dict[str, int] = field(default_factory=dict)


def scan(path: Path) -> ShardIndex:
    """Index a tar that is a file; see `scan_tar`."""
    if not path.is_file():
        raise DataError(f"{path}: not a file; a pipe or a device would be read for ever")
    with path.open("rb") as file:
        return scan_tar(LocalTar(path, file))


def scan_tar(tar: Tar) -> ShardIndex:
    """Index one tar. Samples without an image or a label are indexed with a warning; training replaces them.

    Raises `DataError` naming it where it is cut short or damaged, where members of a sample do not stand together or
    occur twice, where a name leads out of its folder, and where no sample has both an image and an integer label.
    """
    walk = _Walk(tar)
    rows, labels, bad = [], [], []
    for i, sample in enumerate(walk.samples()):
        size = sample.stop - sample.start
        if size > MAX_SAMPLE_BYTES:
            raise DataError(
                f"{tar.name}, sample {i} ({sample.key}): {size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are allowed"
            )
        data = tar.pread(size, sample.start)
        rows.append((sample.start // BLOCK, len(data), zlib.crc32(data)))
        try:
            labels.append(_check_sample(data, sample, f"{tar.name}, sample {i}"))
        except BadSampleError as error:
            bad.append(error)
    _check_end(tar, walk.end)
    if not rows:
        raise DataError(f"{tar.name}: holds no sample; remove the file")
    if not labels:
        raise DataError(f"{tar.name}: none of its {len(rows):,} samples is usable; the first: {bad[0]}")
    if bad:
        log.warning("%s: %d of %d samples are bad; the first: %s", tar.name, len(bad), len(rows), bad[0])
    return ShardIndex(np.array(rows, ROW), tar.size, tar.sha256(), (min(labels), max(labels)))


class _Walk:
    """One pass over the members of a tar. end: where the last one that was met ends."""

    def __init__(self, tar: Tar) -> None:
        self._tar, self.end = tar, 0
        self._seen: set[str] = set()
        self._sample: _Range | None = None

    def samples(self) -> Iterator[_Range]:
        """Each sample when all of its members have been met."""
        name = self._tar.name
        try:
            with tarfile.open(fileobj=BoundedReads(_Cursor(self._tar)), mode="r:") as members_of:
                for member in members_of:
                    self.end = member.offset_data + (padded(member.size) if member.isreg() else 0)
                    _check_member(member, name)
                    parts = split_name(member.name) if member.isreg() else None
                    if (done := self._sample) is not None and (
                        (parts is not None and parts[0] != done.key)
                        or self.end - done.start > MAX_SAMPLE_BYTES  # what followed it was none of its own
                    ):
                        if parts is not None and parts[0] == done.key:
                            done.stop = self.end  # too large, and refused for it
                        self._sample = None
                        yield done
                    if parts is not None:
                        self._add(member, *parts)
                    self._tar.let_go(member.offset if self._sample is None else self._sample.start)
        except RecursionError:
            raise DataError(
                f"{name}: hundreds of headers before one member; no archiver writes that"
            ) from None
        except tarfile.TarError as error:
            raise DataError(f"{name}: cut short, damaged, or not an uncompressed tar: {error}") from None
        if self._sample is not None:
            yield self._sample

    def _add(self, member: tarfile.TarInfo, key: str, suffix: str) -> None:
        """Add a member to the sample that is being walked, or begin the next."""
        if self._sample is None:
            if key in self._seen:
                raise DataError(
                    f"{self._tar.name}: the members of sample {key} do not stand together, or its key occurs twice\n"
                    "  Write the tar again, sorted by name and with one key a sample."
                )
            self._seen.add(key)
            self._sample = _Range(key, member.offset, self.end)
        if suffix in self._sample.sizes:
            raise DataError(
                f"{self._tar.name}: {key}.{suffix} occurs twice\n  Write the tar again with one key a sample."
            )
        self._sample.sizes[suffix] = member.size
        self._sample.stop = self.end


class _Cursor(io.RawIOBase):
    """A tar as the file that `tarfile` wants."""

    def __init__(self, tar: Tar) -> None:
        self._tar, self._at = tar, 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._tar.pread(size, self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at


def _check_member(member: tarfile.TarInfo, tar: str) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise DataError(
            f"{tar}: a member is named {name!a}; absolute names, `..` and control characters are refused"
        )
    if member.issparse():
        raise DataError(f"{tar}: {name} is a sparse file; write the tar without --sparse")
    if not 0 <= member.size <= MAX_SAMPLE_BYTES:  # below zero it would be walked for ever
        raise DataError(f"{tar}: {name} has {member.size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are allowed")


def _check_end(tar: Tar, end: int) -> None:
    """After the last member only the zeros that end a tar may follow; `tarfile` stops in silence at anything else."""
    if tar.size < end + BLOCK:
        raise DataError(f"{tar.name}: cut short: the blocks of zeros that end a tar are missing")
    for start in range(end, tar.size, _CHUNK):
        tar.let_go(start)
        if any(tar.pread(_CHUNK, start)):
            raise DataError(
                f"{tar.name}: damaged after byte {end:,}, or several tars in one file; a reader would stop there"
            )


def _check_sample(data: bytes, sample: _Range, where: str) -> int:
    """Read a sample the way training will, compare it with what `tarfile` saw, and return its label."""
    found = [(split_name(name), len(content)) for name, content in members(data, where)]
    if {parts: size for parts, size in found if parts} != {
        (sample.key, suffix): size for suffix, size in sample.sizes.items()
    }:
        raise DataError(
            f"{where} ({sample.key}): its members depend on headers before it; write the tar again"
        )
    return parse_sample(data, where).label
