"""Jobs in worker processes: started fresh, so that nobody's threads or torch are forked, and gone when we are gone.

    here    job -->              worker: task(job, advance)
            <-- _ADVANCED n      now and then
            <-- _RETURNED value, _REFUSED error or _BROKEN error

A worker imports the module of its task, and nothing else of ours: keep those free of torch. What stops it: its pipe
ends (no job is left, or we stopped listening), or its parent is dead, whatever it is doing just then.
"""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from pretrain.errors import DataError, UserError

Advance = Callable[[int], object]
"""Told how many more images, shards or whatever the task counts are done."""

Job = TypeVar("Job")
Value = TypeVar("Value")

_ADVANCED, _RETURNED, _REFUSED, _BROKEN = range(4)
_SECONDS_BETWEEN_WORDS = 0.2
_IMAGES_OF_A_WORKER = 500
_BYTES_OF_A_WORKER = 32 * 2**20


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What became of job `number`: `result()` gives its value, or raises the `UserError` or `OSError` it ended with."""

    number: int
    value: Value | None
    error: UserError | OSError | None = None

    def result(self) -> Value:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # a task that returns None has Value None


def worth_starting(cores: int, images: int, num_bytes: int) -> int:
    """Workers for that much work: each takes a fifth of a second to start, so a small set is done here."""
    return min(cores, max(1, images // _IMAGES_OF_A_WORKER, num_bytes // _BYTES_OF_A_WORKER))


def run(
    task: Callable[[Job, Advance], Value],
    jobs: Sequence[Job],
    workers: int,
    advance: Advance = lambda _: None,
) -> Iterator[Outcome[Value]]:
    """Outcomes in the order in which jobs end. One worker, or one job: all of it in this process.

    task: a function of a module, with jobs and values that travel between processes. Closing the iterator stops what
    is still running. Raises `DataError` where a worker dies, and whatever a task raised that is neither a `UserError`
    nor an `OSError`.
    """
    workers = min(workers, len(jobs))
    if workers > 1:
        yield from _in_processes(task, jobs, workers, advance)
        return
    for number, job in enumerate(jobs):
        try:
            yield Outcome(number, task(job, advance))
        except (UserError, OSError) as error:
            yield Outcome(number, None, error)


@dataclass
class _Worker:
    """here: our end of its pipe; number: the job that it has."""

    process: BaseProcess
    here: Connection
    number: int = -1

    def give(self, number: int, job: object) -> None:
        self.number = number
        self.here.send(job)


def _in_processes(
    task: Callable[[Job, Advance], Value], jobs: Sequence[Job], workers: int, advance: Advance
) -> Iterator[Outcome[Value]]:
    waiting = enumerate(jobs)
    crew: list[_Worker] = []
    try:
        while len(crew) < workers:
            crew.append(_start(task))
        busy = {worker.here: worker for worker in crew}
        for worker, (number, job) in zip(crew, islice(waiting, workers), strict=True):
            _talk(worker, jobs, worker.give, number, job)
        while busy:
            for ready in wait(list(busy)):
                worker = busy[ready]  # type: ignore[index]  # `wait` returns what it was given
                kind, value = _talk(worker, jobs, worker.here.recv)
                if kind == _ADVANCED:
                    advance(value)
                    continue
                if kind == _BROKEN:
                    raise value
                number = worker.number
                following = next(waiting, None)
                if following is None:
                    del busy[worker.here]
                else:
                    _talk(worker, jobs, worker.give, *following)
                yield Outcome(number, *((value,) if kind == _RETURNED else (None, value)))
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()
            worker.here.close()


def _start(task: Callable[[Job, Advance], Value]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(task, there), daemon=True)
    with held_back(signal.SIGINT):
        process.start()
    there.close()  # so that its death reads as the end of the pipe
    return _Worker(process, here)


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Signals wait while the block runs, and for ever in the processes that it starts: they are deaf from birth.

    A child that ignores them by itself does so only after its imports; here a signal in between would end it.
    """
    resource_tracker.ensure_running()  # started with the first process it would let SIGINT and SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _talk(worker: _Worker, jobs: Sequence[Job], say: Callable[..., Any], *words: object) -> Any:
    try:
        return say(*words)
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise DataError(
            f"a worker process {how} at job {worker.number + 1} of {len(jobs)} ({jobs[worker.number]!s:.200})\n"
            "  SIGKILL is what the system does when memory runs out: try fewer --workers."
        ) from None


@dataclass
class _Words:
    """Counts what a worker has done and says it a few times a second."""

    pipe: Connection
    count: int = 0
    said: float = field(default_factory=time.monotonic)

    def advance(self, count: int) -> None:
        self.count += count
        if time.monotonic() - self.said > _SECONDS_BETWEEN_WORDS:
            self.say()

    def say(self) -> None:
        if self.count:
            self.pipe.send((_ADVANCED, self.count))
        self.count, self.said = 0, time.monotonic()


def _serve(task: Callable[[Any, Advance], object], pipe: Connection) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    words = _Words(pipe)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            kind, value = _RETURNED, task(job, words.advance)
        except (UserError, OSError) as error:
            kind, value = _REFUSED, error
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            kind, value = _BROKEN, error
        words.say()
        pipe.send((kind, value))


def end_with_parent() -> None:
    """In a thread of a worker: end it at once when its parent is dead, whatever it is doing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
