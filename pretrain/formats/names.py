"""A library's names for our parameters, as rules that work in both directions.

A rule says under which names, and laid out how, a parameter of ours is stored. One list of rules serves a library's
export and its import.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.transfer.fits import listed


class Layout(NamedTuple):
    """How a tensor of ours is stored, and back. Each also gets the width of a head."""

    store: Callable[[Tensor, int], Tensor]
    restore: Callable[[Tensor, int], Tensor]
    dims: int
    """Number of axes of the stored tensor; anything else is refused before `restore` sees it. 0: any."""


def _same(value: Tensor, _: int) -> Tensor:
    return value


def _transposed(value: Tensor, _: int) -> Tensor:
    return value.t()


SAME = Layout(_same, _same, 0)
MATRIX = Layout(_transposed, _transposed, 2)
"""flax's Dense kernel: [in, out]."""

PATCHES = Layout(lambda v, _: v.permute(2, 3, 1, 0), lambda v, _: v.permute(3, 2, 0, 1), 4)
"""flax's Conv kernel: [P, P, C, D] for our [D, C, P, P]."""

INTO_HEADS = Layout(lambda v, d: v.t().reshape(v.shape[1], -1, d), lambda v, _: v.flatten(1).t(), 3)
"""Kernel of a query, key or value map: [D, h, d] for our [D, D]."""

HEADS_BIAS = Layout(lambda v, d: v.reshape(-1, d), lambda v, _: v.flatten(), 2)
"""Its bias: [h, d] for our [D]."""

OUT_OF_HEADS = Layout(lambda v, d: v.t().reshape(-1, d, v.shape[0]), lambda v, _: v.flatten(0, 1).t(), 3)
"""Kernel of the map behind attention: [h, d, D] for our [D, D]."""


class Rule(NamedTuple):
    """ours, theirs: with {i} for the number of a block. Several of theirs are ours in equal parts, one below the other."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def pair(ours: str, theirs: str) -> list[Rule]:
    """Rules of the weight and the bias of a layer that is stored as ours is."""
    return [Rule(f"{ours}.{leaf}", (f"{theirs}.{leaf}",)) for leaf in ("weight", "bias")]


def stored(weights: Mapping[str, Tensor], model: ModelConfig, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Our weights by their names. Every parameter of the model has its rule."""
    width = model.width // model.heads
    found, said = {}, set()
    for rule in _unrolled(rules, model.num_blocks):
        if rule.ours in weights:
            said.add(rule.ours)
            for name, part in zip(rule.theirs, weights[rule.ours].chunk(len(rule.theirs)), strict=True):
                found[name] = rule.layout.store(part, width).contiguous()
    assert said == set(weights), sorted(set(weights) - said)
    return found


def restored(
    tensors: Mapping[str, Tensor],
    wanted: Iterable[str],
    model: ModelConfig,
    rules: Iterable[Rule],
    where: str,
) -> dict[str, Tensor]:
    """Their tensors by our names: those of `wanted`, and not one tensor left over.

    Raises `CheckpointError` with all that is missing, left over, or has another number of axes, by their names.
    """
    width = model.width // model.heads
    by_ours = {rule.ours: rule for rule in _unrolled(rules, model.num_blocks)}
    found, missing, odd, left = {}, [], [], set(tensors)
    for ours in wanted:
        rule = by_ours[ours]
        absent = [name for name in rule.theirs if name not in tensors]
        missing += absent
        if absent:
            continue
        left -= set(rule.theirs)
        parts = [tensors[name] for name in rule.theirs]
        axes = {part.dim() for part in parts}
        if 0 in axes or (rule.layout.dims and axes != {rule.layout.dims}):
            odd.append(f"{rule.theirs[0]} has shape {list(parts[0].shape)}, not {rule.layout.dims or 1} axes")
        elif len({part.shape for part in parts}) > 1:
            odd.append(f"{' and '.join(rule.theirs)} differ in shape")
        else:
            found[ours] = torch.cat([rule.layout.restore(part, width) for part in parts]).contiguous()
    complain(where, [
        *([f"missing: {listed(missing)}"] if missing else []),
        *([f"not part of the model: {listed(left)}"] if left else []),
        *odd,
    ])  # fmt: skip
    return found


def complain(where: str, problems: list[str]) -> None:
    """Raise `CheckpointError` if there is a problem, with all there are."""
    if problems:
        raise CheckpointError(
            f"{where} does not hold what its config says; nothing was imported:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def _unrolled(rules: Iterable[Rule], num_blocks: int) -> Iterator[Rule]:
    for rule in rules:
        if "{i}" not in rule.ours:
            yield rule
            continue
        for i in range(num_blocks):
            yield Rule(rule.ours.format(i=i), tuple(name.format(i=i) for name in rule.theirs), rule.layout)
