"""Batches that a run has passed over: which batch a step takes, and what had come before.

A run that goes back (`recovery`) passes over batches from the very one that its next step would have taken. So from there on each
step takes a batch that is later by one number, and of what came before the checkpoint's counts are enough: no list of
windows is kept, and the data state does not grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Skipped:
    """What a run that begins at `step` (0 is the first) has to know of the way there. Part of the data state.

    batches: that no step took; given: samples of each source that came, none for none at all; distinct: see
    `state.distinct_seen`.
    """

    batches: int = 0
    step: int = 0
    given: tuple[int, ...] = ()
    distinct: int = 0

    @classmethod
    def of(cls, data_state: Mapping[str, Any]) -> Self:
        """What `data_state` says."""
        return cls(
            data_state["skipped"],
            data_state["samples_seen"] // data_state["global_batch"],
            tuple(data_state["sources"].values()),
            data_state["distinct"],
        )

    def batch(self, step: int) -> int:
        """The batch that a step takes, this run's first or a later one."""
        return step + self.batches

    def up_to(self, batch: int) -> "Skipped":
        """The same with more passed over: the first step takes `batch`."""
        return replace(self, batches=batch - self.step)


NOTHING = Skipped()
