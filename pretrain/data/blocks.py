"""I/O blocks by key: fetched once, ahead of their use where they were announced, and kept up to a bound.

State: the blocks that are held or under way, in the order of their last use. A block that is asked for and was not
announced is fetched by the caller, so nobody waits behind what is only wanted later.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pretrain.errors import DataError

K = TypeVar("K", bound=Hashable)
B = TypeVar("B")


@dataclass
class _Entry(Generic[B]):
    """size: what the block takes of the bound. used: whether anybody asked for it yet."""

    size: int
    used: bool
    block: "Future[B]" = field(default_factory=Future)


class Blocks(Generic[K, B]):
    """Thread-safe; `close` ends its threads."""

    def __init__(self, fetch: Callable[[K], B], size: Callable[[K], int], limit: int, threads: int) -> None:
        """fetch: called for each block that is not held, by several threads; limit: in the unit of `size`."""
        self._fetch, self._size, self._limit = fetch, size, limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[K, _Entry[B]] = OrderedDict()
        self._threads = ThreadPoolExecutor(threads, "fetch")
        self._closed = False
        self.taken = 0
        self.ahead = 0
        """Sizes of all blocks held or under way, and of those among them that nobody has asked for yet."""

    def announce(self, key: K) -> None:
        """Begin to fetch a block that will be asked for. A failure here is nobody's: who asks for it tries again."""
        with self._lock:
            if key in self._entries:
                return
            entry = self._add(key, used=False)
        job = self._threads.submit(self._fill, key, entry)
        job.add_done_callback(lambda job: self._abandon(entry) if job.cancelled() else None)

    def get(self, key: K) -> B:
        """The block; raises what its fetch raised, and `DataError` once this is closed."""
        with self._lock:
            if self._closed:
                raise _closed()
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._add(key, used=True)
            elif not entry.used:
                entry.used = True
                self.ahead -= entry.size
            self._entries.move_to_end(key)
        if mine:
            self._fill(key, entry)
        return entry.block.result()

    def begin(self) -> None:
        """What was announced and not asked for is no longer expected: another walk through the order begins."""
        with self._lock:
            self.ahead = 0
            for entry in self._entries.values():
                entry.used = True

    def missing(self, keys: Iterable[K]) -> int:
        """Sizes of those blocks that are neither held nor under way."""
        with self._lock:
            return sum(self._size(key) for key in keys if key not in self._entries)

    def drop(self, key: K) -> None:
        """Forget a block: the next who asks for it fetches it anew."""
        with self._lock:
            self._remove(key)

    def close(self) -> None:
        """Returns at once. Fetches under way end by themselves; who waits for one that has not begun gets an error."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            self._entries.clear()

    def _fill(self, key: K, entry: _Entry[B]) -> None:
        try:
            entry.block.set_result(self._fetch(key))
        except BaseException as error:
            with self._lock:
                if self._entries.get(key) is entry:
                    self._remove(key)
            entry.block.set_exception(error)

    def _abandon(self, entry: _Entry[B]) -> None:
        entry.block.set_exception(_closed())

    def _add(self, key: K, *, used: bool) -> _Entry[B]:
        """Enter a block, and let go of others where there are too many."""
        entry: _Entry[B] = _Entry(self._size(key), used)
        self._entries[key] = entry
        self.taken += entry.size
        self.ahead += 0 if used else entry.size
        while self.taken > self._limit and (oldest := self._oldest(key)) is not None:
            self._remove(oldest)
        return entry

    def _oldest(self, newest: K) -> K | None:
        """The block to let go of: used ones before those that are still to be, none that is under way."""
        for used in (True, False):
            for key, entry in self._entries.items():
                if entry.used == used and key != newest and entry.block.done():
                    return key
        return None

    def _remove(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.taken -= entry.size
            self.ahead -= 0 if entry.used else entry.size


def _closed() -> DataError:
    return DataError("not read, because the reader was closed")
