"""Tars that nobody indexed, met for the first time: below a stated size they are indexed here, once, by one process.

The index and the manifest are written beside the tars, or, where that folder cannot be written, below
`$XDG_CACHE_HOME/pretrain/indexes` (by default `~/.cache`) in a folder of links to the tars, named by what it was made
of. They are those of `pretrain shards index`, and so is the sample order.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.index import remedy
from pretrain.data.manifest import NAME
from pretrain.data.scan import index_folder
from pretrain.errors import DataError
from pretrain.logs import log

MAX_BYTES = 10 * 2**30
"""Of all tars of a folder together: about a minute of reading."""
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
    if num_bytes > MAX_BYTES:
        raise DataError(
            f"{folder}: there is no {NAME} beside {len(tars):,} tars of {num_bytes / 2**30:,.1f} GiB; up to "
            f"{MAX_BYTES / 2**30:g} GiB are indexed on first contact\n  {remedy(folder)}"
        )
    place = folder if os.access(folder, os.W_OK) else _links(folder, tars)
    with _alone(place):
        if not (place / NAME).exists():
            log.info(
                "%s: no %s; indexing %d tars of %.1f GiB in %s, once",
                folder,
                NAME,
                len(tars),
                num_bytes / 2**30,
                place,
            )
            index_folder(place)
    return place


def _links(folder: Path, tars: list[Path]) -> Path:
    """A folder of our own with a link to each tar; another one where any of them is another."""
    identity = hashlib.sha256(os.fsencode(folder.resolve()))
    for tar in tars:
        stat = tar.stat()
        identity.update(f"\n{tar.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = root / "pretrain" / "indexes" / identity.hexdigest()[:32]
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(place):
            for tar in tars:
                if not (place / tar.name).is_symlink():
                    (place / tar.name).symlink_to(tar.resolve())
    except OSError as error:
        raise DataError(
            f"{folder}: no {NAME}, and neither this folder nor {place} can be written: {error.strerror}\n"
            "  Index a copy that you may write, or set XDG_CACHE_HOME to a folder that all nodes see."
        ) from None
    return place


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies."""
    with (place / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
