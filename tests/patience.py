"""Waiting on a machine that may be slow and busy: for what has to come, however late, and for ever only until it is a hang."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE = 280
"""Seconds, where somebody might wait for ever; a test of a timeout has its own."""


def wait_until(holds: Callable[[], object], what: str = "it is true", seconds: float = PATIENCE) -> None:
    """Poll `holds()`; the deadline is for a test that would fail anyway. what: for its message."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"after {seconds} s it is still not so that {what}"
        time.sleep(0.1)


def let_runs_deliver(setattr: Callable[[object, str, object], object] = setattr) -> None:
    """From here on a run waits at its end until MLflow has all of it, which beside a busy machine takes more than a run
    would wait. setattr: by which it is so."""
    from pretrain.tracking import tracker

    for name in ("SERVER_GRACE_SECONDS", "FILE_GRACE_SECONDS", "WAIT_SECONDS"):
        setattr(tracker, name, float(PATIENCE))


def deliver_the_rest(folder: Path) -> None:
    """What the runs below a folder had no time to deliver at their end."""
    from pretrain.track import own_uri
    from pretrain.tracking import progress

    runs = [journal.parent for journal in folder.rglob("metrics.jsonl")]
    if any(map(progress.count_unsent, runs)):
        from pretrain.tracking.watch import Watch  # imports mlflow

        assert Watch(runs, own_uri).round() == 0


def lives(process: psutil.Process) -> bool:
    """Not so a zombie, which a slow process 1 has not looked at yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
