"""Advisory locks (flock) that the kernel drops when their holder dies, so that none is ever stale."""

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain.logs import log

POLL_SECONDS = 0.1


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False where somebody else holds it.

    A file system without locks counts as success, and says so: there one careful user is the only guard.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("this file system has no file locks (%s): start one process per run directory", error)
    return True


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of the file at `path`."""
    with path.open("rb") as file:
        return not try_lock(file.fileno(), shared=True)


class LockFile:
    """A lock of its own file, held from `acquire` to `release`; also a context that waits for it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def acquire(self) -> bool:
        """Try once."""
        return try_lock(self._descriptor)

    def fileno(self) -> int:
        """For a child that is to hold the lock too: it is free when the last of them has let go."""
        return self._descriptor

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        while not self.acquire():
            time.sleep(POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
