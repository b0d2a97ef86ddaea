"""What a hand-off did, parameter by parameter."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Action = Literal["kept", "resized", "converted", "recomputed", "reset", "zeroed", "dropped", "folded"]


class Row(NamedTuple):
    """What became of one parameter."""

    name: str
    action: Action
    detail: str


@dataclass(frozen=True)
class Transfer:
    """The target's first weights, and what was done to get them."""

    weights: Mapping[str, Tensor]
    """Lazy: every parameter of the target to its float32 tensor on the host."""

    report: tuple[Row, ...]
    """A row for every parameter of the target, then for computed positions, then one for every parameter of the
    source that has no heir."""

    def as_table(self) -> list[Row]:
        """The report for people: parameters that were kept as they are share one row at the end."""
        told = [row for row in self.report if row.action != "kept" or row.detail]
        silent = len(self.report) - len(told)
        return [*told, Row(f"{silent} parameters", "kept", "bit for bit")] if silent else told
