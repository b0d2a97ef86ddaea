"""Members and samples in the bytes of a tar, in memory: nothing is extracted, no link is followed.

A sample is a run of members whose names agree up to the first dot of the last path part (webdataset's rule). It holds
one image (`jpg`, `jpeg`, `png`, `webp`) and a `cls` with the label as decimal text; members of any other kind are
never looked into.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pretrain.data.index import BLOCK
from pretrain.errors import BadSampleError, DataError

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_SUFFIX = "cls"

MAX_HEADER_BYTES = 2**14
"""Of a pax or GNU header that stands before a member's own: names and times take some hundred bytes. `tarfile`'s time
for one may grow with its square."""

_META = re.compile(r"__[^/]*__($|/)")
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


class BoundedReads(io.RawIOBase):
    """What `tarfile` sees of a file: it may seek at will, but not ask for a header of gigabytes."""

    def __init__(self, file: BinaryIO | io.RawIOBase) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; at most {MAX_HEADER_BYTES} are read")
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class Sample(NamedTuple):
    """key: name of the sample in its shard; image: the file as stored; label: class index."""

    key: str
    image: memoryview
    label: int


def padded(size: int) -> int:
    """Bytes that a member's content takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix in lower case) of a member's name; none where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or _META.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def parse_sample(data: bytes | memoryview, where: str) -> Sample:
    """The sample in the byte range `data` of a tar.

    Raises, beginning with `where`: `BadSampleError` where it does not hold one image and one label, `DataError` where
    the bytes are no members of a tar.
    """
    key, image, label = "", None, None
    for name, content in members(data, where):
        parts = split_name(name)
        if parts is None:
            continue
        key, suffix = parts
        if suffix in IMAGE_SUFFIXES:
            if image is not None:
                raise BadSampleError("holds two images; a sample has one", where, key)
            image = content
        elif suffix == LABEL_SUFFIX:
            label = _parse_label(content, where, key)
    if image is None:
        raise BadSampleError(f"holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})", where, key)
    if label is None:
        raise BadSampleError(f"holds no label (.{LABEL_SUFFIX})", where, key)
    return Sample(key, image, label)


def members(data: bytes | memoryview, where: str) -> Iterator[tuple[str, memoryview]]:
    """(name, content) of the regular files in a byte range of a tar, in order.

    Plain headers are read here, a hundred times faster than by `tarfile`; everything else (pax, GNU long names, links)
    goes to it.
    """
    view, at = memoryview(data), 0
    while at < len(data):
        try:
            plain = _plain_header(bytes(view[at : at + BLOCK]))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if plain is None:
            yield from _members_by_tarfile(bytes(view[at:]), where)
            return
        name, size = plain
        start = at + BLOCK
        if start + size > len(data):
            raise DataError(f"{where}: {name} is cut short")
        yield name, view[start : start + size]
        at = start + padded(size)


def _plain_header(header: bytes) -> tuple[str, int] | None:
    """(name, size) of a POSIX ustar header of a regular file; none where it is of another kind.

    Raises `ValueError` where its checksum does not match (the sum of all bytes, its own field as blanks).
    """
    if header[257:265] != b"ustar\x0000" or header[156:157] not in (b"0", b"\0"):
        return None
    try:
        stated = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        name = header[:100].partition(b"\0")[0].decode("ascii")
        prefix = header[345:500].partition(b"\0")[0].decode("ascii")
    except ValueError:  # sizes beyond octal, names beyond ASCII
        return None
    if size < 0:
        raise ValueError(f"a header in the tar gives a size of {size}")
    if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("a header in the tar is damaged: its checksum does not match")
    return (f"{prefix}/{name}" if prefix else name), size


def _members_by_tarfile(data: bytes, where: str) -> Iterator[tuple[str, memoryview]]:
    try:
        with tarfile.open(fileobj=BoundedReads(io.BytesIO(data)), mode="r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise DataError(f"{where}: a header in the tar gives a size of {member.size}")
                if member.isreg() and not member.issparse():
                    start = member.offset_data
                    yield member.name, memoryview(data)[start : start + member.size]
    except (tarfile.TarError, RecursionError) as error:
        raise DataError(f"{where}: not readable as tar: {error}") from None


def _parse_label(content: memoryview, where: str, key: str) -> int:
    match = _LABEL.fullmatch(content)
    if match is None:
        raise BadSampleError(
            f"the label is {bytes(content[:20])!r}; a class index such as 7 is needed as decimal text",
            where,
            key,
        )
    return int(match[1])
