"""The hand-off: one stage's weights made into the first weights of the next (section 3.2 of the ViT paper).

A pure function over weights and configs. What may differ between the two: the image size and with it the grid, the
classes, the order of cls token and position embedding (PE), and the pooling where the target needs no parameter that
the source lacks. Everything else stops the hand-off, with all reasons at once, before any weight is made.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.errors import CheckpointError
from pretrain.model import LazyWeights, initial_value, parameter_shapes, resize_pos_embed

Action = Literal["kept", "resized", "reset", "zeroed", "dropped", "folded"]
Recipe = Callable[[], Tensor]

_CLS_ROW = "pos_embed[0]"
_MUST_AGREE = (
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_dim",
    "patch_size",
    "in_chans",
    "pos_embed",
    "act",
    "norm_eps",
)
_POOLS = {"token": ("token", "avg"), "avg": ("avg",), "map": ("map", "avg")}
"""Pooling of the source, and what the target may use in its place: nothing that would have to be invented."""


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
    """A row for every parameter of the target, then one for every parameter of the source that has no heir."""

    def as_table(self) -> list[Row]:
        """The report for people: parameters that were kept as they are share one row at the end."""
        told = [row for row in self.report if row.action != "kept" or row.detail]
        silent = len(self.report) - len(told)
        return [*told, Row(f"{silent} parameters", "kept", "bit for bit")] if silent else told


def transfer(
    source: Mapping[str, Tensor],
    source_config: ModelConfig,
    target: ModelConfig,
    init: InitConfig,
    seed: int,
) -> Transfer:
    """Make the target's weights from `source`, float32 by timm's names, as `source_config` describes them.

    `seed` is the target run's, for what `init.position: reset` draws. Reads every source tensor once to check it,
    and again when its heir is asked for. Raises `CheckpointError` with everything that does not fit.
    """
    problems = [
        *_differing_settings(source_config, target, init),
        *_unexpected_weights(source, source_config),
    ]
    if problems:
        raise CheckpointError(
            "the weights named by init.from do not fit this model; nothing was loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )
    hand_off = _HandOff(source, source_config, target, init, seed)
    recipes: dict[str, Recipe] = {}
    report: list[Row] = []
    for name, shape in parameter_shapes(target).items():
        recipes[name], rows = hand_off.heir(name, shape)
        report += rows
    return Transfer(LazyWeights(recipes), (*report, *hand_off.without_heir()))


@dataclass(frozen=True)
class _HandOff:
    """The rules, by parameter. Arguments as of `transfer`, already found to fit."""

    source: Mapping[str, Tensor]
    old: ModelConfig
    new: ModelConfig
    init: InitConfig
    seed: int

    def heir(self, name: str, shape: tuple[int, ...]) -> tuple[Recipe, list[Row]]:
        """How the target's parameter `name` comes about, and the rows that say so."""
        if name.startswith("head.") and not self._keeps_head:
            return lambda: torch.zeros(shape), [Row(name, "zeroed", self._why_new_head)]
        if name == "cls_token" and self._folds_cls_row:
            return self._folded_cls_token, [Row(name, "folded", f"{_CLS_ROW} of the source added")]
        if name == "pos_embed":
            return lambda: self._position(shape), [self._position_row(), *self._cls_row_rows()]
        if name.startswith("fc_norm.") and self.old.global_pool != "avg":
            ancestor = name.removeprefix("fc_")
            return lambda: self._read(ancestor), [Row(name, "kept", f"was {ancestor}")]
        return lambda: self._read(name), [Row(name, "kept", "")]

    def without_heir(self) -> list[Row]:
        """Rows for the source's parameters that the target's pooling has no use for."""
        if self.old.global_pool == self.new.global_pool:
            return []
        detail = f"{self.new.global_pool} pooling does not use it"
        gone = [name for name in self.source if name == "cls_token" or name.startswith("attn_pool.")]
        return [Row(name, "dropped", detail) for name in gone]

    def _read(self, name: str) -> Tensor:
        return self.source[name].float()

    @property
    def _keeps_head(self) -> bool:
        same = self.old.num_classes == self.new.num_classes and self.old.global_pool == self.new.global_pool
        return self.init.head == "keep" or (self.init.head == "auto" and same)

    @property
    def _why_new_head(self) -> str:
        if self.init.head == "zero":
            return "init.head: zero"
        if self.old.num_classes != self.new.num_classes:
            return f"{self.old.num_classes} -> {self.new.num_classes} classes"
        return f"{self.old.global_pool} -> {self.new.global_pool} pooling"

    @property
    def _folds_cls_row(self) -> bool:
        """PE[0] is added to nothing but the cls token: it can be added once and for all."""
        both_read_cls = self.old.num_prefix_tokens and self.new.num_prefix_tokens
        return bool(both_read_cls) and self.old.num_pos_prefix > self.new.num_pos_prefix

    def _folded_cls_token(self) -> Tensor:
        return self._read("cls_token") + self._read("pos_embed")[:, :1]

    def _position(self, shape: tuple[int, ...]) -> Tensor:
        """The target's table: the cls token's row, which is no place on the grid, and the grid's rows."""
        table = self._read("pos_embed")
        old_prefix, new_prefix = self.old.num_pos_prefix, self.new.num_pos_prefix
        if self.init.position == "reset":
            grid = initial_value("pos_embed", shape, self.new, self.seed)[:, new_prefix:]
        elif self.init.position == "drop":
            grid = torch.zeros(shape)[:, new_prefix:]
        else:
            rows = table[:, old_prefix:]
            grid = resize_pos_embed(rows, self.old.grid, self.new.grid, 0, self.init.resize_kernel)
        if not new_prefix:
            return grid
        cls_row = table[:, :1] if old_prefix else torch.zeros_like(grid[:, :1])
        return torch.cat([cls_row, grid], dim=1)

    def _position_row(self) -> Row:
        old, new = ("x".join(map(str, config.grid)) for config in (self.old, self.new))
        if self.init.position == "reset":
            return Row("pos_embed", "reset", f"{new} drawn anew")
        if self.init.position == "drop":
            return Row("pos_embed", "zeroed", f"{new}, init.position: drop")
        if self.old.grid == self.new.grid:
            return Row("pos_embed", "kept", "")
        return Row("pos_embed", "resized", f"{old} -> {new} {self.init.resize_kernel}")

    def _cls_row_rows(self) -> list[Row]:
        """A row for the table's row of the cls token, where it does not simply stay."""
        if self._folds_cls_row:
            return [Row(_CLS_ROW, "folded", "into cls_token")]
        if self.old.num_pos_prefix > self.new.num_pos_prefix:
            return [Row(_CLS_ROW, "dropped", "there is no cls token")]
        if self.old.num_pos_prefix < self.new.num_pos_prefix:
            return [Row(_CLS_ROW, "zeroed", "new: the source's cls token has no position")]
        return []


def _differing_settings(old: ModelConfig, new: ModelConfig, init: InitConfig) -> list[str]:
    problems = [
        f"model.{name}: the source has {getattr(old, name)}, this config {getattr(new, name)}"
        for name in _MUST_AGREE
        if getattr(old, name) != getattr(new, name)
    ]
    for name in ("mean", "std"):
        before, now = (tuple(getattr(config, name)) for config in (old, new))
        if before * (old.in_chans // len(before)) != now * (new.in_chans // len(now)):
            problems.append(f"model.{name}: the source has {list(before)}, this config {list(now)}")
    if new.global_pool not in _POOLS[old.global_pool]:
        problems.append(
            f"model.global_pool: {new.global_pool} needs weights that a source with {old.global_pool} lacks; "
            f"possible: {', '.join(_POOLS[old.global_pool])}"
        )
    if init.head == "keep" and old.num_classes != new.num_classes:
        problems.append(
            f"init.head: keep, but the source has {old.num_classes} classes and this config {new.num_classes}; "
            "use auto or zero"
        )
    return problems


def _unexpected_weights(source: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Names, shapes and numbers that are not what the source's own config says."""
    expected = parameter_shapes(config)
    problems = []
    if missing := [name for name in expected if name not in source]:
        problems.append(f"missing in the source: {_listed(missing)}")
    if extra := [name for name in source if name not in expected]:
        problems.append(f"not part of the source's model: {_listed(extra)}")
    misshapen, not_finite = [], []
    for name in expected.keys() & set(source):
        value = source[name]
        if tuple(value.shape) != expected[name]:
            misshapen.append(f"{name} {list(value.shape)} instead of {list(expected[name])}")
        elif not value.isfinite().all():
            not_finite.append(name)
    if misshapen:
        problems.append(f"of another shape: {_listed(misshapen)}")
    if not_finite:
        problems.append(f"with values that are not finite: {_listed(not_finite)}")
    return problems


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
