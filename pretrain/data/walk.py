"""From a tar to its index. Anybody's plain tar, trusted in nothing."""

import hashlib
import os
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.index import BLOCK, MAX_SAMPLE_BYTES, ROW, ShardIndex
from pretrain.data.tar import BoundedReads, members, padded, parse_sample, split_name
from pretrain.errors import BadSampleError, DataError
from pretrain.logs import log

_CHUNK = 2**20


@dataclass
class _Range:
    """A sample as its members are walked. sizes: bytes of the content by suffix."""

    key: str
    start: int
    stop: int
    sizes: dict[str, int] = field(default_factory=dict)


def scan(path: Path) -> ShardIndex:
    """Index one tar. Samples without an image or a label are indexed with a warning; training replaces them.

    Raises `DataError` naming it where it is cut short or damaged, where members of a sample do not stand together or
    occur twice, where a name leads out of its folder, and where no sample has both an image and an integer label.
    """
    if not path.is_file():
        raise DataError(f"{path}: not a file; a pipe or a device would be read for ever")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        ranges, end = _walk(file, path)
        _check_end(file, end, path)
        if not ranges:
            raise DataError(f"{path}: holds no sample; remove the file")
        table = np.empty(len(ranges), ROW)
        labels, bad = [], []
        for i, sample in enumerate(ranges):
            size = sample.stop - sample.start
            if size > MAX_SAMPLE_BYTES:
                raise DataError(
                    f"{path}, sample {i} ({sample.key}): {size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are allowed"
                )
            data = os.pread(file.fileno(), size, sample.start)
            table[i] = sample.start // BLOCK, len(data), zlib.crc32(data)
            try:
                labels.append(_check_sample(data, sample, f"{path}, sample {i}"))
            except BadSampleError as error:
                bad.append(error)
        if not labels:
            raise DataError(f"{path}: none of its {len(ranges):,} samples is usable; the first: {bad[0]}")
        if bad:
            log.warning("%s: %d of %d samples are bad; the first: %s", path, len(bad), len(ranges), bad[0])
        return ShardIndex(table, os.fstat(file.fileno()).st_size, sha256, (min(labels), max(labels)))


def _walk(file: BinaryIO, path: Path) -> tuple[list[_Range], int]:
    """The samples of a tar, and where its last member ends."""
    ranges: list[_Range] = []
    seen: set[str] = set()
    end = 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=BoundedReads(file), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + (padded(member.size) if member.isreg() else 0)
                _check_member(member, path)
                parts = split_name(member.name)
                if parts is not None and member.isreg():
                    _append(ranges, seen, member.offset, *parts, member.size, path)
                    ranges[-1].stop = end
    except RecursionError:
        raise DataError(f"{path}: hundreds of headers before one member; no archiver writes that") from None
    except tarfile.TarError as error:
        raise DataError(f"{path}: cut short, damaged, or not an uncompressed tar: {error}") from None
    return ranges, end


def _append(
    ranges: list[_Range], seen: set[str], offset: int, key: str, suffix: str, size: int, path: Path
) -> None:
    """Add a member to the sample that is being walked, or begin the next."""
    if not ranges or ranges[-1].key != key:
        if key in seen:
            raise DataError(
                f"{path}: the members of sample {key} do not stand together, or its key occurs twice\n"
                "  Write the tar again, sorted by name and with one key a sample."
            )
        seen.add(key)
        ranges.append(_Range(key, offset, offset))
    if suffix in ranges[-1].sizes:
        raise DataError(f"{path}: {key}.{suffix} occurs twice\n  Write the tar again with one key a sample.")
    ranges[-1].sizes[suffix] = size


def _check_member(member: tarfile.TarInfo, path: Path) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise DataError(
            f"{path}: a member is named {name!a}; absolute names, `..` and control characters are refused"
        )
    if member.issparse():
        raise DataError(f"{path}: {name} is a sparse file; write the tar without --sparse")
    if not 0 <= member.size <= MAX_SAMPLE_BYTES:  # below zero it would be walked for ever
        raise DataError(f"{path}: {name} has {member.size:,} bytes; at most {MAX_SAMPLE_BYTES:,} are allowed")


def _check_end(file: BinaryIO, end: int, path: Path) -> None:
    """After the last member only the zeros that end a tar may follow; `tarfile` stops in silence at anything else."""
    size = os.fstat(file.fileno()).st_size
    if size < end + BLOCK:
        raise DataError(f"{path}: cut short: the blocks of zeros that end a tar are missing")
    for start in range(end, size, _CHUNK):
        if any(os.pread(file.fileno(), _CHUNK, start)):
            raise DataError(
                f"{path}: damaged after byte {end:,}, or several tars in one file; a reader would stop there"
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
