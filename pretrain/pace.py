"""How even the ranks are: the time that each spends on its own, before it waits for others, and who is slow.

A step lasts as long as on the slowest rank, and looks the same on all of them; what differs is the time a rank waits
for its data and computes its forward passes. The ranks exchange it with each record of the log, once the step's own
exchange is drained: no step has a collective more. At ZeRO stage 3 a forward pass gathers weights and so waits for
others too: there the spread is smaller than it is.
"""

import statistics

from pretrain.distributed import Ranks
from pretrain.logs import log
from pretrain.run_dir import node

SLOW = 1.5
"""A rank that takes so many times what the median rank takes is named in the log."""


class Pace:
    """All ranks make one and call each method together."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._nodes = ranks.gather(node())
        self._named: int | None = None

    def record(self, own_seconds: float, steps: int) -> dict[str, float]:
        """Metrics of the last `steps` steps, of which this rank spent `own_seconds` on its own; none of a single rank."""
        if self._ranks.size == 1 or steps == 0:
            return {}
        mine = [0.0] * self._ranks.size
        mine[self._ranks.rank] = own_seconds / steps
        seconds = self._ranks.sum(mine)
        median, most = statistics.median_low(seconds), max(seconds)
        slowest = seconds.index(most)
        if most > SLOW * median:
            self._name(slowest, most, median)
        return {
            "perf/rank_seconds_median": median,
            "perf/rank_seconds_max": most,
            "perf/slowest_rank": float(slowest),
        }

    def _name(self, rank: int, seconds: float, median: float) -> None:
        if self._ranks.is_main and rank != self._named:
            log.warning(
                "rank %d on %s holds the others up: %.3g s of its own in a step, the median rank %.3g s",
                rank, self._nodes[rank], seconds, median,
            )  # fmt: skip
        self._named = rank
