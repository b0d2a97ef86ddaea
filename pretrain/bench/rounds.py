"""Contenders as processes that take turns: everybody else is stopped while one has its round.

The process of a contender is `python -m pretrain.bench.rounds NAME SETTING`: it pins itself, warms up, and then, for each
line that it is sent, works through the images of a round and answers with what that took. One that dies or does not
answer in time is named and left out; none outlives the benchmark (`guard`).
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, NamedTuple

import click
import psutil

from pretrain.bench.contenders import CONTENDERS, Feed, Setting, feed
from pretrain.bench.guard import Guard

_SECONDS_TO_END = 10


class Measured(NamedTuple):
    """One round of one contender. cpu, wall: seconds; cpu is that of all of its processes and threads."""

    images: int
    cpu: float
    wall: float
    parts: dict[str, float]

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of an image."""
        return self.cpu / self.images * 1e3

    @property
    def images_per_second(self) -> float:
        return self.images / self.wall


def interleaved(
    names: list[str], setting: Setting, rounds: int, seconds: float = 300
) -> dict[str, list[Measured]]:
    """Rounds by contender, all equally many; one that fails is named on stderr and left out.

    seconds: that a turn may take, the first with all that has to be imported and opened.
    """
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    with ExitStack() as stack:
        guard = stack.enter_context(Guard())
        processes = {name: stack.enter_context(_Process(name, setting, guard)) for name in names}
        for turn in range(-1, rounds):  # the first is to warm up
            running = list(processes)
            start = turn % max(1, len(running))
            for name in running[start:] + running[:start]:
                try:
                    found = processes[name].take_turn(seconds)
                except (OSError, ValueError) as error:
                    click.echo(f"{name} did not run: {processes[name].what_ended(error)}", err=True)
                    processes.pop(name).close()
                    del measured[name]
                    continue
                if turn >= 0:
                    measured[name].append(found)
    return measured


class _Process:
    """A contender, stopped but for its turns."""

    def __init__(self, name: str, setting: Setting, guard: Guard) -> None:
        self._guard = guard
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.bench.rounds", name, json.dumps(asdict(setting))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # a group of its own, to stop it with its workers
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        guard.watch(self._process.pid)

    def take_turn(self, seconds: float) -> Measured:
        """Raises `OSError` or `ValueError` where the contender failed, `TimeoutError` where it did not answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError(
                f"no answer within {seconds:g} s; a slow machine, or a large --images, needs a larger --timeout"
            )
        answer = Measured(*json.loads(self._process.stdout.readline()))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return answer

    def what_ended(self, error: Exception) -> str:
        """For people: that it did not answer, the signal that killed it, or its last words."""
        if isinstance(error, TimeoutError):
            return str(error)
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_SECONDS_TO_END)
            if code < 0:
                return f"killed by {signal.Signals(-code).name} (SIGKILL is what the system does when memory runs out)"
        return self._last_words()

    def _last_words(self) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().strip().rpartition("\nTraceback")[2].splitlines()
        errors = [number for number, line in enumerate(said) if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return "\n".join(said[errors[-1] :] if errors else said[-1:]) or "it said nothing"

    def close(self) -> None:
        with suppress(ProcessLookupError):  # what its leader has started may outlive it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate(timeout=_SECONDS_TO_END)
        self._guard.forget(self._process.pid)
        self._stderr.close()

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stderr.closed:
            self.close()


def main(name: str, setting: Setting) -> None:
    """The life of a contender's process; in the child."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes with its errors
    cores = sorted(os.sched_getaffinity(0))[: setting.cores * CONTENDERS[name].times]
    os.sched_setaffinity(0, cores)
    mine = feed(name, setting)
    for _ in sys.stdin:
        answers.write(json.dumps(_round(mine, setting.images)) + "\n")
        answers.flush()


def _round(mine: Feed, images: int) -> Measured:
    done, parts = 0, dict[str, float]()
    cpu, began = _cpu_seconds(), time.perf_counter()
    while done < images:
        work = next(mine)
        done += work.images
        for name, seconds in work.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
    return Measured(done, _cpu_seconds() - cpu, time.perf_counter() - began, parts)


def _cpu_seconds() -> float:
    """Of this process and all below it."""
    children: list[Any] = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[2])
    main(sys.argv[1], Setting(**given | {"paths": tuple(given["paths"])}))
