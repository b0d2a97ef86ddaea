"""What a hand-off did, parameter by parameter."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Action = Literal["kept", "resized", "converted", "recomputed", "reset", "zeroed", "dropped", "folded"]

_BLOCK = re.compile(r"\bblocks\.\d+\.")


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
        """The report for people: what happened to the same parameter of several blocks shares a row that counts them,
        and parameters that were kept as they are share one at the end."""
        told = [row for row in self.report if row.action != "kept" or row.detail]
        silent = len(self.report) - len(told)
        alike: dict[Row, list[Row]] = {}
        for row in told:
            key = Row(_BLOCK.sub("blocks.*.", row.name), row.action, _BLOCK.sub("blocks.*.", row.detail))
            alike.setdefault(key, []).append(row)
        table = [
            key._replace(name=f"{key.name} ({len(rows)})") if len(rows) > 1 else rows[0]
            for key, rows in alike.items()
        ]
        return [*table, Row(f"{silent} parameters", "kept", "bit for bit")] if silent else table
