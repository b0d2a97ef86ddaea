"""Who fills batches: threads beside the training loop, threads in processes of their own, or the caller.

Threads share the interpreter with the training loop. Decoding and resizing run without its lock, the rest of a sample
does not, least of all augmentation; where that would hold the loop or the threads up, `processes` have them.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol, TypeVar

import torch

from pretrain.data.fill import Filler
from pretrain.data.order import Rows
from pretrain.data.processes import Processes, shared_out
from pretrain.data.quarantine import BadSample
from pretrain.data.reader import Reader, announced_rows
from pretrain.data.slots import Images, parts
from pretrain.draws import IntArray

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
        """End what was started, and close the reader."""


def make_workers(
    kind: Literal["threads", "processes"],
    make_filler: Callable[[Reader], Filler],
    make_reader: Callable[[], Reader],
    num_threads: int,
    image_shape: tuple[int, int, int],
    *,
    threads_a_process: int,
    remote: bool,
) -> Workers:
    """make_filler, make_reader: of a kind that can be sent to another process; with no thread the caller fills itself.
    remote: shards lie in a store, and what is held of it and read ahead is to be one reader's."""
    if num_threads == 0:
        return InCaller(make_filler, make_reader)
    if kind == "threads":
        return Threads(make_filler, make_reader, num_threads)
    shares = shared_out(num_threads, threads_a_process)
    return Processes(make_filler, make_reader, shares, image_shape, reads_here=remote)


class InCaller:
    def __init__(self, make_filler: Callable[[Reader], Filler], make_reader: Callable[[], Reader]) -> None:
        self._reader = make_reader()
        self._filler = make_filler(self._reader)

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        done: Future[list[BadSample]] = Future()
        done.set_result(self._filler.fill(rows, images, labels))
        return [done]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        return requests

    def close(self) -> None:
        self._reader.close()


class Threads:
    def __init__(
        self, make_filler: Callable[[Reader], Filler], make_reader: Callable[[], Reader], num_threads: int
    ) -> None:
        self._reader = make_reader()
        self._filler = make_filler(self._reader)
        self._threads = _single_threaded(num_threads)

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        return [
            self._threads.submit(self._filler.fill, Rows(*(array[p] for array in rows)), images[p], labels[p])
            for p in parts(len(labels))
        ]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        return announced_rows(self._reader, requests, rows_of)

    def close(self) -> None:
        self._reader.close()  # first: it ends the waits of threads that read
        self._threads.shutdown(wait=True, cancel_futures=True)


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
