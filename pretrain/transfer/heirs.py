"""How each parameter of the target comes about, but for positions: those are in `position`."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.model import initial_value, resize_patch_filters
from pretrain.transfer.position import Positions, is_position
from pretrain.transfer.report import Row

Recipe = Callable[[], Tensor]
Heir = tuple[Recipe, list[Row]]

_SCALED_BY = {"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"}
"""The last linear map of a branch, and the LayerScale that multiplies what it gives."""


@dataclass(frozen=True)
class Heirs:
    """The rules, by parameter. Arguments as of `transfer`, already found to fit."""

    source: Mapping[str, Tensor]
    old: ModelConfig
    new: ModelConfig
    init: InitConfig
    seed: int

    def heir(self, name: str, shape: tuple[int, ...]) -> Heir:
        """How the target's parameter `name` comes about, and the rows that say so."""
        if is_position(name):
            return self._positions.heir(name, shape)
        if name in ("cls_token", "reg_token"):
            return self._token(name, shape)
        if name == "patch_embed.proj.weight" and self.old.patch_size != self.new.patch_size:
            return self._patch_filters(name)
        if name.startswith("pre_logits.") and self.old.representation_size != self.new.representation_size:
            detail = f"drawn anew: the source has {_width(self.old)}, this model {_width(self.new)}"
            return self._drawn(name, shape), [Row(name, "reset", detail)]
        if name.startswith("head.") and not self._keeps_head:
            return self._new_head(name, shape)
        if name.startswith("fc_norm.") and self.old.global_pool != "avg":
            ancestor = name.removeprefix("fc_")
            return lambda: self._read(ancestor), [Row(name, "kept", f"was {ancestor}")]
        if name.endswith(".gamma") and self.old.layer_scale is None:
            return lambda: torch.ones(shape), [Row(name, "reset", "1: the source has no LayerScale")]
        if self.old.layer_scale is not None and self.new.layer_scale is None and (gamma := _scale_of(name)):
            return lambda: self._scaled(name, gamma), [Row(name, "folded", f"times {gamma} of the source")]
        return lambda: self._read(name), [Row(name, "kept", "")]

    def without_heir(self, inherited: Container[str]) -> list[Row]:
        """Rows for computed positions, and for the source's parameters that the target has no use for."""
        return [
            *self._positions.computed(),
            *(row for name in self.source if name not in inherited for row in self._fate(name)),
        ]

    def _fate(self, name: str) -> list[Row]:
        """What is to be said of a source's parameter whose name the target does not have."""
        if is_position(name):
            return self._positions.fate(name)
        if name.endswith(".gamma"):
            return [Row(name, "folded", "into the layer before it")]
        if name.startswith("pre_logits."):
            return [Row(name, "dropped", "the head is one linear map")]
        if name.startswith("norm."):  # mean pooling calls it fc_norm
            return []
        return [Row(name, "dropped", f"{self.new.global_pool} pooling does not use it")]

    @property
    def _positions(self) -> Positions:
        return Positions(self.source, self.old, self.new, self.init, self.seed)

    def _read(self, name: str) -> Tensor:
        return self.source[name].float()

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Recipe:
        return lambda: initial_value(name, shape, self.new, self.seed)

    def _token(self, name: str, shape: tuple[int, ...]) -> Heir:
        """cls token or registers: the source's, with its rows of a position table folded in, and new ones behind."""
        had = 1 if name == "cls_token" else self.old.num_registers
        folded = self._positions.prefix.folded(name) if had else None
        rows = []
        if folded is not None:
            rows.append(Row(name, "folded", f"{folded.name} of the source added"))
        if had < shape[1]:
            rows.append(Row(name, "reset", f"{shape[1] - had} of {shape[1]} drawn anew"))

        def make() -> Tensor:
            value = self._read(name) if had else torch.zeros(1, 0, self.new.width)
            value = value if folded is None else value + folded.read()
            return torch.cat([value, self._drawn(name, shape)()[:, had:]], dim=1)

        return make, rows or [Row(name, "kept", "")]

    def _patch_filters(self, name: str) -> Heir:
        size, kernel = self.new.patch_size, self.init.resize_kernel
        before, now = ("x".join(map(str, config.patch_size)) for config in (self.old, self.new))
        row = Row(name, "resized", f"{before} -> {now} pixels {kernel}, by pseudo-inverse")
        return lambda: resize_patch_filters(self._read(name), size, kernel), [row]

    def _scaled(self, name: str, gamma: str) -> Tensor:
        value, scale = self._read(name), self._read(gamma)
        return value * (scale[:, None] if value.dim() == 2 else scale)

    @property
    def _keeps_head(self) -> bool:
        return self.init.head == "keep" or (self.init.head == "auto" and not self._why_new_head)

    @property
    def _why_new_head(self) -> str:
        if self.init.head == "zero":
            return "init.head: zero"
        if self.old.num_classes != self.new.num_classes:
            return f"{self.old.num_classes} -> {self.new.num_classes} classes"
        if self.old.global_pool != self.new.global_pool:
            return f"{self.old.global_pool} -> {self.new.global_pool} pooling"
        if self.old.representation_size != self.new.representation_size:
            return f"{_width(self.old)} -> {_width(self.new)}"
        return ""

    def _new_head(self, name: str, shape: tuple[int, ...]) -> Heir:
        value = self.new.head_bias if name == "head.bias" else 0.0
        if value:
            return lambda: torch.full(shape, value), [
                Row(name, "reset", f"{self._why_new_head}; all {value:g}")
            ]
        return lambda: torch.zeros(shape), [Row(name, "zeroed", self._why_new_head)]


def _scale_of(name: str) -> str | None:
    """Name of the LayerScale factors that `blocks.i.attn.proj.weight` and its like can take in."""
    if not name.startswith("blocks."):
        return None
    top, number, rest = name.split(".", 2)
    gamma = _SCALED_BY.get(rest.rpartition(".")[0])
    return gamma and f"{top}.{number}.{gamma}"


def _width(config: ModelConfig) -> str:
    return f"a tanh layer of {config.representation_size}" if config.representation_size else "no tanh layer"
