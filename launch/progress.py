"""How far the stages of a chain are, from what their runs leave on disk and from Slurm.

A file that cannot be read, or a value in it that is none, is what nobody knows yet.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import queue, snapshot
from launch.job import folder_of
from pretrain import run_dir
from pretrain.documents import number, read_object, whole
from pretrain.errors import RunDirError
from pretrain.tracking import progress as delivery
from pretrain.tracking import records
from pretrain.tracking.journal import journal_path

LONG_SILENCE_SECONDS = 120.0
TAIL_BYTES = 2**18
"""The end of a journal that is searched for the last loss and speed."""

UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Stage:
    """One line of the table; None is what nobody knows yet. eta_seconds: of training that is left, without waits.

    silent_seconds: since the last sign of life of a run that says that it is running.
    """

    run: str
    kind: str
    job: str
    state: str
    status: str | None
    step: int | None = None
    total_steps: int | None = None
    eta_seconds: float | None = None
    images_per_second: float | None = None
    loss: float | None = None
    silent_seconds: float | None = None
    mlflow: str | None = None

    @property
    def says(self) -> str:
        """What the run says of itself, and for how long it has said nothing where that is long."""
        if self.silent_seconds is None or self.silent_seconds < LONG_SILENCE_SECONDS:
            return self.status or "-"
        return f"{self.status}, silent for {duration(self.silent_seconds)}"


def chain_of(run: Path) -> list[Path]:
    """The folders of the jobs that a run was submitted with, in order; raises `RunDirError` where it was not."""
    for kind in ("train", "export", "sweep"):
        found = snapshot.read(folder_of(run, kind))
        if found is not None:
            return [Path(folder) for folder in found.chain]
    raise RunDirError(
        f"{run} was not submitted to Slurm by python -m launch.slurm: it has no slurm/*/job.json of its own"
    )


def stage_of(folder: Path) -> Stage | None:
    """How the job of a folder stands; None where the folder is gone or was never submitted."""
    job = snapshot.read(folder)
    if job is None:
        return None
    run, kind = folder.parents[1], folder.name
    state = queue.state(job.number)
    if kind != "train":
        return Stage(str(run), kind, job.number, state, None)
    status: Mapping[str, Any] = {}
    if (run / run_dir.STATUS).exists():
        try:
            status = run_dir.read_status(run)
        except RunDirError:
            status = {"status": UNREADABLE, "step": 0}
    last = _last_metrics(run)
    total = _total_steps(run)
    step = max(status["step"], whole(last.get("step")) or 0) if status else None
    values = {name: number(value) for name, value in last.get("values", {}).items()}
    seconds = values.get("perf/step_seconds")
    eta = None
    if seconds is not None and total is not None and step is not None and status["status"] != "finished":
        eta = number(seconds * max(0, total - step))
    return Stage(
        run=str(run),
        kind=kind,
        job=job.number,
        state=state,
        status=status.get("status"),
        step=step,
        total_steps=total,
        eta_seconds=eta,
        images_per_second=values.get("perf/images_per_second"),
        loss=values.get("train/loss"),
        silent_seconds=_silent_seconds(run) if status.get("status") == "running" else None,
        mlflow=_link(run),
    )


def _silent_seconds(run: Path) -> float | None:
    beat = run_dir.read_heartbeat(run)
    return None if beat is None else max(0.0, time.time() - float(beat["time"]))


def duration(seconds: float) -> str:
    """Such as `3d 04:05` or `12:05`, hours and minutes."""
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    return f"{f'{days}d ' if days else ''}{hours:02d}:{minutes % 60:02d}"


def _last_metrics(run: Path) -> Mapping[str, Any]:
    """The newest record of training in the journal."""
    path = journal_path(run)
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        record = records.decode(line)
        if record is not None and "train/loss" in record.get("values", {}):
            return record
    return {}


def _total_steps(run: Path) -> int | None:
    try:
        return whole(read_object(run / run_dir.PLAN).get("total_steps"))
    except (OSError, ValueError):
        return None


def _link(run: Path) -> str | None:
    """Where MLflow shows the run: its page, or the store where the page is not known yet."""
    note = delivery.read(run)
    if note is None or not note.uri.isprintable():
        return None
    page = delivery.read_page(run)
    if page is not None and note.uri.startswith("http"):
        return f"{note.uri}/{page}"
    return f"{note.uri} {page}" if page is not None else note.uri
