"""What rank 0 says of an attempt: to people, in the run directory, to MLflow. Where it stands, and how it ended."""

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain import run_dir
from pretrain.checkpoint import checkpoints
from pretrain.checkpoint.layout import step_of
from pretrain.checkpoint.load import WeightsFile
from pretrain.config import Config, Plan
from pretrain.config.idle import idle_settings
from pretrain.config.resume import flatten
from pretrain.data import Dataset
from pretrain.data.quarantine import REPORT
from pretrain.errors import UserError
from pretrain.formats.native import ExportedWeights
from pretrain.logs import log
from pretrain.model import num_parameters
from pretrain.tracking import Tracker
from pretrain.tracking.records import Status
from pretrain.trainer import Outcome, Start
from pretrain.transfer import Transfer


def start_tracking(
    config: Config, plan: Plan, train: Dataset, val: Dataset | None, start: Start, directory: Path
) -> Tracker:
    """Begin the attempt's journal, with its settings, its plan and its data."""
    params = flatten(config) | {f"plan.{name}": value for name, value in plan.as_dict().items()}
    tags = {"stage": "finetune" if config.init else "pretrain", "run_dir": str(directory)}
    if config.init is not None:
        tags["init_from"] = config.init.source
    tracker = Tracker.start(
        directory, config.tracking, config.run,
        params=params | {"parameters": num_parameters(config.model)}, tags=tags, from_step=start.step,
    )  # fmt: skip
    tracker.dataset("train", train.digest, train.source, "training")
    if val is not None:
        tracker.dataset("val", val.digest, val.source, "validation")
    return tracker


def announce(plan: Plan, config: Config, start: Start) -> None:
    """Show the plan, and name settings without effect."""
    table = Table(
        "plan", f"{num_parameters(config.model):,} parameters, from step {start.step:,}", title=config.run.dir
    )
    for what, value in plan.table():
        table.add_row(what, value)
    Console(stderr=True).print(table)
    for words in idle_settings(config):
        log.warning(words)


def show_hand_off(
    source: WeightsFile | ExportedWeights, made: Transfer, directory: Path, tracker: Tracker
) -> None:
    """Say what the first weights were made of, and write it down."""
    report = made.as_table()
    table = Table("weight", "what became of it", "how", title=f"hand-off from {source.path}")
    for row in report:
        table.add_row(*row)
    Console(stderr=True).print(table)
    run_dir.write_hand_off(directory, str(source.path), source.step, source.digest, report)
    tracker.tags({"init_from_checkpoint": str(source.path), "init_from_digest": source.digest})
    tracker.artifact(Path(run_dir.HANDOFF))


def fail(directory: Path, tracker: Tracker, afterwards: ExitStack) -> None:
    """Rank 0: an error ends the run; the last checkpoint stands. What fails here too is not the error to show."""
    try:
        saved = checkpoints(directory)
        run_dir.write_status(directory, "failed", step_of(saved[-1]) if saved else 0, attempt=tracker.attempt)
        _attach(directory, tracker, REPORT)
    except (UserError, OSError) as error:
        log.warning("the end of the run could not be written down: %s", error)
    afterwards.callback(finish, tracker, "FAILED")


def finish(tracker: Tracker, status: Status) -> None:
    """How the run ended is written down by now: what fails here changes nothing in that."""
    try:
        tracker.finish(status)
    except (UserError, OSError) as error:
        log.warning("the end of the run could not be tracked: %s", error)


def _attach(directory: Path, tracker: Tracker, *names: str) -> None:
    """Keep those of these files that exist with the run."""
    for name in names:
        if (directory / name).is_file():
            tracker.artifact(Path(name))


def conclude(outcome: Outcome, directory: Path, tracker: Tracker) -> None:
    """Rank 0: say how it ended, to people and to scripts, and give MLflow the files that tell of it."""
    run_dir.write_status(
        directory,
        outcome.status,
        outcome.step,
        attempt=tracker.attempt,
        first_scores=outcome.first_scores,
        scores=outcome.scores,
        best=outcome.best,
        rollbacks=outcome.rollbacks,
    )
    _attach(directory, tracker, run_dir.CONFIG, run_dir.PLAN, run_dir.STATUS, REPORT)
    if outcome.status == "finished":
        log.info(
            "finished at step %d; next: pretrain evaluate %s, pretrain export %s",
            outcome.step,
            directory,
            directory,
        )
    else:
        log.info("stopped at step %d; the same command goes on from there", outcome.step)
