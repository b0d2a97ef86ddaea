"""One attempt at a run, as a process that a test may kill: attempt.py RUN_DIR URI FROM_STEP TO_STEP SCALE.

Logs steps FROM_STEP + 1 to TO_STEP, prints "done", and finishes when its standard input ends.
"""

import sys
from pathlib import Path

from pretrain.config import RunConfig, TrackingConfig
from pretrain.tracking import Tracker
from pretrain.tracking import tracker as tracking


def main(run_dir: str, uri: str, from_step: str, to_step: str, scale: str) -> None:
    tracking.SERVER_GRACE_SECONDS = tracking.WAIT_SECONDS = (
        280.0  # a busy machine takes long to import mlflow
    )
    tracker = Tracker.start(
        Path(run_dir),
        TrackingConfig(uri=uri),
        RunConfig(dir=run_dir),
        params={"lr": 0.1},
        tags={},
        from_step=int(from_step),
    )
    for step in range(int(from_step) + 1, int(to_step) + 1):
        value = step if step % 2 else float(scale) * step  # even steps differ where SCALE does
        tracker.metrics(step, {"train/loss": value, "perf/images_per_second": 100.0 * tracker.attempt})
    print("done", flush=True)
    sys.stdin.read()
    tracker.finish("FINISHED")


if __name__ == "__main__":
    main(*sys.argv[1:])
