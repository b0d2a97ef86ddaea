"""The hand-off of position embeddings (PE): which kind can become which, and how each table moves to another grid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.model import (
    initial_value,
    learned_table,
    resize_axis,
    resize_pos_embed,
    resize_relative,
    sincos_2d,
    table_shapes,
)
from pretrain.transfer.prefix import PrefixRows
from pretrain.transfer.report import Row

_LEAVES = ("pos_embed", "pos_embed_x", "pos_embed_y", "pos_embed_prefix", "rel_pos")
_SINCOS = ("sincos_2d_mae", "sincos_2d_big_vision")


def is_position(name: str) -> bool:
    """Whether a parameter is (part of) a position table."""
    return name.rpartition(".")[2] in _LEAVES


def converts(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether the target's kind can say what the source's says: the same kind, or any row for any patch."""
    exact = new.pos_embed == "learned_1d" and old.pos_embed in ("learned_2d", *_SINCOS)
    return old.pos_embed == new.pos_embed or exact


def stays_in_place(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether positions can act where the target has them: a table of every block can hold what all share, or zero."""
    return new.pos_embed_at in (old.pos_embed_at, "every_layer")


@dataclass(frozen=True)
class Positions:
    """The rules, by table. Arguments as of `transfer`, already found to fit."""

    source: Mapping[str, Tensor]
    old: ModelConfig
    new: ModelConfig
    init: InitConfig
    seed: int

    @property
    def prefix(self) -> PrefixRows:
        return PrefixRows(self.source, self.old, self.new)

    def heir(self, name: str, shape: tuple[int, ...]) -> tuple[Callable[[], Tensor], list[Row]]:
        """How the target's table `name` comes about, and the rows that say so."""
        owner, leaf = _split(name)
        ancestor = self._ancestor(owner)
        follows = [] if ancestor is None else self.prefix.report(ancestor, owner)
        if leaf == "pos_embed_prefix":
            kept = ancestor is not None and self.old.num_pos_prefix
            row = Row(name, "kept", "") if kept else Row(name, "zeroed", "the source has no such rows")
            return lambda: self.prefix.taken_over(ancestor), [row, *follows]
        rows = [self._row(name, ancestor), *(follows if leaf == "pos_embed" else [])]
        if leaf == "pos_embed" and self.new.num_pos_prefix:
            return lambda: self._with_prefix(name, shape, ancestor), rows
        return lambda: self._table(name, shape, ancestor), rows

    def computed(self) -> list[Row]:
        """The row of a kind without weights, where its table is another than the source's."""
        kind, reference = self.new.pos_embed, self.new.rope_reference_grid
        if kind != "rope_2d" and kind not in _SINCOS:
            return []
        if kind != self.old.pos_embed:
            return [Row("positions", "recomputed", f"{self.old.pos_embed} -> {kind}, {_by(self.new.grid)}")]
        if (self.old.grid, self.old.rope_reference_grid) == (self.new.grid, reference):
            return []
        stretched = f", coordinates of {_by(reference)}" if reference and kind == "rope_2d" else ""
        return [Row("positions", "recomputed", f"{self._grids} {kind}{stretched}")]

    def fate(self, name: str) -> list[Row]:
        """What is to be said of a source's table whose name the target does not have."""
        owner, leaf = _split(name)
        has_heir = owner in {self._ancestor(o) for o in _owners(self.new)}
        told_by_heir = has_heir and (self.new.pos_embed == "learned_1d" or self.new.num_pos_prefix > 0)
        rows = []
        if leaf in ("pos_embed", "pos_embed_prefix") and not told_by_heir:
            rows = self.prefix.report(owner, None)
        if leaf == "pos_embed_prefix" or (has_heir and self.init.position == "resize"):
            return rows  # its numbers are in a table of another name
        where = (
            f"{self.old.pos_embed} {self.old.pos_embed_at} -> {self.new.pos_embed} {self.new.pos_embed_at}"
        )
        return [Row(name, "dropped", f"{where}, init.position: {self.init.position}"), *rows]

    def _ancestor(self, owner: str) -> str | None:
        """Owner of the source's table that becomes the table of the target's `owner`; none: it starts from zero."""
        if self.old.pos_embed_at == self.new.pos_embed_at:
            return owner
        if self.old.pos_embed_at == "every_layer_shared" or owner == "blocks.0.":
            return ""
        return None

    def _with_prefix(self, name: str, shape: tuple[int, ...], ancestor: str | None) -> Tensor:
        """The target's table `name` of that shape, rows for prefix tokens first."""
        rows = self.prefix.taken_over(ancestor)
        return torch.cat([rows, self._table(name, shape, ancestor)[:, -self.new.num_patches :]], dim=1)

    def _table(self, name: str, shape: tuple[int, ...], ancestor: str | None) -> Tensor:
        """The target's table `name` of that shape; of the source's rows only those of patches are there."""
        if self.init.position == "reset":
            return initial_value(name, shape, self.new, self.seed)
        if self.init.position == "drop" or ancestor is None:
            return torch.zeros(shape)
        return self._moved(ancestor, _split(name)[1])

    def _moved(self, ancestor: str, leaf: str) -> Tensor:
        """The source's table without its prefix rows, on the target's grid."""
        old, new, kernel = self.old, self.new, self.init.resize_kernel
        if old.pos_embed in _SINCOS:
            return sincos_2d(new.model_copy(update={"pos_embed": old.pos_embed}), torch.device("cpu"))
        if leaf in ("pos_embed_x", "pos_embed_y"):
            length = new.grid[1] if leaf == "pos_embed_x" else new.grid[0]
            return resize_axis(self.source[ancestor + leaf].float(), length, kernel)
        table = learned_table(lambda leaf: self.source[ancestor + leaf].float(), old)
        if leaf == "rel_pos":
            return resize_relative(table, old.grid, new.grid, kernel)
        return resize_pos_embed(table[:, old.num_pos_prefix :], old.grid, new.grid, 0, kernel)

    def _row(self, name: str, ancestor: str | None) -> Row:
        old, new = self.old, self.new
        if self.init.position == "reset":
            return Row(name, "reset", f"{_by(new.grid)} drawn anew")
        if self.init.position == "drop":
            return Row(name, "zeroed", f"{_by(new.grid)}, init.position: drop")
        if ancestor is None:
            return Row(name, "zeroed", "the source adds positions at the stem alone")
        if old.pos_embed in _SINCOS:
            return Row(name, "converted", f"{old.pos_embed} computed for {_by(new.grid)}")
        owner, leaf = _split(name)
        details = [f"{self._grids} {self.init.resize_kernel}"] if old.grid != new.grid else []
        if old.pos_embed != new.pos_embed:
            return Row(name, "converted", ", ".join([f"from {old.pos_embed}", *details]))
        action: Literal["resized", "kept"] = "resized" if details else "kept"
        return Row(name, action, ", ".join(details + [f"was {ancestor}{leaf}"] * (ancestor != owner)))

    @property
    def _grids(self) -> str:
        return f"{_by(self.old.grid)} -> {_by(self.new.grid)}"


def _split(name: str) -> tuple[str, str]:
    """A table's owner, with its dot, and its own name."""
    owner, dot, leaf = name.rpartition(".")
    return owner + dot, leaf


def _owners(config: ModelConfig) -> list[str]:
    """Who has a table of its own."""
    if not table_shapes(config):
        return []
    if config.pos_embed_at == "every_layer":
        return [f"blocks.{i}." for i in range(config.num_blocks)]
    return [""]


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
