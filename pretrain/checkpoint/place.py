"""Where a mirror lies: a prefix in an S3-compatible store or Google Cloud Storage, or a folder of another file system.

One client, obstore, for all of them. An object appears whole or not at all. What fails in a way that another attempt may
mend is tried a few times, then it is a `MirrorError` that names the object and nothing of the store's own words.
"""

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pretrain.data.store import connect, pause_after, reason_of
from pretrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ATTEMPTS = 4
TIMEOUT_SECONDS = 120.0
"""Of one request: a piece of a file up or down, a small object, a page of names."""
PIECE = 16 * 2**20
MOST_PIECES = 9_000
"""Of one upload; S3 takes 10,000."""

_REFUSED = re.compile(r"status 4(?!08|25|29)")

T = TypeVar("T")


class MirrorError(CheckpointError):
    """The mirror cannot be reached, refuses, or does not hold what it should."""


class Place:
    """Objects below a mirror's URL. Thread-safe; `close` ends what waits to be tried again."""

    def __init__(self, url: str, run_dir: Path) -> None:
        """url: as `checkpoint.mirror` allows it. Raises `MirrorError` where no client can be made."""
        self.url = url.rstrip("/")
        self._closed = threading.Event()
        scheme, _, rest = self.url.rpartition("://")
        try:
            if scheme in ("s3", "gs"):
                bucket, _, self._prefix = rest.partition("/")
                self._client = connect(scheme, bucket, TIMEOUT_SECONDS)
            else:
                self._prefix = ""
                self._client = _folder(rest, run_dir)
        except ConfigError:
            raise
        except Exception as error:  # credentials that are not there, a folder that cannot be made
            raise MirrorError(
                f"{self.url}: no connection can be set up ({reason_of(error)})\n"
                "  Check checkpoint.mirror and the credentials in the environment; docs/stores.md names them."
            ) from None

    def put_file(self, path: Path, key: str) -> None:
        import obstore

        size = path.stat().st_size
        piece = max(PIECE, size // MOST_PIECES)
        self._try(
            key, lambda: obstore.put(self._client, self._full(key), path, chunk_size=piece, max_concurrency=4)
        )

    def put(self, content: bytes, key: str) -> None:
        import obstore

        self._try(key, lambda: obstore.put(self._client, self._full(key), content))

    def read(self, key: str, limit: int) -> bytes | None:
        """A small object; None where there is none. Raises `MirrorError` where it is larger than `limit`."""
        import obstore

        size = self.size(key)
        if not size:
            return None if size is None else b""
        if size > limit:
            raise MirrorError(f"{self.url}/{key}: {size:,} bytes; at most {limit:,} are read")
        return self._try(
            key, lambda: bytes(obstore.get_range(self._client, self._full(key), start=0, end=size))
        )

    def fetch(self, key: str, path: Path, size: int) -> str:
        """An object of `size` bytes into a new file, by ranges, on the disk when this returns; its sha256."""
        import obstore

        found = self.size(key)
        if found != size:
            raise MirrorError(
                f"{self.url}/{key}: {'is missing' if found is None else f'{found:,} bytes, not {size:,}'}"
            )
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, size, PIECE):
                stop = min(start + PIECE, size)
                piece = self._try(key, lambda a=start, b=stop: obstore.get_range(  # type: ignore[misc]
                    self._client, self._full(key), start=a, end=b
                ))  # fmt: skip
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        import obstore

        def asked() -> int | None:
            try:
                return obstore.head(self._client, self._full(key))["size"]
            except FileNotFoundError:
                return None

        return self._try(key, asked)

    def listed(self) -> list[str]:
        """All objects below the URL, as keys."""
        import obstore

        def found() -> list[str]:
            pages = obstore.list(self._client, self._prefix or None)
            return [meta["path"] for page in pages for meta in page]

        skip = len(self._prefix) + 1 if self._prefix else 0
        return sorted(path[skip:] for path in self._try("", found))

    def delete(self, key: str) -> None:
        """Let there be no such object."""
        import obstore

        def deleted() -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._client, self._full(key))

        self._try(key, deleted)

    def close(self) -> None:
        self._closed.set()

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _try(self, key: str, ask: Callable[[], T]) -> T:
        from obstore import exceptions

        where = f"{self.url}/{key}".rstrip("/")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
                raise MirrorError(
                    f"{where}: access is refused ({reason_of(error)})\n"
                    "  Give credentials in the environment; docs/stores.md says how for each kind of store."
                ) from None
            except FileNotFoundError as error:
                raise MirrorError(f"{where}: there is no such object or file ({reason_of(error)})") from None
            except (exceptions.BaseError, OSError) as error:
                reason = reason_of(error)
                if attempt == ATTEMPTS or self._closed.is_set() or _REFUSED.match(reason):
                    raise MirrorError(f"{where}: {reason}, {attempt} attempts") from None
            self._closed.wait(pause_after(attempt, where))
        raise AssertionError


def _folder(path: str, run_dir: Path) -> "ObjectStore":
    from obstore.store import LocalStore

    folder = Path(path).resolve()
    if folder == run_dir.resolve() or run_dir.resolve() in folder.parents:
        raise ConfigError(
            f"checkpoint.mirror={path} lies in the run directory {run_dir} and would be lost with it; "
            "name a folder of another file system, or a bucket"
        )
    return LocalStore(folder, mkdir=True)
