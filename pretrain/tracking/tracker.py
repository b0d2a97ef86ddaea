"""What the trainer talks to: the journal of this attempt, and the process that delivers it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pretrain.config.schema import RunConfig, TrackingConfig
from pretrain.errors import RunDirError
from pretrain.lineage import code_facts
from pretrain.logs import log
from pretrain.tracking import progress, system
from pretrain.tracking.journal import Journal
from pretrain.tracking.mounts import sqlite_trouble
from pretrain.tracking.records import Status
from pretrain.tracking.target import resolve_uri, sqlite_path

SERVER_GRACE_SECONDS = 8.0
FILE_GRACE_SECONDS = 60.0
"""An embedded store answers for sure, but the first run has to create it."""

WAIT_SECONDS = 20.0
"""Most that a run waits at its end: launchers kill a process 30 s after they wanted it gone."""


class Tracker:
    """Tracking of one attempt at a run. Rank 0 only: the caller decides, other ranks make none.

    No call waits for MLflow but `finish`, and that one for seconds.
    """

    def __init__(self, run_dir: Path, journal: Journal, uri: str | None, grace: float) -> None:
        """uri: where to deliver; None: nobody does. grace: seconds that the process which does goes on after the end."""
        self._run_dir = run_dir
        self._journal = journal
        self._uri = uri
        self._grace = grace
        self._drainer = None if uri is None else _start_drainer(run_dir, uri, grace)
        self._finished = False
        self._troubled = False

    @classmethod
    def start(
        cls,
        run_dir: Path,
        tracking: TrackingConfig,
        run: RunConfig,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        from_step: int = 0,
    ) -> "Tracker":
        """Begin tracking: an attempt that goes on after step `from_step`, 0 for a new run.

        params: flat settings and plan; tags: labels such as `stage` and `init_from`. The attempt's number, the code's
        version and git state, and Slurm's job are added.
        Raises `ConfigError` for a `tracking.uri` that cannot be used and `RunDirError` where the directory cannot be
        written or is in use.
        """
        uri = None if tracking.uri is None else resolve_uri(tracking.uri)
        journal = Journal.open(
            run_dir,
            experiment=tracking.experiment,
            name=tracking.run_name or "/".join(run_dir.absolute().parts[-2:]),
            campaign=run.campaign,
            uri=uri,
            from_step=from_step,
        )
        system.forget(run_dir)
        journal.params(params)
        journal.tags({**_origin(), **tags})
        if uri is None:
            return cls(run_dir, journal, None, 0.0)
        database = sqlite_path(uri)
        trouble = None if database is None else sqlite_trouble(database)
        if trouble:
            log.warning("%s, or to null and deliver later (pretrain track sync)", trouble)
        grace = SERVER_GRACE_SECONDS if database is None else FILE_GRACE_SECONDS
        return cls(run_dir, journal, uri, grace)

    @property
    def attempt(self) -> int:
        """1 for a new run, one more at each restart."""
        return self._journal.attempt

    def go_back(self, step: int) -> None:
        """Begin another attempt in this process, after `step`; see `Journal.go_back`."""
        self._journal.go_back(step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step; see `Journal.metrics`."""
        self._journal.metrics(step, values)

    def system(self, values: Mapping[str, float], seconds: float) -> None:
        """Log figures of a machine; see `Journal.system`. Another thread may call it."""
        self._journal.system(values, seconds)

    def tags(self, values: Mapping[str, object]) -> None:
        """Set labels of the run."""
        self._journal.tags(values)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set the run reads; see `Journal.dataset`."""
        self._journal.dataset(name, digest, source, context)

    def artifact(self, path: Path) -> None:
        """Keep a small file of the run directory with the run; see `Journal.artifact`.

        One that is too large, or is no file of this directory, stays where it is with a word in the log: no report is
        worth the end of a training.
        """
        try:
            self._journal.artifact(path)
        except ValueError as error:
            log.warning("%s: it stays in %s and is not sent to MLflow", error, self._run_dir)

    def sync(self) -> None:
        """Return when everything logged is on disk, say if MLflow has been out of reach, and see that somebody delivers: a
        machine short of memory may have killed that process. Called at every checkpoint."""
        self._journal.sync()
        self._revive()
        trouble = self._trouble()
        if trouble and not self._troubled:
            log.warning("metrics are not reaching MLflow (%s); they are kept and delivered later", trouble)
        self._troubled = bool(trouble)

    def finish(self, status: Status) -> None:
        """Close the journal and give the drainer some seconds; say so if something is left undelivered. Only the
        first call counts. After a failure nobody waits: the drainer goes on by itself for a while."""
        if self._finished:
            return
        self._finished = True
        self._journal.close(status)
        self._revive()
        if self._drainer is None or status == "FAILED":
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._drainer.wait(min(self._grace + 1.0, WAIT_SECONDS))
        reason = self._trouble() or "no time left"
        if self._drainer.poll() is None:
            self._drainer.kill()
            self._drainer.wait()
        unsent = progress.count_unsent(self._run_dir)
        if unsent:
            log.warning(
                "%d records have not reached MLflow (%s). Nothing is lost; to deliver them: pretrain track sync %s",
                unsent,
                reason,
                self._run_dir,
            )

    def _revive(self) -> None:
        if self._uri is None or self._drainer is None or self._drainer.poll() is None:
            return
        log.warning(
            "the process that delivers to MLflow ended (%d), see %s; it is started again",
            self._drainer.returncode, self._run_dir / "logs" / "tracking.log",
        )  # fmt: skip
        try:
            self._drainer = _start_drainer(self._run_dir, self._uri, self._grace)
        except RunDirError as error:  # tried again with the next checkpoint
            log.warning("%s", error)

    def _trouble(self) -> str | None:
        """Why nothing is delivered at present, as far as one can see from here."""
        if self._drainer is None:
            return None
        if self._drainer.poll():
            return f"its process failed, see {self._run_dir / 'logs' / 'tracking.log'}"
        note = progress.read(self._run_dir)
        return None if note is None else note.error


def _origin() -> dict[str, str]:
    """Where this attempt comes from, as tags. `mlflow.source.*` are the names that MLflow's page shows."""
    facts = code_facts()
    tags = {**facts, "mlflow.source.name": "pretrain.train", "mlflow.source.type": "LOCAL"}
    if "git_sha" in facts:
        tags["mlflow.source.git.commit"] = facts["git_sha"]
    for tag, variable in (("slurm_job_id", "SLURM_JOB_ID"), ("slurm_restart_count", "SLURM_RESTART_COUNT")):
        if variable in os.environ:
            tags[tag] = os.environ[variable]
    return tags


def _start_drainer(run_dir: Path, uri: str, grace: float) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that a Ctrl-C for the trainer does not reach it."""
    log_path = run_dir / "logs" / "tracking.log"
    command = [sys.executable, "-m", "pretrain.tracking.drain", str(run_dir.absolute()), "--uri", uri]
    command += ["--parent", str(os.getpid()), "--grace", str(grace)]
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
    except OSError as error:
        raise RunDirError(f"cannot start the process that delivers to MLflow: {error}") from None
