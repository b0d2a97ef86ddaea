"""The drainer: `python -m pretrain.tracking.drain RUN_DIR --uri URI --parent PID`, started by rank 0's `Tracker`.

It reads the journal, delivers what it finds to MLflow and notes in `RUN/tracking/delivered.json` how far it came.
Delivered at least once by this process and kept at most once by MLflow (see `records`): exactly once. It retries
for as long as the training lives, ends soon after the journal is closed or the training process is gone, and may be
killed at any instruction. `pretrain track sync` does the same in the foreground.
"""

import os
import signal
from pathlib import Path

import click

from pretrain import command, logs
from pretrain.tracking import records
from pretrain.tracking.journal import journal_path

CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the retries are ours
    "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "5"),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
"""What mlflow has to find in the environment before it is imported."""


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--uri", required=True)
@click.option("--parent", type=int, required=True, help="Process whose end is the end of the training.")
@click.option("--grace", type=float, required=True, help="Seconds to go on after the end of the training.")
def main(run_dir: Path, uri: str, parent: int, grace: float) -> None:
    """Deliver the journal of RUN_DIR beside a training process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they mean the trainer, which may still have something to say
    os.nice(5)
    logs.all_to_stderr()

    def ends() -> bool:
        return os.getppid() != parent or _is_closed(journal_path(run_dir))

    os.environ.update(CLIENT_ENVIRONMENT)
    from pretrain.tracking.deliver import Drainer, deliver  # mlflow: takes seconds

    deliver(Drainer(run_dir, uri), ends, grace)


def _is_closed(path: Path) -> bool:
    last = records.last_record(path)
    return last is not None and last["op"] == "status"


if __name__ == "__main__":
    command.run(main, "python -m pretrain.tracking.drain")
