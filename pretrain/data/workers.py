"""Who fills batches: threads beside the training loop, threads in a process of their own, or the caller.

Threads share the interpreter with the training loop. Decoding and resizing run without its lock, the rest of a sample
does not; where that would hold the loop up, a child process has the threads:

    here     slot, rows                     -->    child: fills the slot in one of its threads
             <--    slot, how it went, what `fill` returned

Pixels and labels come back in slots of memory that both map; only row numbers and reports travel through the pipes. The
child is started fresh (nothing is forked), leaves signals to its parent, and ends when its pipe does or its parent.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pretrain.data.fill import Filler
from pretrain.data.order import Rows
from pretrain.data.pool import held_back
from pretrain.data.quarantine import BadSample
from pretrain.draws import IntArray
from pretrain.errors import DataError, UserError

ROWS_A_JOB = 16
"""Rows that a thread fills at a time: enough to drown the cost of handing over, few enough to share a small batch."""

_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""They reach the whole group or job step; the parent decides."""

Images = npt.NDArray[np.uint8]
R = TypeVar("R")


class Workers(Protocol):
    """What a loader asks of them."""

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        """Begin to fill images uint8 [n, H, W, C] and labels int64 [n]; they are filled when all futures are done.

        A future's result is what had to be replaced.
        """

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        """The same requests, read ahead where the reader is at hand: it is told of their rows before they are due."""

    def close(self) -> None:
        """End what was started, and close the filler."""


def make_workers(
    kind: Literal["threads", "processes"],
    make_filler: Callable[[], Filler],
    num_threads: int,
    image_shape: tuple[int, int, int],
) -> Workers:
    """make_filler: of a kind that can be sent to another process. With no thread the caller fills itself."""
    if num_threads == 0:
        return InCaller(make_filler())
    if kind == "threads":
        return Threads(make_filler(), num_threads)
    return Child(make_filler, num_threads, image_shape)


class InCaller:
    def __init__(self, filler: Filler) -> None:
        self._filler = filler

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        done: Future[list[BadSample]] = Future()
        done.set_result(self._filler.fill(rows, images, labels))
        return [done]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        return requests

    def close(self) -> None:
        self._filler.close()


class Threads:
    def __init__(self, filler: Filler, num_threads: int) -> None:
        self._filler = filler
        self._threads = _single_threaded(num_threads)

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        return [
            self._threads.submit(self._filler.fill, _part(rows, part), images[part], labels[part])
            for part in _parts(len(labels))
        ]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        return self._filler.announced(requests, rows_of)

    def close(self) -> None:
        self._filler.close()  # first: it ends the waits of threads that read
        self._threads.shutdown(wait=True, cancel_futures=True)


class _Job(NamedTuple):
    rows: Rows
    images: Images
    labels: IntArray
    done: "Future[list[BadSample]]"


class Child:
    """A process that fills, started by whoever makes this; `close` ends it."""

    def __init__(
        self, make_filler: Callable[[], Filler], num_threads: int, image_shape: tuple[int, int, int]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._slots = _Slots(context.RawArray("B", _Slots.size(2 * num_threads, image_shape)), image_shape)
        self._free = list(range(2 * num_threads))
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._end: DataError | RuntimeError | None = None
        self._lock = threading.Lock()
        child_requests, self._requests = context.Pipe(duplex=False)
        self._replies, child_replies = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve,
            args=(make_filler, num_threads, self._slots, child_requests, child_replies),
            name="decode",
            daemon=True,
        )
        with held_back(*_LEFT_TO_THE_PARENT):
            self._process.start()
        child_requests.close()  # so that its death reads as the end of the pipes
        child_replies.close()
        self._listener = threading.Thread(target=self._listen, name="decode-replies", daemon=True)
        self._listener.start()
        atexit.register(self._requests.close)  # multiprocessing would wait for a child that nobody has closed

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        jobs = [_Job(_part(rows, p), images[p], labels[p], Future()) for p in _parts(len(labels))]
        with self._lock:
            self._waiting.extend(jobs)
            self._send()
        return [job.done for job in jobs]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        """The reader is in the child, which hears of the rows of a step when it is to fill them, not before."""
        return requests

    def close(self) -> None:
        with self._lock:
            self._requests.close()
        atexit.unregister(self._requests.close)
        self._listener.join()
        self._process.join()
        self._replies.close()

    def _send(self) -> None:
        """Give waiting jobs to free slots; the caller holds the lock."""
        while self._waiting and (self._free or self._end):
            job = self._waiting.popleft()
            if not job.done.set_running_or_notify_cancel():
                continue
            if self._end:
                job.done.set_exception(self._end)
                continue
            slot = self._free.pop()
            self._running[slot] = job
            try:
                self._requests.send((slot, tuple(job.rows)))
            except OSError:  # it is gone; the listener hears of it and says why
                return

    def _listen(self) -> None:
        """In a thread: take in replies until the child is gone; then whatever is left has failed."""
        error: DataError | RuntimeError | None = None
        while True:
            try:
                slot, how, value = self._replies.recv()
            except (EOFError, OSError):
                break
            if slot is None:
                error = _error(how, value)
                continue
            job = self._running[slot]
            images, labels = self._slots.views(slot, len(job.labels))
            np.copyto(job.images, images)
            np.copyto(job.labels, labels)
            with self._lock:
                del self._running[slot]
                self._free.append(slot)
                self._send()
            if how == "filled":
                job.done.set_result(value)
            else:
                job.done.set_exception(_error(how, value))
        self._process.join()
        with self._lock:
            self._end = error or DataError(
                f"the process that decodes ended with code {self._process.exitcode}\n"
                "  -9 is what the system does when memory runs out: use fewer data.decode_threads."
            )
            for job in self._running.values():
                job.done.set_exception(self._end)
            self._running.clear()
            self._send()


class _Slots:
    """Memory of jobs, mapped by parent and child: of each the labels, then the images."""

    def __init__(self, memory: Any, image_shape: tuple[int, int, int]) -> None:
        self._memory, self._image_shape = memory, image_shape

    @staticmethod
    def size(slots: int, image_shape: tuple[int, int, int]) -> int:
        return slots * ROWS_A_JOB * (8 + -(-int(np.prod(image_shape)) // 8) * 8)

    def views(self, slot: int, count: int) -> tuple[Images, IntArray]:
        """images uint8 [count, H, W, C] and labels int64 [count] of a slot."""
        start = self.size(slot, self._image_shape)
        labels = np.frombuffer(self._memory, np.int64, count, start)
        pixels = np.frombuffer(
            self._memory, np.uint8, count * int(np.prod(self._image_shape)), start + 8 * ROWS_A_JOB
        )
        return pixels.reshape(count, *self._image_shape), labels


def _serve(
    make_filler: Callable[[], Filler],
    num_threads: int,
    slots: _Slots,
    requests: Connection,
    replies: Connection,
) -> None:
    """The life of the child."""
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)  # for what is started from here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    lock = threading.Lock()

    def reply(slot: int | None, task: Callable[[], object]) -> None:
        try:
            how, value = "filled", task()
        except UserError as error:
            how, value = "refused", str(error)
        except Exception:
            how, value = "broken", traceback.format_exc()
        if slot is not None or how != "filled":
            with lock:
                replies.send((slot, how, value))

    def fill(slot: int, rows: Rows) -> None:
        reply(slot, lambda: filler.fill(rows, *slots.views(slot, len(rows.shard))))

    fillers: list[Filler] = []
    reply(None, lambda: fillers.append(make_filler()))
    for filler in fillers:
        with ThreadPoolExecutor(num_threads, "decode") as pool:
            try:
                while True:
                    slot, rows = requests.recv()
                    pool.submit(fill, slot, Rows(*rows))
            except EOFError:
                pool.shutdown(wait=True, cancel_futures=True)
        filler.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _error(how: str, text: str) -> DataError | RuntimeError:
    """refused: the user's to mend; broken: ours."""
    return DataError(text) if how == "refused" else RuntimeError(f"in the process that decodes:\n{text}")


def _parts(count: int) -> list[slice]:
    return [slice(first, min(first + ROWS_A_JOB, count)) for first in range(0, count, ROWS_A_JOB)]


def _part(rows: Rows, part: slice) -> Rows:
    return Rows(*(array[part] for array in rows))


def _single_threaded(num_threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run torch's kernels alone: OpenMP would give each thread a team of its own.

    torch's setting holds for the thread that sets it and for those that have not asked for it yet, so all threads are
    started here and the caller's own is put back.
    """
    pool = ThreadPoolExecutor(num_threads, "decode")
    before, started = torch.get_num_threads(), threading.Barrier(num_threads)

    def limit() -> None:
        torch.get_num_threads()  # a thread's first question takes the setting of that moment
        torch.set_num_threads(1)
        started.wait()

    for job in [pool.submit(limit) for _ in range(num_threads)]:
        job.result()
    torch.set_num_threads(before)
    return pool
