"""`python -m launch.keep COMMAND...`: run a command for as long as stdin stays open, and leave nobody of it behind.

Started in a session of its own by somebody who holds the other end of stdin and nothing else: when that process is
gone, killed too hard to tidy up even, stdin ends, and this one ends all that is in the session. `end` does the same
from outside, for where this process itself was killed. Exits as the command did, 0 where it was ended.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

END_SECONDS = 10.0
LOOK_SECONDS = 0.5


def main(command: Sequence[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # stdin says when; the command gets the defaults back
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        pass
    code = process.poll()
    end(os.getsid(0))
    return 0 if code is None else code if code >= 0 else 128 - code


def end(session: int) -> None:
    """End all processes of a session and their children outside of it, but this one; they are asked first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        family = _family(session)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        deadline = time.monotonic() + END_SECONDS
        while any(map(_lives, family)) and time.monotonic() < deadline:
            time.sleep(0.05)


def _family(session: int) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for member in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(member.pid) == session:
                found |= {one.pid: one for one in (member, *member.children(recursive=True))}
    found.pop(os.getpid(), None)
    return [member for member in found.values() if _lives(member)]


def _lives(member: psutil.Process) -> bool:
    """A zombie only waits for its parent."""
    try:
        return bool(member.is_running() and member.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
