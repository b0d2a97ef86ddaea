"""Batches that a run passes over: which batch a step takes is the step and these windows, and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

Window = tuple[int, int]
"""Batches [start, stop) of the order."""


@dataclass(frozen=True)
class Skipped:
    """Windows that no step takes a batch of; in order, no two of them touch. Part of the data state."""

    windows: tuple[Window, ...] = ()

    @classmethod
    def of(cls, data_state: Mapping[str, Any]) -> Self:
        """What `data_state` says; a state from before there was such a thing has none."""
        return cls(tuple((start, stop) for start, stop in data_state.get("skipped", ())))

    def batch(self, step: int) -> int:
        """The batch that `step` (0 is the first) takes."""
        batch = step
        for start, stop in self.windows:
            if batch < start:
                break
            batch += stop - start
        return batch

    def before(self, batch: int) -> tuple[Window, ...]:
        """The windows that lie before a batch."""
        return tuple(window for window in self.windows if window[1] <= batch)

    def with_window(self, start: int, stop: int) -> "Skipped":
        """These and another one, which takes in those that it covers or touches."""
        apart = [window for window in self.windows if window[1] < start or window[0] > stop]
        touched = [window for window in self.windows if window not in apart]
        joined = (min([start, *(w[0] for w in touched)]), max([stop, *(w[1] for w in touched)]))
        return Skipped(tuple(sorted([*apart, joined])))


NOTHING = Skipped()
