"""`pretrain track`: what a run logged, delivered to MLflow after the fact."""

import os
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
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--from-start", is_flag=True, help="Deliver everything again; what MLflow has is not doubled.")
@click.option(
    "--timeout", default=60.0, show_default=True, help="Give up after so many seconds without success."
)
@click.option("--uri", default=None, help="Another MLflow than the run's own.")
def sync(run: Path, from_start: bool, timeout: float, uri: str | None) -> None:
    """Deliver what MLflow has not got from the run directory RUN."""
    from pretrain.tracking import progress
    from pretrain.tracking.journal import journal_path
    from pretrain.tracking.target import resolve_uri

    if not journal_path(run).is_file():
        raise TrackError(f"{run} is no run directory: it has no {journal_path(run).name}")
    target = resolve_uri(uri) if uri is not None else _own_uri(run)
    lock = progress.drain_lock(run)
    if not lock.acquire():
        raise TrackError(
            f"another process is delivering {run} right now: the run is alive, or just ended. Try later."
        )
    try:
        _deliver(run, target, from_start, timeout)
    finally:
        lock.release()


def _own_uri(run: Path) -> str:
    """The URI that the newest attempt used."""
    from pretrain.tracking import records
    from pretrain.tracking.journal import journal_path

    uri = None
    for attempt in records.read_ops(journal_path(run), "attempt"):
        uri = attempt.get("uri")
    if uri is None:
        raise TrackError(f"{run} was run without tracking.uri: say where to deliver with --uri")
    return str(uri)


def _deliver(run: Path, uri: str, from_start: bool, timeout: float) -> None:
    from tqdm import tqdm

    from pretrain.tracking import progress
    from pretrain.tracking.drain import CLIENT_ENVIRONMENT
    from pretrain.tracking.journal import journal_path
    from pretrain.tracking.target import sqlite_path

    os.environ.update(CLIENT_ENVIRONMENT)
    from pretrain.tracking.deliver import Drainer, deliver  # imports mlflow, which reads the environment

    drainer = Drainer(run, uri, from_start=from_start)
    size = journal_path(run).stat().st_size
    with tqdm(total=size, initial=drainer.note.offset, unit="B", unit_scale=True) as bar:

        def advance(offset: int) -> None:
            bar.update(offset - bar.n)

        done = deliver(drainer, lambda: True, timeout, advance)
    if not done:
        raise TrackError(
            f"{progress.count_unsent(run)} records of {run} could not be delivered to {uri}: {drainer.note.error}\n"
            "  Is the server up, and are the credentials in the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD, "
            "or _TOKEN)?"
        )
    look = f"mlflow ui --backend-store-uri {uri}" if sqlite_path(uri) else uri
    click.echo(f"{run}: everything is in MLflow. To look at it: {look}")
