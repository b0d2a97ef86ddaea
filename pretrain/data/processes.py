"""Decode threads in processes of their own, so that a training loop, or augmentation in Python, has an interpreter to itself.

    here     slot, rows                     -->    a process: fills the slot in one of its threads
             <--    slot, how it went, what `fill` returned
    only where shards lie in a store:
             <--    number, shards, samples        its thread needs these
             number, samples                -->    read here, by the one reader of this rank, and ahead of time

Pixels and labels come back in slots of memory that all of them map; row numbers, reports and the files of samples from a
store travel through pipes. Which process fills which rows does not matter to what is filled. Processes are started fresh
(nothing is forked), leave signals to their parent, and end when their pipe does or their parent. One that ends by itself
is an error of all rows that are under way and to come.
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
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from pretrain import faults
from pretrain.data.fill import Filler
from pretrain.data.order import Rows
from pretrain.data.pool import end_with_parent, held_back
from pretrain.data.quarantine import BadSample
from pretrain.data.reader import Reader, announced_rows
from pretrain.data.slots import Images, Slots, parts
from pretrain.data.tar import Sample
from pretrain.draws import IntArray
from pretrain.errors import DataError, UserError
from pretrain.world import from_environment

_LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""They reach the whole group or job step; the parent decides."""
_SECONDS_TO_END = 10.0
_SLOTS_A_THREAD = 2

R = TypeVar("R")


def shared_out(num_threads: int, threads_a_process: int) -> list[int]:
    """Threads of each process, at most so many in one, and as equal as can be."""
    processes = -(-num_threads // threads_a_process)
    return [num_threads // processes + (i < num_threads % processes) for i in range(processes)]


class _Job(NamedTuple):
    rows: Rows
    images: Images
    labels: IntArray
    done: "Future[list[BadSample]]"


@dataclass
class _Child:
    """A process as its parent knows it. asks: the pipe of its reader, if it has none of its own, which threads of ours
    answer under `answering`; free: its slots."""

    process: BaseProcess
    requests: Connection
    replies: Connection
    asks: Connection | None
    free: list[int]
    answering: threading.Lock = field(default_factory=threading.Lock)


class Processes:
    """Processes that fill, started by whoever makes this; `close` ends them."""

    def __init__(
        self,
        make_filler: Callable[[Reader], Filler],
        make_reader: Callable[[], Reader],
        threads: list[int],
        image_shape: tuple[int, int, int],
        *,
        reads_here: bool,
    ) -> None:
        """threads: of each process. reads_here: one reader in this process serves all, so that what it holds and reads
        ahead is the rank's; else each process has its own."""
        context = multiprocessing.get_context("spawn")
        slots = _SLOTS_A_THREAD * sum(threads)
        self._slots = Slots(context.RawArray("B", Slots.size(slots, image_shape)), image_shape)
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._end: DataError | RuntimeError | None = None
        self._lock = threading.Lock()
        self._closing = False
        self._reader = make_reader() if reads_here else None
        self._reading = ThreadPoolExecutor(sum(threads), "read")
        numbers = iter(range(slots))
        self._children: list[_Child] = []
        for count in threads:
            free = [next(numbers) for _ in range(_SLOTS_A_THREAD * count)]
            task = _Task(make_filler, None if reads_here else make_reader, count, self._slots)
            self._children.append(_start(context, task, free))
        self._listener = threading.Thread(target=self._listen, name="decode-replies", daemon=True)
        self._listener.start()
        atexit.register(self._end_at_exit)  # multiprocessing would wait for children that nobody has closed

    def start(self, rows: Rows, images: Images, labels: IntArray) -> list["Future[list[BadSample]]"]:
        jobs = [
            _Job(Rows(*(array[p] for array in rows)), images[p], labels[p], Future())
            for p in parts(len(labels))
        ]
        with self._lock:
            self._waiting.extend(jobs)
            self._send()
        return [job.done for job in jobs]

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        """Read ahead where the reader is here; a child hears of the rows of a step when it is to fill them."""
        return requests if self._reader is None else announced_rows(self._reader, requests, rows_of)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()  # first: it ends the waits of threads that read
        self._hang_up()
        atexit.unregister(self._end_at_exit)
        self._listener.join()
        self._reading.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.process.join()
            child.replies.close()
            if child.asks is not None:
                child.asks.close()

    def _hang_up(self) -> None:
        with self._lock:
            self._closing = True
            for child in self._children:
                child.requests.close()

    def _end_at_exit(self) -> None:
        """No thread of ours may be in the middle of a tensor while the interpreter goes: torch aborts the process."""
        self._hang_up()
        self._listener.join(_SECONDS_TO_END)
        if self._listener.is_alive():
            for child in self._children:
                child.process.kill()
            self._listener.join(_SECONDS_TO_END)

    def _send(self) -> None:
        """Give waiting jobs to the processes with most free slots; the caller holds the lock."""
        while self._waiting:
            child = max(self._children, key=lambda child: len(child.free))
            if not child.free and not self._end:
                return
            job = self._waiting.popleft()
            if not job.done.set_running_or_notify_cancel():
                continue
            if self._end:
                job.done.set_exception(self._end)
                continue
            slot = child.free.pop()
            self._running[slot] = job
            try:
                child.requests.send((slot, tuple(job.rows)))
            except OSError:  # it is gone; the listener hears of it and says why
                return

    def _listen(self) -> None:
        """In a thread: take in what the processes say until all of them are gone, or nobody would answer those who wait."""
        try:
            self._hear()
        except BaseException:
            self._fail(RuntimeError(traceback.format_exc()))
            raise

    def _hear(self) -> None:
        replies: dict[Any, _Child] = {child.replies: child for child in self._children}
        asks: dict[Any, _Child] = {child.asks: child for child in self._children if child.asks is not None}
        pipe: Any
        while replies:
            for pipe in wait([*replies, *asks]):
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    asks.pop(pipe, None)
                    if (child := replies.pop(pipe, None)) is not None:
                        self._gone(child)
                    continue
                if pipe in asks:
                    self._reading.submit(self._answer, asks[pipe], *message)
                else:
                    self._take_in(replies[pipe], *message)
        self._fail(DataError("the loader was closed"))

    def _take_in(self, child: _Child, slot: int | None, how: str, value: Any) -> None:
        if slot is None:  # it has no filler, and ends
            self._fail(_error(how, value))
            return
        job = self._running.get(slot)
        if job is not None:
            images, labels = self._slots.views(slot, len(job.labels))
            np.copyto(job.images, images)
            np.copyto(job.labels, labels)
        with self._lock:
            self._running.pop(slot, None)
            child.free.append(slot)
            self._send()
        if job is not None:
            if how == "filled":
                job.done.set_result(value)
            else:
                job.done.set_exception(_error(how, value))

    def _answer(self, child: _Child, number: int, shards: IntArray, samples: IntArray) -> None:
        """In a thread of `_reading`: what a process asked for, or why it cannot be had."""
        assert self._reader is not None
        assert child.asks is not None
        answer: object
        try:
            found = self._reader.read(shards, samples)
            answer = [(sample.key, bytes(sample.image), sample.label) for sample in found]
        except UserError as error:
            answer = error
        except Exception:
            answer = RuntimeError(traceback.format_exc())
        with child.answering, suppress(OSError):  # the process may be gone
            try:
                child.asks.send((number, answer))
            except OSError:
                raise
            except Exception:  # it cannot be sent
                child.asks.send((number, RuntimeError(traceback.format_exc())))

    def _gone(self, child: _Child) -> None:
        """A process has ended. By itself, that is the end of all: what is under way, and what is still to come."""
        child.process.join()
        if not self._closing:
            self._fail(
                DataError(
                    f"a process that decodes ended with code {child.process.exitcode}\n"
                    "  -9 is what the system does when memory runs out, -7 when /dev/shm does: use fewer\n"
                    "  data.decode_threads, or give the container more of it."
                )
            )
        with self._lock:
            child.free.clear()

    def _fail(self, error: DataError | RuntimeError) -> None:
        with self._lock:
            self._end = self._end or error
            for job in self._running.values():
                job.done.set_exception(self._end)
            self._running.clear()
            self._send()


class _Task(NamedTuple):
    """What a process is started with. make_reader: none where it asks its parent."""

    make_filler: Callable[[Reader], Filler]
    make_reader: Callable[[], Reader] | None
    threads: int
    slots: Slots


def _start(context: multiprocessing.context.SpawnContext, task: _Task, free: list[int]) -> _Child:
    """A process that waits for requests; what only it needs is closed here, so that its death reads as the end of its
    pipes."""
    requests, our_requests = context.Pipe(duplex=False)
    our_replies, replies = context.Pipe(duplex=False)
    our_asks, asks = context.Pipe() if task.make_reader is None else (None, None)
    process = context.Process(target=_serve, args=(task, requests, replies, asks), name="decode", daemon=True)
    with held_back(*_LEFT_TO_THE_PARENT):
        process.start()
    for end in (requests, replies, asks):
        if end is not None:
            end.close()
    return _Child(process, our_requests, our_replies, our_asks, free)


class _Asking:
    """A reader whose samples its parent reads. Thread-safe."""

    def __init__(self, pipe: Connection | None) -> None:
        assert pipe is not None
        self._pipe, self._lock = pipe, threading.Lock()
        self._asked: dict[int, Future[list[Sample]]] = {}
        self._count = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def read(self, shards: IntArray, samples: IntArray) -> list[Sample]:
        answer: Future[list[Sample]] = Future()
        with self._lock:
            self._count += 1
            self._asked[self._count] = answer
            self._pipe.send((self._count, shards, samples))
        return answer.result()

    def close(self) -> None:
        """The pipe ends with the process."""

    def _listen(self) -> None:
        try:
            while True:
                number, answer = self._pipe.recv()  # its end is the end of the parent, and so of this process
                asked = self._asked.pop(number)
                if isinstance(answer, Exception):
                    asked.set_exception(answer)
                else:
                    asked.set_result([Sample(key, memoryview(image), label) for key, image, label in answer])
        finally:
            os._exit(1)  # those who have asked would wait for ever; the parent hears that the process is gone


def _serve(task: _Task, requests: Connection, replies: Connection, asks: Connection | None) -> None:
    """The life of a process."""
    for number in _LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)  # for what is started from here
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if faults.VARIABLE in os.environ:
        faults.arm(os.environ, from_environment(os.environ).rank)
    lock = threading.Lock()

    def reply(slot: int | None, job: Callable[[], object]) -> None:
        try:
            how, value = "filled", job()
        except UserError as error:
            how, value = "refused", str(error)
        except Exception:
            how, value = "broken", traceback.format_exc()
        if slot is not None or how != "filled":
            with lock:
                replies.send((slot, how, value))

    def make() -> None:
        reader = _Asking(asks) if task.make_reader is None else task.make_reader()
        made.append((task.make_filler(reader), reader))

    made: list[tuple[Filler, Reader]] = []
    reply(None, make)
    for filler, reader in made:

        def fill(slot: int, rows: Rows, filler: Filler = filler) -> None:
            reply(slot, lambda: filler.fill(rows, *task.slots.views(slot, len(rows.shard))))

        with ThreadPoolExecutor(task.threads, "decode") as pool:
            try:
                while True:
                    slot, rows = requests.recv()
                    pool.submit(fill, slot, Rows(*rows))
            except EOFError:
                pool.shutdown(wait=True, cancel_futures=True)
        reader.close()


def _error(how: str, text: str) -> DataError | RuntimeError:
    """refused: the user's to mend; broken: ours."""
    return DataError(text) if how == "refused" else RuntimeError(f"in a process that decodes:\n{text}")
