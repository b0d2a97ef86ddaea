"""`pretrain track`: what a run logged, delivered to MLflow after the fact."""

import os
import signal
from pathlib import Path

import click

from pretrain.errors import UserError


class TrackError(UserError):
    """A journal could not be delivered."""

    exit_code = 7


@click.group()
def track() -> None:
    """Deliver what a run logged to MLflow."""


@track.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--from-start", is_flag=True, help="Deliver everything again; what MLflow has is not doubled.")
@click.option(
    "--timeout", default=60.0, show_default=True, help="Give up after so many seconds without success."
)
@click.option("--uri", default=None, help="Another MLflow than the run's own.")
@click.option(
    "--watch",
    "watches",
    is_flag=True,
    help="Go on until Ctrl-C, for living runs too; RUN may be a folder of runs.",
)
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=15.0,
    show_default=True,
    help="With --watch: seconds between two rounds.",
)
def sync(
    runs: tuple[Path, ...], from_start: bool, timeout: float, uri: str | None, watches: bool, every: float
) -> None:
    """Deliver what MLflow has not got from the run directories RUN.

    With --watch: for runs on nodes that have no route to MLflow, from one that has.
    """
    from pretrain.tracking.journal import journal_path
    from pretrain.tracking.target import resolve_uri

    target = None if uri is None else resolve_uri(uri)
    if watches:
        if from_start:
            raise TrackError("--from-start is for one delivery: leave --watch away")
        _watch(runs, target, every)
        return
    for run in runs:
        if not journal_path(run).is_file():
            raise TrackError(f"{run} is no run directory: it has no {journal_path(run).name}")
        deliver(run, target or own_uri(run), from_start, timeout)


def _watch(places: tuple[Path, ...], uri: str | None, every: float) -> None:
    from pretrain import logs
    from pretrain.tracking.drain import CLIENT_ENVIRONMENT

    for place in places:
        if not place.is_dir():
            raise TrackError(f"{place} is no folder: give run directories, or a folder that runs are in")
    logs.to_stderr()
    if uri is not None:
        _warn_of_place(uri)
    os.environ.update(CLIENT_ENVIRONMENT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from pretrain.tracking.watch import Watch  # imports mlflow, which reads the environment

        logs.log.info("watching %s, every %g s, until Ctrl-C", ", ".join(map(str, places)), every)
        Watch(places, lambda run: uri or own_uri(run)).follow(every)
    except KeyboardInterrupt:
        logs.log.info("stopped; what is not delivered stays in the journals")


def _warn_of_place(uri: str) -> None:
    from pretrain.tracking.mounts import sqlite_trouble
    from pretrain.tracking.target import sqlite_path

    database = sqlite_path(uri)
    trouble = None if database is None else sqlite_trouble(database)
    if trouble:
        click.echo(f"Warning: {trouble}", err=True)


def own_uri(run: Path) -> str:
    """The URI that the newest attempt used."""
    from pretrain.tracking import records
    from pretrain.tracking.journal import journal_path
    from pretrain.tracking.target import resolve_uri

    uri = None
    for attempt in records.read_ops(journal_path(run), "attempt"):
        uri = attempt.get("uri")
    if uri is None:
        raise TrackError(f"{run} was run without tracking.uri: say where to deliver with --uri")
    return resolve_uri(uri)


def deliver(run: Path, uri: str, from_start: bool, timeout: float) -> None:
    """Deliver what is left of one run; raises `TrackError` where that fails within `timeout` seconds."""
    from tqdm import tqdm

    from pretrain.tracking import progress
    from pretrain.tracking.drain import CLIENT_ENVIRONMENT
    from pretrain.tracking.journal import journal_path
    from pretrain.tracking.target import sqlite_path

    _warn_of_place(uri)
    os.environ.update(CLIENT_ENVIRONMENT)
    from pretrain.tracking import deliver as delivery  # imports mlflow, which reads the environment

    drainer = delivery.Drainer(run, uri, from_start=from_start)
    size = journal_path(run).stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True) as bar:

        def advance(offset: int) -> None:
            bar.update(offset - bar.n)

        done = delivery.deliver(drainer, lambda: True, timeout, advance)
    if not done and drainer.error is None:
        raise TrackError(
            f"another process is delivering {run} right now: the run is alive, or just ended. Try later."
        )
    if not done:
        raise TrackError(
            f"{progress.count_unsent(run)} records of {run} could not be delivered to {uri}: {drainer.error}\n"
            "  Is the server up, and are the credentials in the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD, "
            "or _TOKEN)?"
        )
    look = f"mlflow ui --backend-store-uri {uri}" if sqlite_path(uri) else uri
    click.echo(f"{run}: everything is in MLflow. To look at it: {look}")
