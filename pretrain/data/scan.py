"""From tars to their manifest, with an index for each. A tar that has not changed is not read again.

Of a folder, the indexes lie beside the tars; of tars in a store, in a folder that was made for just these (`contact`).
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from pretrain.data.index import SUFFIX, ShardIndex, index_path, parse_index, read_file
from pretrain.data.manifest import NAME, Manifest, Shard, read_manifest
from pretrain.data.object_tar import ObjectTar
from pretrain.data.pool import Advance, run
from pretrain.data.store import Stores
from pretrain.data.walk import scan, scan_tar
from pretrain.errors import DataError
from pretrain.logs import log

_SHOWN = 10

J = TypeVar("J")


class Indexed(NamedTuple):
    """A shard with its index beside it. labels: lowest and highest."""

    shard: Shard
    labels: tuple[int, int]


class ObjectJob(NamedTuple):
    """A tar in a store; place: the folder of its index. A job."""

    url: str
    size: int
    place: Path
    timeout_seconds: float

    def __str__(self) -> str:
        return self.url


class _Tar(NamedTuple):
    """A job. fresh: read the tar whatever index it has."""

    path: Path
    fresh: bool


def index_folder(
    folder: Path,
    class_names: list[str] | None = None,
    on_shard: Callable[[Path], object] = lambda _: None,
    *,
    workers: int = 1,
    verify: bool = False,
) -> Manifest:
    """Write the index of every `*.tar` in `folder`, in the order of their names, and the manifest. Returns it.

    A tar whose index is younger than itself and says its size keeps that index unread, unless `verify`: what a killed
    run has done is not done again. on_shard: called with each tar that is done. workers: processes.

    Raises `DataError` naming every tar that cannot be trusted, after all others have got their index; a manifest that
    is there stays as it was.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder}: there is no {'.tar file in this' if folder.is_dir() else 'such'} folder")
    jobs = [_Tar(tar, verify) for tar in tars]
    found = _index_all(_index_if_needed, jobs, list(map(str, tars)), workers, lambda n: on_shard(tars[n]))
    try:
        return write_manifest(folder, found, class_names)
    except OSError as error:
        raise DataError(f"{folder}: cannot be indexed: {error}") from None


def index_objects(
    place: Path,
    tars: list[ObjectJob],
    on_shard: Callable[[str], object] = lambda _: None,
    *,
    workers: int = 1,
) -> Manifest:
    """Write the indexes of tars in a store, and their manifest, to `place`, in the order given. Returns the manifest.

    A tar that has an index there is not read again: `place` is of these very objects. Raises as `index_folder` does.
    """
    urls = [tar.url for tar in tars]
    found = _index_all(_index_object_if_needed, tars, urls, workers, lambda n: on_shard(urls[n]))
    try:
        return write_manifest(place, found, None)
    except OSError as error:
        raise DataError(f"{place}: cannot be written: {error}") from None


def _index_all(
    task: Callable[[J, Advance], Indexed],
    jobs: list[J],
    names: list[str],
    workers: int,
    on_shard: Callable[[int], object],
) -> list[Indexed]:
    """What became of each job, in their order; raises `DataError` naming all that failed, when all have ended."""
    indexed: dict[int, Indexed] = {}
    bad: dict[int, str] = {}
    for outcome in run(task, jobs, workers):
        if outcome.error is None:
            indexed[outcome.number] = outcome.result()
        elif isinstance(outcome.error, OSError):
            bad[outcome.number] = f"{names[outcome.number]}: cannot be indexed: {outcome.error}"
        else:
            bad[outcome.number] = str(outcome.error)
        on_shard(outcome.number)
    if bad:
        raise DataError(_all_bad([bad[number] for number in sorted(bad)], len(jobs)))
    return [indexed[number] for number in range(len(jobs))]


def index_tar(tar: Path) -> Indexed:
    """Read a tar and write its index beside it; raises `DataError` (see `scan`) and `OSError`."""
    index = scan(tar)
    content = index.to_bytes()
    write_aside(index_path(tar), content)
    return _indexed(tar.name, index, content)


def write_manifest(folder: Path, shards: Iterable[Indexed], class_names: list[str] | None) -> Manifest:
    """Write the manifest of shards in `folder`, in their order, and return it."""
    indexed = list(shards)
    lowest, highest = zip(*(one.labels for one in indexed), strict=True)
    manifest = Manifest.of([one.shard for one in indexed], (min(lowest), max(highest)), class_names)
    write_aside(folder / NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def known_class_names(folder: Path) -> list[str] | None:
    """The names that the folder's manifest gives to classes; none, with a warning, where it is not usable."""
    if not (folder / NAME).exists():
        return None
    try:
        return read_manifest(folder).class_names
    except DataError as error:
        log.warning("names of classes, if it has any, are not taken over: %s", error)
        return None


def write_aside(path: Path, content: bytes) -> None:
    """Replace a file in one step: it is the old one or the new one at any instant, and after a power cut."""
    aside = path.with_name(path.name + ".partial")
    with open_to_write(aside) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def open_to_write(path: Path) -> BinaryIO:
    """A file beside shards, which may be a stranger's: what a link of that name leads to is not written, a pipe not
    waited for. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _index_if_needed(tar: _Tar, advance: Advance) -> Indexed:
    indexed = None if tar.fresh else _unchanged(tar.path)
    return indexed or index_tar(tar.path)


def _unchanged(tar: Path) -> Indexed | None:
    """What the index beside a tar says, if it was written after the tar and for its size."""
    file = index_path(tar)
    try:
        content = read_file(file)
        index = parse_index(content, file)
        written, changed = file.stat().st_mtime_ns, tar.stat()
    except (OSError, DataError):
        return None
    # In the same tick of the clock the tar may have changed after its index was written.
    if index.tar_bytes != changed.st_size or written <= changed.st_mtime_ns:
        return None
    return _indexed(tar.name, index, content)


def _index_object_if_needed(tar: ObjectJob, advance: Advance) -> Indexed:
    name = tar.url.rpartition("/")[2]
    file = tar.place / (name + SUFFIX)
    with suppress(OSError, DataError):
        content = file.read_bytes()
        index = parse_index(content, file)
        if index.tar_bytes == tar.size:
            return _indexed(name, index, content)
    with ObjectTar(Stores(tar.timeout_seconds), tar.url, tar.size) as opened:
        index = scan_tar(opened)
    content = index.to_bytes()
    write_aside(file, content)
    return _indexed(name, index, content)


def _indexed(name: str, index: ShardIndex, content: bytes) -> Indexed:
    shard = Shard(
        name=name,
        samples=len(index.table),
        bytes=index.tar_bytes,
        sha256=index.tar_sha256,
        index_sha256=hashlib.sha256(content).hexdigest(),
    )
    return Indexed(shard, index.labels)


def _all_bad(reasons: list[str], count: int) -> str:
    if len(reasons) == 1:
        return reasons[0]
    more = f"\n... and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return f"{len(reasons)} of {count} tars cannot be indexed\n" + "\n".join(reasons[:_SHOWN]) + more
