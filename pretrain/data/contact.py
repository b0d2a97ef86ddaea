"""Tars that nobody indexed, met for the first time: below a stated size they are indexed here, once, by one process.

    tars in a folder      index and manifest beside the tars, or, where that folder cannot be written, in a folder of
                          links to them
    tars in a store       index and manifest in a folder that has nothing else; the tars stay where they are

Folders of links and of indexes lie below `$XDG_CACHE_HOME/pretrain/indexes` (by default `~/.cache`), named by what they
were made of. Index and manifest are those of `pretrain shards index`, and so is the sample order.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pretrain.data.index import SUFFIX, remedy
from pretrain.data.manifest import NAME, Manifest, read_manifest
from pretrain.data.scan import ObjectJob, index_folder, index_objects, open_to_write, write_aside
from pretrain.data.store import TIMEOUT_SECONDS, Stores, Version
from pretrain.data.urls import check_source, expand, folder_of, is_remote, name_of
from pretrain.errors import DataError
from pretrain.logs import log

MAX_BYTES = 10 * 2**30
"""Of all tars of a folder together: about a minute of reading."""
_ASKED_AT_ONCE = 16
_LOCK = ".index.lock"


def indexed(folder: Path) -> Path:
    """`folder` itself where it has a manifest or is given one now, else the folder of links that has one.

    Raises `DataError` where the tars are too many bytes, or are not usable. Waits for a process that is at it.
    """
    tars = [] if (folder / NAME).exists() else sorted(folder.glob("*.tar"))
    if not tars:
        return folder
    try:
        num_bytes = sum(tar.stat().st_size for tar in tars)
    except OSError as error:  # a link to nowhere
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    _check_size(str(folder), len(tars), num_bytes, remedy(folder))
    place = folder if os.access(folder, os.W_OK) else _links(folder, tars)
    with _alone(place):
        if not (place / NAME).exists():
            _say(str(folder), len(tars), num_bytes, place)
            index_folder(place)
    return place


class Objects(NamedTuple):
    """Tars of one folder in a store, and the folder of their indexes and manifest. num_bytes: of all tars."""

    folder: str
    place: Path
    jobs: list[ObjectJob]
    num_bytes: int


def find_objects(stores: Stores, folder: str, names: Sequence[str] | None) -> Objects:
    """The tars `names` of a folder in a store; of no names given, all that the store lists. Makes their place.

    Raises `DataError` where there are none, and where the place cannot be written.
    """
    if names is not None:
        with ThreadPoolExecutor(_ASKED_AT_ONCE, "ask") as threads:
            versions = threads.map(stores.version, [f"{folder}/{name}" for name in names])
            tars = dict(zip(names, versions, strict=True))
    elif folder.startswith(("http:", "https:")):
        raise DataError(
            f"{folder}: there is no {NAME}, and an HTTP server cannot be asked which tars it has\n"
            f"  Name them by a pattern, {folder}/NAME-{{000..099}}.tar; or: {remedy(folder)}"
        )
    elif not (tars := stores.tars(folder)):
        raise DataError(f"{folder}: neither a {NAME} nor a .tar object is there\n  Check the URL.")
    place = _cached(folder, _identity(folder, tars))
    jobs = [ObjectJob(f"{folder}/{name}", v.size, place, stores.timeout_seconds) for name, v in tars.items()]
    return Objects(folder, place, jobs, sum(version.size for version in tars.values()))


def find_objects_of(source: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Objects:
    """The same for a URL of a folder or a pattern of URLs, whatever manifest is there; the tars of one folder."""
    check_source(source)
    stores = Stores(timeout_seconds)
    if not source.strip().endswith(".tar"):
        return find_objects(stores, source.rstrip("/"), None)
    paths = expand(source)
    folders = set(map(folder_of, paths))
    if len(folders) > 1 or not all(map(is_remote, paths)):
        raise DataError(f"{source}: tars of several folders; index those of each folder by themselves")
    return find_objects(stores, folders.pop(), list(map(name_of, paths)))


def copy_indexes(found: Objects, out: Path) -> None:
    """Give the indexes and the manifest of `found` to a folder of the user's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (*found.place.glob(f"*{SUFFIX}"), found.place / NAME):
            write_aside(out / file.name, file.read_bytes())
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None


def indexed_objects(stores: Stores, folder: str, names: Sequence[str] | None) -> Path:
    """The folder of indexes and manifest of tars in a store that have no manifest there; see `find_objects`."""
    found = find_objects(stores, folder, names)
    if not _whole(found):
        _check_size(folder, len(found.jobs), found.num_bytes, remedy(folder))
    index_found(found, workers=1)
    return found.place


def index_found(found: Objects, workers: int, on_shard: Callable[[str], object] = lambda _: None) -> Manifest:
    """Index what has no index yet, alone among processes, and return the manifest."""
    with _alone(found.place):
        if _whole(found):
            return read_manifest(found.place)
        _say(found.folder, len(found.jobs), found.num_bytes, found.place)
        return index_objects(found.place, found.jobs, on_shard, workers=workers)


def _whole(found: Objects) -> bool:
    names = [NAME, *(name_of(job.url) + SUFFIX for job in found.jobs)]
    return set(names) <= {file.name for file in found.place.iterdir()}


def _check_size(folder: str, count: int, num_bytes: int, advice: str) -> None:
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{folder}: there is no {NAME} beside {count:,} tars of {num_bytes / 2**30:,.1f} GiB; up to "
            f"{MAX_BYTES / 2**30:g} GiB are indexed on first contact\n  {advice}"
        )


def _say(folder: str, count: int, num_bytes: int, place: Path) -> None:
    gib = num_bytes / 2**30
    log.info("%s: no %s; indexing %d tars of %.1f GiB in %s, once", folder, NAME, count, gib, place)


def _links(folder: Path, tars: list[Path]) -> Path:
    """A folder of our own with a link to each tar; another one where any of them is another."""
    identity = hashlib.sha256(os.fsencode(folder.resolve()))
    for tar in tars:
        stat = tar.stat()
        identity.update(f"\n{tar.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    place = _cached(str(folder), identity.hexdigest())
    try:
        with _alone(place):
            for tar in tars:
                if not (place / tar.name).is_symlink():
                    (place / tar.name).symlink_to(tar.resolve())
    except OSError as error:
        raise _not_writable(str(folder), place, error) from None
    return place


def _identity(folder: str, tars: dict[str, Version]) -> str:
    identity = hashlib.sha256(folder.encode())
    for name, version in tars.items():
        identity.update(f"\n{name} {version.size} {version.etag or version.modified.isoformat()}".encode())
    return identity.hexdigest()


def _cached(folder: str, identity: str) -> Path:
    """A folder of our own for the indexes of tars that lie in `folder`."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom the system does not know, as in some containers
        raise DataError(
            f"{folder}: no {NAME}, and no home to make its index in\n"
            "  Set XDG_CACHE_HOME to a folder that all nodes see."
        ) from None
    place = root / "pretrain" / "indexes" / identity[:32]
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        (place / _LOCK).touch()
    except OSError as error:
        raise _not_writable(folder, place, error) from None
    return place


def _not_writable(folder: str, place: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: no {NAME}, and {place}, where its index would be made, cannot be written: {error.strerror}\n"
        "  Index a copy that you may write, or set XDG_CACHE_HOME to a folder that all nodes see."
    )


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_to_write(place / _LOCK))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{place}: cannot be locked while its index is made: {error.strerror}\n"
                "  Index the shards with `pretrain shards index` on a machine where that works, or set XDG_CACHE_HOME."
            ) from None
        yield
