"""One shard: the tar, its index, and a note that lets the next attempt keep them."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL

from pretrain.data.header import SUFFIX_OF, read_header
from pretrain.data.index import index_path
from pretrain.data.manifest import Shard
from pretrain.data.pack.shrink import shrink
from pretrain.data.pack.source import Item, Part, digest
from pretrain.data.pool import Advance
from pretrain.data.scan import Indexed, index_tar, write_aside
from pretrain.errors import BadSampleError, DataError

FORMAT = 1
"""Of what is written; another number, and nothing of an older attempt is kept."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored. longest_side: in pixels, larger images are shrunk to it; quality: of JPEG and WebP then;
    max_pixels: an image whose header says more is bad; skip_bad: leave bad images out, or stop at the first."""

    longest_side: int | None = None
    quality: int = 90
    max_pixels: int = 89_478_485
    skip_bad: bool = False


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Made:
    """A shard that is there. kept: an earlier attempt had made it."""

    indexed: Indexed
    skipped: list[Skipped]
    kept: bool = False


@dataclass(frozen=True)
class ShardJob:
    """path: of the tar; note: of what tells that it is finished; unpacked: see `Part`."""

    path: Path
    note: Path
    unpacked: Path
    items: list[Item]
    encoding: Encoding

    def __str__(self) -> str:
        return self.path.name

    def identity(self) -> str:
        """Changes with whatever decides the bytes of this shard."""
        words = [f"{FORMAT} {self.path.name} {self.encoding}"]
        words += [f"Pillow {PIL.__version__}"] if self.encoding.longest_side else []
        return digest([*words, *(item.identity() for item in self.items)])


@dataclass(frozen=True)
class UnpackJob:
    part: Part
    folder: Path

    def __str__(self) -> str:
        return str(self.part)


def unpack_part(job: UnpackJob, advance: Advance) -> None:
    advance(job.part.unpack(job.folder))


def make_shard(job: ShardJob, advance: Advance) -> Made:
    """Write a shard, or keep the one that is there, if its note is of this job and its bytes are those of the note.

    Raises `DataError` naming an image that is bad or gone, and `OSError` where the shard cannot be written.
    """
    identity = job.identity()
    kept = _kept(job, identity)
    if kept is not None:
        advance(len(job.items))
        return kept
    job.note.unlink(missing_ok=True)
    skipped: list[Skipped] = []
    _write_tar(job, skipped, advance)
    made = Made(index_tar(job.path), skipped)
    write_aside(job.note, _note(made, identity))
    return made


def _write_tar(job: ShardJob, skipped: list[Skipped], advance: Advance) -> None:
    aside = job.path.with_name(job.path.name + ".partial")
    try:
        with aside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for item, suffix, data in _contents(job, skipped, advance):
                    _add(tar, f"{item.key}.cls", str(item.label).encode("ascii"))
                    _add(tar, f"{item.key}.{suffix}", data)
            if len(skipped) == len(job.items):
                raise DataError(f"no image of {job.path.name} is usable; the first: {skipped[0].reason}")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(job.path)
    finally:
        aside.unlink(missing_ok=True)


def _contents(job: ShardJob, skipped: list[Skipped], advance: Advance) -> Iterator[tuple[Item, str, bytes]]:
    """Items with the ending and the bytes of their image; those that are bad are added to `skipped`."""
    encoding = job.encoding
    for item in job.items:
        advance(1)
        try:
            data = item.content.read(job.unpacked)
            header = read_header(data, encoding.max_pixels)
            if encoding.longest_side is not None:
                data = shrink(data, header, encoding.longest_side, encoding.quality, encoding.max_pixels)
        except BadSampleError as error:
            if not encoding.skip_bad:
                raise DataError(
                    f"{item.content} ({item.key}): {error}\n  Remove or mend it, or leave such images out with --skip-bad."
                ) from None
            skipped.append(Skipped(item.key, str(error)))
            continue
        yield item, item.suffix or SUFFIX_OF[header.format], data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member with no trace of who wrote it, or when: as webdataset's writer with mtime 0 and no user."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o444
    try:
        tar.addfile(member, io.BytesIO(data))
    except ValueError as error:
        raise DataError(
            f"{name}: cannot be the name of a member of a tar: {error}; use shorter names"
        ) from None


def _note(made: Made, identity: str) -> bytes:
    words = {
        "identity": identity,
        "shard": asdict(made.indexed.shard),
        "labels": made.indexed.labels,
        "skipped": [asdict(skipped) for skipped in made.skipped],
    }
    return json.dumps(words).encode()


def _kept(job: ShardJob, identity: str) -> Made | None:
    try:
        note: dict[str, Any] = json.loads(job.note.read_bytes())
        if note["identity"] != identity:
            return None
        shard = Shard(**note["shard"])
        index = index_path(job.path).read_bytes()
        with job.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if sha256 != shard.sha256 or hashlib.sha256(index).hexdigest() != shard.index_sha256:
        return None
    lowest, highest = note["labels"]
    return Made(Indexed(shard, (lowest, highest)), [Skipped(**one) for one in note["skipped"]], kept=True)
