"""fp32 weights and optimizer state by parameter name, as the slices that one rank holds at any ZeRO stage.

This is the neutral ground between DeepSpeed's flat buffers and our checkpoints, initial weights and hand-off: all of
them read or write `Fragment`s, and none needs to know the stage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.engine import private_api

STATES: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Tensors that an optimizer keeps per element of a parameter."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in a tensor shaped like its flat master (fp32 [stop - start], a view)."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]

    def cut(self, start: int, stop: int) -> "Fragment":
        """The part within [start, stop) of the parameter."""
        first, last = max(start, self.start), min(stop, self.stop)
        return Fragment(self.name, self.shape, first, last, self.flat, self.offset + first - self.start)


def held(engine: Any) -> list[Fragment]:
    """All that this rank holds; at stage 0 that is every parameter, on every rank."""
    return [
        Fragment(name, tuple(private_api.full_shape(parameter)), *piece)
        for name, parameter in engine.module.named_parameters()
        for piece in private_api.pieces(engine, parameter)
    ]


def owned(fragments: Sequence[Fragment], zero_stage: int, rank: int, world_size: int) -> list[Fragment]:
    """What this rank writes, so that every element is written by exactly one rank."""
    if zero_stage > 0:
        return list(fragments)
    total = sum(fragment.stop for fragment in fragments)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    parts, passed = [], 0
    for fragment in fragments:
        part = fragment.cut(first - passed, last - passed)
        passed += fragment.stop
        if part.start < part.stop:
            parts.append(part)
    return parts


def make_states(
    optimizer: torch.optim.Optimizer, fragments: Iterable[Fragment], name: str, steps: int
) -> None:
    """Give the inner optimizer the state it would have after `steps` steps, filled with zeros.

    Each flat master gets its own step count: sharing one tensor counts it once per group.
    """
    for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
        state: dict[str, Tensor] = {key: torch.zeros_like(flat, requires_grad=False) for key in STATES[name]}
        if name == "adamw":
            state["step"] = torch.tensor(float(steps), device=flat.device)
        optimizer.state[flat] = state
