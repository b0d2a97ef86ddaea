"""A tar in a store as `walk.scan_tar` asks for it: once from front to back, in ranged reads that are ahead of the walk.

Memory: the bytes of the sample that is being walked, and `AHEAD` + 2 chunks. Nothing is written to a disk.
"""

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pretrain.data.store import Content, Stores, Version
from pretrain.errors import DataError

CHUNK = 8 * 2**20
AHEAD = 3
"""Ranged reads under way at a time, beside the one that is waited for."""


class ObjectTar:
    """`walk.Tar` of an object; `with` ends its threads."""

    def __init__(self, stores: Stores, url: str, size: int) -> None:
        """size: what the object has to have."""
        self.name, self.size = url, size
        self._stores = stores
        self._threads = ThreadPoolExecutor(AHEAD, "fetch")
        self._coming: deque[Future[Content]] = deque()
        self._asked = 0
        self._version: Version | None = None
        self._held, self._start = bytearray(), 0
        self._hash = hashlib.sha256()

    def pread(self, size: int, offset: int) -> bytes:
        assert offset >= self._start, "let go of already"
        stop = min(offset + size, self.size)
        while self._start + len(self._held) < stop:
            self._take()
        return bytes(memoryview(self._held)[offset - self._start : max(stop - self._start, 0)])

    def let_go(self, before: int) -> None:
        unused = min(before - 1 - self._start, len(self._held))  # `tarfile` looks at the byte before a header
        if unused >= CHUNK:  # moving what is left for every sample would cost more than reading it
            del self._held[:unused]
            self._start += unused

    def sha256(self) -> str:
        while self._start + len(self._held) < self.size:
            self._start, self._held = self._start + len(self._held), bytearray()
            self._take()
        return self._hash.hexdigest()

    def _take(self) -> None:
        """Wait for the next chunk, and ask for those behind it."""
        if self._version is None:
            first = self._stores.read(self.name, 0, min(CHUNK, self.size))
            self._version, self._asked = first.version, len(first.data)
            if first.version.size != self.size:
                raise DataError(f"{self.name}: {first.version.size:,} bytes, and {self.size:,} a moment ago")
            self._append(first.data)
        else:
            self._ask()
            self._append(self._coming.popleft().result().data)
        self._ask()

    def _ask(self) -> None:
        while len(self._coming) < AHEAD and self._asked < self.size:
            stop = min(self._asked + CHUNK, self.size)
            self._coming.append(
                self._threads.submit(self._stores.read, self.name, self._asked, stop, self._version)
            )
            self._asked = stop

    def _append(self, chunk: bytearray) -> None:
        self._hash.update(chunk)
        self._held += chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stores.close()  # reads under way are not waited for: nobody wants them now
        self._threads.shutdown(wait=True, cancel_futures=True)
