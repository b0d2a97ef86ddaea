"""Signals set a flag; the trainer looks at it between two steps.

The first SIGTERM, SIGUSR1, SIGINT or SIGHUP (a terminal that closed) asks for a checkpoint and an orderly end. After it a
batch system's further signals are ignored, and a second Ctrl-C aborts. A SIGHUP that `nohup` ignores stays so. Forked
children that inherit the handler are told apart by their process id.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopFlag:
    """Set once a signal asked this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def on_signals() -> Iterator[StopFlag]:
    """Collect stop signals into a flag while the block runs. Main thread only."""
    flag = StopFlag()
    owner = os.getpid()
    outlives_terminal = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [number for number in SIGNALS if not (number == signal.SIGHUP and outlives_terminal)]

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        flag.signal = signal.Signals(number)
        for other in heard:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_IGN)

    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
