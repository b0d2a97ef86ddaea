"""The hand-off of the rows that prefix tokens have in a position table.

Such a row is no place on the grid: it follows its token, whatever happens to the grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model import learned_table
from pretrain.transfer.report import Row

TOKENS = ("cls_token", "reg_token")
"""Prefix tokens by the parameters that hold them, in their order."""


class Folded(NamedTuple):
    """Rows of the source's table that are added to their token for good. name: as the report calls them."""

    name: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class PrefixRows:
    """The rules. An owner is a block's prefix in the names of parameters, `blocks.i.`, or empty: the model's own."""

    source: Mapping[str, Tensor]
    old: ModelConfig
    new: ModelConfig

    def taken_over(self, ancestor: str | None) -> Tensor:
        """The target's rows [1, p, D], by tokens: those of the source's table at `ancestor`, and zeros for new ones."""
        rows = []
        for token in TOKENS:
            first, last = _span(token, self.new)
            row = torch.zeros(1, last - first, self.new.width)
            if ancestor is not None and self.old.num_pos_prefix:
                start, stop = _span(token, self.old)
                row[:, : stop - start] = self._table(ancestor)[:, start:stop][:, : last - first]
            rows.append(row)
        return torch.cat(rows, dim=1)

    def folded(self, token: str) -> Folded | None:
        """The source's rows of a token that the target has no row for; none where there is nothing to fold.

        At the stem a row is added to nothing but its token: it can be added once and for all.
        """
        start, stop = _span(token, self.old)
        at_stem = self.old.num_pos_prefix and self.old.pos_embed_at == "stem"
        inherited = self.new.num_pos_prefix and self.new.pos_embed_at in ("stem", "every_layer")
        if not at_stem or inherited or start == stop:
            return None
        return Folded(_name("", token, 0, self.old), lambda: self._table("")[:, start:stop])

    def report(self, ancestor: str, owner: str | None) -> list[Row]:
        """Rows that do not simply stay. owner: of the target's table; none: the target has no table for them."""
        rows = []
        for token in TOKENS:
            had = _length(token, self.old) if self.old.num_pos_prefix else 0
            has = _length(token, self.new) if self.new.num_pos_prefix and owner is not None else 0
            lost = _name(ancestor, token, 0, self.old)
            if has > had:
                gained = _name(owner or "", token, had, self.new)
                rows.append(
                    Row(gained, "zeroed", f"new: the source has no position for {_called(token, has - had)}")
                )
            elif had and not has and not _length(token, self.new):
                rows.append(Row(lost, "dropped", f"there is no {_called(token, 1)}"))
            elif had and not has and self.folded(token):
                rows.append(Row(lost, "folded", f"into {token}"))
            elif had and not has:
                rows.append(
                    Row(lost, "dropped", f"{self.new.pos_embed} has no position for {_called(token, had)}")
                )
        return rows

    def _table(self, owner: str) -> Tensor:
        return learned_table(lambda leaf: self.source[owner + leaf].float(), self.old)


def _span(token: str, config: ModelConfig) -> tuple[int, int]:
    """First and past-the-last row of a token among the prefix rows."""
    cls = int(config.has_cls_token)
    return (0, cls) if token == "cls_token" else (cls, config.num_prefix_tokens)


def _length(token: str, config: ModelConfig) -> int:
    first, last = _span(token, config)
    return last - first


def _name(owner: str, token: str, skipped: int, config: ModelConfig) -> str:
    """A token's rows of a table, but for the first `skipped`, as the report calls them."""
    first, last = _span(token, config)
    leaf = "pos_embed" if config.pos_embed == "learned_1d" else "pos_embed_prefix"
    return f"{owner}{leaf}[{first if token == 'cls_token' else f'{first + skipped}:{last}'}]"


def _called(token: str, count: int) -> str:
    return "cls token" if token == "cls_token" else f"{count} register{'s' * (count > 1)}"
