"""Signs of life: what a rank that makes none for too long leaves behind.

    beat             at the start, every step, save and batch of an evaluation
    stacks           no beat for `DUMP_SHARE` of engine.timeout_seconds: where each thread stands goes to logs/rank_N.log, and
                     again after each further such time; ranks that wait for a hung one do so too, so that its log, or its
                     missing word, tells which it is
    the end          the timeout of the collective that waits, on every rank that does (see `pretrain.distributed`)
    heartbeat.json   rank 0: the step and the time of the last beat, at most every `HEARTBEAT_SECONDS`

The stacks are written by a thread of the interpreter's that needs none of its locks: also where a C library hangs.
"""

import faulthandler
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pretrain.run_dir import write_heartbeat

DUMP_SHARE = 0.8
HEARTBEAT_SECONDS = 10.0


class Watchdog:
    """Of one rank, around all that it does together with others. `beat` is called by the main thread."""

    def __init__(self, run_dir: Path, log_file: Path, timeout_seconds: float, *, is_main: bool) -> None:
        self._run_dir = run_dir if is_main else None
        self._file = log_file.open("a")
        self._seconds = DUMP_SHARE * timeout_seconds
        self._written = -HEARTBEAT_SECONDS

    def beat(self, step: int) -> None:
        """All is well after `step` updates."""
        self._wait_for_the_next()
        now = time.monotonic()
        if self._run_dir is not None and now - self._written >= HEARTBEAT_SECONDS:
            self._written = now
            write_heartbeat(self._run_dir, step)

    def _wait_for_the_next(self) -> None:
        # again and again: a start that is merely slow must not use up what a hang behind it needs
        faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def __enter__(self) -> Self:
        self._wait_for_the_next()  # the first collectives hang more often than any other
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
