"""One bounded cache of immutable pieces on a node's own disk, shared by all of its processes.

    FOLDER/usage          bytes taken, in 8 bytes; also the lock of whoever changes them
    FOLDER/ab/abcd...     a piece, by its key; modified = last used; locked shared by whoever reads it
    FOLDER/ab/abcd....new a piece that is being fetched; locked by whoever fetches it
    FOLDER/claims/...     of each living reader, locked by it: bytes that it may hold at a time, and its bound, 8 bytes each

The first process that wants a piece locks its `.new` file, fetches, and renames it; the others wait for that lock and
then find the piece. The kernel drops the locks of a process that dies, so none is ever stale, and what it left is
written anew by the next. Nothing is synced to the disk: after a power cut a piece may hold anything, and so it may
after a bad sector; the reader checks every sample of it against the index at every use, and fetches it again if it
must. Pieces that were not used for longest make room for new ones, except those that somebody reads. So that there is
always something to make room, readers of all processes and runs claim what they may hold before they read, and one whose
claim does not fit beside the others' is refused.
"""

import fcntl
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.errors import CacheInUseError, DataError
from pretrain.logs import log

IN_USE = 0.95
"""Share of the bound that all readers together may hold: blocks are of unequal size, and indexes lie there too."""
LOW_WATER = 0.9
"""Share of the bound that is left after pieces made room: one listing of the folder serves many new pieces."""
_POLL_SECONDS = 0.02
_USAGE = struct.Struct("<Q")
_CLAIM = struct.Struct("<QQ")


class Piece:
    """An open piece. It is held, and not evicted, until the last reference to it is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of it; fewer where the disk fails."""
        with suppress(OSError):
            return os.pread(self._descriptor, stop - start, start)
        return b""


class _Claim(NamedTuple):
    """A reader's: bytes that it may hold at a time; bytes that it takes the cache's bound to be."""

    held: int
    limit: int


class NodeCache:
    """Pieces by key, each a hexadecimal digest of what it is. Thread-safe, and safe between processes; close it."""

    def __init__(self, folder: Path, limit: int, patience_seconds: float, held: int = 0) -> None:
        """limit: bytes on disk; patience_seconds: how long another process may take to fetch a piece; held: bytes of
        pieces that the caller may hold at a time.

        Raises `DataError` where the folder cannot be written, or where what others hold leaves no room for that.
        """
        self._folder, self._limit, self._patience = folder, limit, patience_seconds
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "claims").mkdir(exist_ok=True)
            os.close(os.open(folder / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._claimed = self._claim(held)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {folder}: cannot be written: {error.strerror}\n"
                "  Name a folder on a disk of each node, or leave it out."
            ) from None

    def piece(self, key: str, size: int, fetch: Callable[[], bytes | bytearray]) -> Piece:
        """The piece of `size` bytes, fetched if no process on this node has it yet.

        Raises what `fetch` raises, and `DataError` where the disk is full or where nothing may make room.
        """
        path = self._path(key)
        began = time.monotonic()
        try:
            path.parent.mkdir(exist_ok=True)
            while True:
                if (piece := self._find(path, size)) is not None:
                    return piece
                with self._fetching(path) as descriptor:
                    if descriptor is not None:
                        return self._fetch(path, descriptor, size, fetch)
                if time.monotonic() - began > self._patience:
                    raise DataError(
                        f"{path}: another process has been fetching this for {self._patience:g} seconds"
                    )
                time.sleep(_POLL_SECONDS)
        except OSError as error:
            raise self._failed(error) from None

    def drop(self, key: str) -> None:
        """Forget a piece whose bytes are wrong; who has it open keeps it."""
        path = self._path(key)
        try:
            with suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                self._add(-size)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Give the claim up. Pieces that are still held stay readable."""
        Path(self._claimed.name).unlink(missing_ok=True)
        self._claimed.close()

    def _claim(self, held: int) -> BinaryIO:
        """Write down what this reader may hold: in a file, locked for as long as it is open."""
        with self._alone():
            others = self._claims()
            if limits := {other.limit for other in others} - {self._limit}:
                raise CacheInUseError(
                    f"data.cache_dir {self._folder}: others use it with a bound of {limits.pop():,} bytes, this run with "
                    f"{self._limit:,}\n  Give all of them the same data.cache_gib, or this run a folder of its own."
                )
            taken, room = sum(other.held for other in others), IN_USE * self._limit
            if taken + held > room:
                raise CacheInUseError(
                    f"data.cache_dir {self._folder}: {len(others)} others may hold {taken:,} of the {room:,.0f} bytes that it "
                    f"has for that, and {held:,} are needed here\n"
                    "  Raise data.cache_gib in all runs that share it, wait for the others, or name a folder of its own."
                )
            path = self._folder / "claims" / uuid.uuid4().hex
            file = path.open("xb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(_CLAIM.pack(held, self._limit))
            except OSError:  # a full disk
                path.unlink()
                file.close()
                raise
        return file

    def _claims(self) -> list[_Claim]:
        """Of all living readers on this node; those of dead ones, whose locks are gone, are removed."""
        found = []
        for path in (self._folder / "claims").iterdir():
            with suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    content = file.read(_CLAIM.size)
                    if len(content) == _CLAIM.size:  # else of one that is failing on a full disk
                        found.append(_Claim(*_CLAIM.unpack(content)))
        return found

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        """The file of usage, for one process and thread at a time."""
        with (self._folder / "usage").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _failed(self, error: OSError) -> DataError:
        remedy = (
            "\n  Free some room on that disk, or give a smaller data.cache_gib."
            if error.errno == ENOSPC
            else ""
        )
        return DataError(f"data.cache_dir {self._folder}: {error.strerror}{remedy}")

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def _find(self, path: Path, size: int) -> Piece | None:
        """The piece if it is there and whole, held from here on."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        piece = Piece(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        stat = os.fstat(descriptor)
        if stat.st_nlink == 0:
            return None  # evicted between the opening and the lock
        if stat.st_size != size:
            self.drop(path.name)
            return None
        os.utime(descriptor)
        return piece

    @contextmanager
    def _fetching(self, path: Path) -> Iterator[int | None]:
        """A descriptor of the `.new` file if it is ours to write; none where another is at it, or was."""
        new = path.with_name(path.name + ".new")
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            ours = _is(new, descriptor)  # another may have renamed this very file before we had the lock
            if ours and path.exists():
                new.unlink()
                ours = False
            yield descriptor if ours else None
        finally:
            os.close(descriptor)

    def _fetch(self, path: Path, descriptor: int, size: int, fetch: Callable[[], bytes | bytearray]) -> Piece:
        new = path.with_name(path.name + ".new")
        left = os.fstat(descriptor).st_size
        if left:  # by one that died; it counted
            os.ftruncate(descriptor, 0)
            self._add(-left)
        self._add(size, descriptor)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(fetch())
            new.rename(path)
        except BaseException:
            new.unlink()
            self._add(-size)
            raise
        piece = Piece(os.dup(descriptor))
        # Linux gives one lock up before it grants the other. Who evicts the piece in between takes it from those to come;
        # the descriptor keeps its bytes for us.
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return piece

    def _add(self, size: int, descriptor: int | None = None) -> None:
        """Count bytes before they are written to `descriptor`; where that passes the bound, make room first."""
        with self._alone() as file:
            usage = (_USAGE.unpack(content)[0] if len(content := file.read()) == _USAGE.size else 0) + size
            if usage > self._limit:
                usage = self._evict(max(0, round(self._limit * LOW_WATER) - size)) + size
                if usage > self._limit:
                    raise DataError(
                        f"data.cache_dir {self._folder}: full of what is being read now; {usage:,} bytes are needed at "
                        "once\n  Raise data.cache_gib."
                    )
            if descriptor is not None:
                os.ftruncate(descriptor, size)  # so that another's listing counts them too
            file.seek(0)
            file.write(_USAGE.pack(max(0, usage)))

    def _evict(self, target: int) -> int:
        """Remove what was not used for longest until `target` bytes are left, or nothing is free; returns the bytes."""
        found = []
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        usage, before = sum(size for _, size, _ in found), len(found)
        for _, size, path in sorted(found):
            if usage <= target:
                break
            usage -= size if _remove_unused(path) else 0
        log.debug("%s: %d pieces looked at, %d bytes left", self._folder, before, usage)
        return usage


def _remove_unused(path: Path) -> bool:
    """Remove a piece that nobody has open, or a `.new` file whose writer died."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, file.fileno()):
            path.unlink()
            return True
    return False


def _is(path: Path, descriptor: int) -> bool:
    """Whether the name still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
