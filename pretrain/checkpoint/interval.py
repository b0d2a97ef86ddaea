"""How often to save: what a failure costs against what a save costs."""

import math

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
