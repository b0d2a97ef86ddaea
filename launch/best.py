"""`python -m launch.best SWEEP`: which member of a sweep is the best one, by top-1 on its validation set.

Runs as a job when all members have ended, and by hand as often as one likes. Writes SWEEP/best.json and labels the
member's run in MLflow `best: true`, through its journal: what MLflow misses is delivered later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from launch import sweep as sweeps
from pretrain import command, run_dir
from pretrain.config import load
from pretrain.documents import number, read_object, whole, write_object
from pretrain.errors import RunDirError, UserError
from pretrain.tracking.journal import journal_path, label

TAG = "best"
DELIVERY_SECONDS = 60.0
MAX_HAND_OFF_BYTES = 2**26


class SweepError(UserError):
    """The members of a sweep cannot be compared."""


@dataclass(frozen=True)
class Result:
    """How a member stands. top1, step: of the checkpoint `which`; None where it is not finished."""

    run: str
    values: Mapping[str, str]
    status: str
    top1: float | None = None
    step: int | None = None
    which: Literal["best", "last"] = "best"


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
def best(sweep: Path) -> None:
    """Mark the best of the finished members of SWEEP, in SWEEP/best.json and in MLflow."""
    results = [_result(sweep, name, values) for name, values in sweeps.read(sweep)]
    found = choose(results)
    _check_one_start(sweep, [result.run for result in results if result.top1 is not None])
    before = sweeps.read_best(sweep)
    facts = asdict(found) | {"members": [asdict(result) for result in results]}
    write_object(sweep / sweeps.BEST, facts)
    _show(results, found)
    if before is not None and before.run != found.run and journal_path(sweep / before.run).is_file():
        _tag(sweep / before.run, "false")
    _tag(sweep / found.run, "true")
    click.echo(f"Next: pretrain export {sweep / found.run} --which {found.which}")


def choose(results: Sequence[Result]) -> Result:
    """The finished member with the highest top-1, the first of equals; `SweepError` where none is finished."""
    finished = [result for result in results if result.top1 is not None]
    if not finished:
        states = ", ".join(f"{result.run}: {result.status}" for result in results)
        raise SweepError(
            f"no member of the sweep is finished ({states}): see their logs, then submit it again"
        )
    return max(finished, key=lambda result: result.top1 or 0.0)


def _result(sweep: Path, name: str, values: Mapping[str, str]) -> Result:
    run = sweep / name
    try:
        status = run_dir.read_status(run)
    except RunDirError:
        return Result(name, values, "unreadable" if (run / run_dir.STATUS).exists() else "not begun")
    if status["status"] != "finished":
        return Result(name, values, str(status["status"]))
    which: Literal["best", "last"] = "best" if load(run / run_dir.CONFIG).checkpoint.keep_best else "last"
    match status.get("best" if which == "best" else "scores"):
        case {"val/top1": top1, "step": step} if number(top1) is not None and whole(step) is not None:
            return Result(name, values, "finished", top1, step, which)
    return Result(name, values, "finished without a score")


def _check_one_start(sweep: Path, names: Sequence[str]) -> None:
    """Members that name the same weights to start from must have taken the same checkpoint of them."""
    taken: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        init = load(sweep / name / run_dir.CONFIG).init
        if init is None:
            continue
        try:
            digest = str(read_object(sweep / name / run_dir.HANDOFF, MAX_HAND_OFF_BYTES).get("sha256"))
        except (OSError, ValueError) as error:
            click.echo(f"Note: what {name} started from is not known: {run_dir.HANDOFF}: {error}", err=True)
            continue
        taken.setdefault((init.source, init.which), {}).setdefault(digest, name)
    for (source, _), starts in taken.items():
        if len(starts) > 1:
            raise SweepError(
                f"{' and '.join(starts.values())} started from different checkpoints of {source}, which was not finished "
                "when they began: they cannot be compared. Submit the sweep with another run.dir, and with --after-init"
            )


def _tag(run: Path, value: str) -> None:
    """Label the run, and tell MLflow now if it is there."""
    from pretrain.track import TrackError, deliver, own_uri

    label(run, {TAG: value})
    try:
        deliver(run, own_uri(run), from_start=False, timeout=DELIVERY_SECONDS)
    except TrackError as error:
        click.echo(f"Note: {error}", err=True)


def _show(results: Sequence[Result], found: Result) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", *(escape(key) for key in found.values), "status", "step", "top-1", "")
    for result in results:
        table.add_row(
            escape(result.run),
            *(escape(value) for value in result.values.values()),
            result.status,
            "-" if result.step is None else f"{result.step:,}",
            "-" if result.top1 is None else f"{result.top1:.4f}",
            "best" if result is found else "",
        )
    Console().print(table)


if __name__ == "__main__":
    command.run(best, "python -m launch.best")
