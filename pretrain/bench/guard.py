"""Ends contenders when the benchmark is gone: they are stopped most of the time and would never notice.

`python -m pretrain.bench.guard` is a process of its own that reads process groups from its standard input, to watch or to
forget, one a line. When that ends, so has the benchmark, however: whatever is still watched is killed.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress

_SECONDS_TO_END = 10


class Guard:
    """The benchmark's end of it; `with` closes it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.bench.guard"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C and a signal to the benchmark's group are not for it
        )

    def watch(self, group: int) -> None:
        self._say(f"watch {group}")

    def forget(self, group: int) -> None:
        """Before its number can be another's: when it has ended."""
        self._say(f"forget {group}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody killed the guard: the benchmark goes on
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_SECONDS_TO_END)


def main() -> None:
    """The life of the guard."""
    watched: set[int] = set()
    for line in sys.stdin:
        word, group = line.split()
        (watched.add if word == "watch" else watched.discard)(int(group))
    for group in watched:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
