"""`python -m MODULE ...` as the jobs of these tests start it: a training waits where a test wants to disturb it.

In the first HOLD_RESTARTS attempts each rank waits in its HOLD_STEP-th step for a signal, or takes PACE_SECONDS for every
step, or fails on BROKEN_NODE as a broken GPU does. A training waits at its end until MLflow has all of it, which beside
so many others takes more than it would wait. Everything else is the product as it is.
"""

import os
import runpy
import sys
import time

from pretrain import stop

DISTURBED = int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("HOLD_RESTARTS", "0"))
STEP = int(os.environ.get("HOLD_STEP", "0"))
PACE = float(os.environ.get("PACE_SECONDS", "0"))


class Held(stop.StopFlag):
    """Asked once in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def __bool__(self) -> bool:
        self.steps += 1
        if DISTURBED:
            time.sleep(PACE)
            if self.steps == STEP and os.environ["SLURMD_NODENAME"] == os.environ.get("BROKEN_NODE"):
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            while self.steps == STEP and self.signal is None:
                time.sleep(0.05)
        return super().__bool__()


if __name__ == "__main__":
    flag, module = sys.argv[1:3]
    assert flag == "-m"
    stop.StopFlag = Held  # type: ignore[misc]
    if module == "pretrain.train":
        from pretrain.tracking import tracker

        tracker.FILE_GRACE_SECONDS = tracker.WAIT_SECONDS = 280.0
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
