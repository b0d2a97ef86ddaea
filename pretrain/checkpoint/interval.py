"""How often to save: what a failure costs against what a save costs."""

import math
import time

from pretrain.config import CheckpointConfig

SECONDS_A_DAY = 86_400.0
SHORTEST_SECONDS = 30.0
"""However cheap a save is: it writes to a file system that others use."""


def best_interval(stall_seconds: float, failures_per_day: float) -> float:
    """Seconds between two saves that lose the least time: sqrt(2 * stall * mean time between failures).

    J. W. Young 1974, "A first order approximation to the optimum checkpoint interval", equation 9; Daly 2006
    (doi 10.1016/j.future.2004.11.016) shows that more terms change nothing while a save is short against the time
    between failures. stall_seconds: what training waits for a save; failures_per_day: of the whole job.
    """
    between_failures = SECONDS_A_DAY / failures_per_day
    return max(SHORTEST_SECONDS, math.sqrt(2 * stall_seconds * between_failures))


FIRST_SECONDS = 300.0
"""Until the first save, whose cost is not known before."""


class SaveClock:
    """Says when a save is due by `checkpoint.every_minutes`; never, where that is not set. One process."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._minutes, self._failures_per_day = config.every_minutes, config.failures_per_day
        self._seconds = FIRST_SECONDS if self._minutes == "auto" else 60.0 * (self._minutes or math.inf)
        self._since = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """A save, due or not, begins."""
        self._since = time.monotonic()

    def learn(self, stall_seconds: float) -> None:
        """A save was published; training stood still for it for `stall_seconds`."""
        if self._minutes == "auto":
            self._seconds = best_interval(stall_seconds, self._failures_per_day)
