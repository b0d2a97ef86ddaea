"""MLflow's side of tracking. Used by the drainer, never by a training process.

Everything here may be done twice with the effect of once: runs are found again by a tag that we chose, points carry
their time (see `records`), parameters and tags keep their value.
"""

import contextlib
import getpass
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow.exceptions
import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from pretrain.environment import variable
from pretrain.redact import redact_text
from pretrain.tracking.locks import LockFile
from pretrain.tracking.records import Record
from pretrain.tracking.target import sqlite_path

Item = Metric | Param | RunTag

UID_TAG = "run_uid"
CAMPAIGN_TAG = "campaign_id"
MAX_DIGEST = 36  # MLflow's limit

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
HISTORY_SECONDS = 60
"""Of a request for a metric's history, which comes in pages of 25,000 points: seconds of a busy server's time."""

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
_LOST = "RESOURCE_DOES_NOT_EXIST"
_ERRORS = (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError)


class UnreachableError(Exception):
    """MLflow gave no answer, or one that may be different later: try again."""


class RefusedError(Exception):
    """MLflow will never take this: set it aside."""


class RunLostError(Exception):
    """The run is gone from the store (an older state was restored, say): everything has to be delivered again."""


class MlflowRun:
    """One run in a tracking server or an embedded sqlite file; every call raises `UnreachableError` when it should
    be repeated, `RefusedError` when that would be in vain, `RunLostError` when there is no such run any more."""

    def __init__(self, uri: str, record: Record) -> None:
        """Find the run of a journal's `run` record, below its campaign's run if any; make what is missing."""
        name, campaign, start = record["name"], record.get("campaign"), record["time"]
        self._parent: str | None = None
        self._run = ""
        with self._answering():
            self._client = _connect(uri)
            experiment = self._experiment(record["experiment"], uri)
            tags = {}
            if campaign is not None:
                digest = hashlib.sha256(campaign.encode()).hexdigest()
                self._parent = self._one_run(experiment, CAMPAIGN_TAG, digest, campaign, start, {})
                tags = {"mlflow.parentRunId": self._parent}
            self._run = self._one_run(experiment, UID_TAG, record["uid"], name, start, tags)
        self.page = f"#/experiments/{experiment}/runs/{self._run}"

    def log(self, items: Sequence[Item]) -> None:
        """Deliver a batch whole; refused where any of it is unacceptable."""
        with self._answering():
            self._client.log_batch(
                self._run,
                metrics=[item for item in items if isinstance(item, Metric)],
                params=[item for item in items if isinstance(item, Param)],
                tags=[item for item in items if isinstance(item, RunTag)],
                synchronous=True,
            )

    def newest_points(self, name: str, first: int) -> dict[int, tuple[float, int]]:
        """step -> (value, time) of a metric at step `first` and later: of several at one step the newest."""
        try:
            with self._answering(), _patience():
                history = self._client.get_metric_history(self._run, name)
        except RefusedError:  # a name that MLflow cannot have
            return {}
        points = sorted(history, key=lambda point: int(point.timestamp))
        return {point.step: (point.value, point.timestamp) for point in points if point.step >= first}

    def set_status(self, status: str, time: int) -> None:
        """Set the status of the run, and of its campaign: that of the stage that spoke last."""
        with self._answering():
            for run in filter(None, (self._run, self._parent)):
                if status == "RUNNING":
                    self._client.update_run(run, status=status)
                else:
                    self._client.set_terminated(run, status=status, end_time=time)

    def log_dataset(self, record: Record) -> None:
        """Name a data set as input of the run. MLflow holds 36 characters of the digest; a tag has the whole."""
        name, digest, source, context = (record[key] for key in ("name", "digest", "source", "context"))
        remote = source.startswith(("http://", "https://"))
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DIGEST],
            source_type="http" if remote else "local",
            source=json.dumps({"url" if remote else "uri": source}),
        )
        used = DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value=context)])
        with self._answering():
            self._client.log_inputs(self._run, datasets=[used])
        self.log([RunTag(f"dataset_digest_{context}", digest)])

    def log_artifact(self, file: Path, folder: Path) -> None:
        """Upload a file below `folder` of the run's artifacts, secrets taken out where it is text."""
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self._upload(file, folder)
            return
        with tempfile.TemporaryDirectory() as aside:
            clean = Path(aside) / file.name
            clean.write_text(redact_text(text), encoding="utf-8")
            self._upload(clean, folder)

    def _upload(self, file: Path, folder: Path) -> None:
        try:
            self._client.log_artifact(self._run, str(file), None if folder == Path() else str(folder))
        except Exception as error:  # artifact stores raise errors of many libraries
            self._check()  # MLflow itself answers, so the artifact store is at fault: the metrics do not wait for it
            raise RefusedError(_message(error)) from error

    def _experiment(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, artifact_location=_artifact_location(name, uri)))
        if found.lifecycle_stage != "active":
            raise UnreachableError(
                f"the experiment {name!r} was deleted in MLflow: restore it, or name another"
            )
        return str(found.experiment_id)

    def _one_run(
        self, experiment: str, tag: str, value: str, name: str, start: int, tags: dict[str, str]
    ) -> str:
        """Id of the oldest run that has the tag; created if there is none. A request that timed out may still have
        created one, so look again after creating, and take back what is too many."""
        runs = self._find(experiment, tag, value)
        if runs:
            return runs[0]
        tags = {tag: value, "mlflow.user": _user(), **tags}
        mine = str(self._client.create_run(experiment, start, tags, name).info.run_id)
        oldest = self._find(experiment, tag, value)[0]
        if oldest != mine:
            self._client.delete_run(mine)
        return oldest

    def _find(self, experiment: str, tag: str, value: str) -> list[str]:
        """Ids of the runs with a tag, oldest first. The value is hexadecimal: MLflow's search language has no way to
        write a quote inside a string."""
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{value}'")
        infos = sorted((run.info for run in found), key=lambda info: (info.start_time, info.run_id))
        return [str(info.run_id) for info in infos]

    def _check(self) -> None:
        """Return if MLflow has the run and would take something for it."""
        try:
            run = self._client.get_run(self._run)
        except _ERRORS as error:
            if _code(error) == _LOST:
                raise RunLostError(self._run) from error
            raise UnreachableError(_message(error)) from error
        if run.info.lifecycle_stage != "active":
            raise UnreachableError(
                f"the run {self._run} was deleted in MLflow: restore it to have the rest delivered"
            )

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Sort MLflow's errors. What was sent is at fault only if MLflow says so and the run would take anything."""
        try:
            yield
        except _ERRORS as error:
            if self._run and _code(error) in (*_REFUSALS, _LOST):
                self._check()
                if _code(error) in _REFUSALS:
                    raise RefusedError(_message(error)) from error
            raise UnreachableError(_message(error)) from error


def _patience() -> contextlib.AbstractContextManager[None]:
    """MLflow looks at the variable at each request."""
    return variable(TIMEOUT, str(max(HISTORY_SECONDS, int(os.environ.get(TIMEOUT) or 0))))


def _connect(uri: str) -> MlflowClient:
    database = sqlite_path(uri)
    if database is not None:
        _create_database(database)
    return MlflowClient(tracking_uri=uri)


def _create_database(database: Path) -> None:
    """Make a new sqlite store aside and publish it whole: many runs may start at once, and any may be killed."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with LockFile(database.with_name(database.name + ".lock")):
        if database.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        aside = database.with_name(database.name + ".new")
        aside.unlink(missing_ok=True)
        create: Any = SqlAlchemyStore  # carries no types
        create(f"sqlite:///{aside}", _artifacts(database).as_uri()).engine.dispose()
        aside.replace(database)


def _artifact_location(experiment: str, uri: str) -> str | None:
    """Beside an embedded database (MLflow's own default is the current directory); a server knows its own."""
    database = sqlite_path(uri)
    if database is None:
        return None
    folder = "".join(letter if letter.isalnum() else "_" for letter in experiment)
    return (_artifacts(database) / folder).as_uri()


def _artifacts(database: Path) -> Path:
    return database.parent / "mlartifacts"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this user in its table
        return str(os.getuid())


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))


def _message(error: Exception) -> str:
    """The first line of an error, without secrets, short enough to print."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact_text(lines[0])[:300]
