"""Parameter groups: which weight decay and which share of the learning rate each parameter has.

Decided by name alone: under ZeRO stage 3 a parameter's own shape is empty.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypedDict

from torch import nn

from pretrain.config import OptimConfig


class ParamGroup(TypedDict):
    """One of torch's parameter groups; `lr` of a step is the schedule's times `lr_scale`."""

    params: list[nn.Parameter]
    names: list[str]
    lr: float
    lr_scale: float
    weight_decay: float


class _Key(NamedTuple):
    layer: int
    decays: bool


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, depth: int
) -> list[ParamGroup]:
    """Split parameters by weight decay and, with `layer_decay` below 1, by layer; the head's groups come last.

    Order of groups and of names within one depends on the names alone. Raises ValueError for a name twice, a
    parameter twice (a shared one would be stepped twice), and a name that belongs to no layer.
    """
    named = sorted(named_parameters)
    _refuse_repeats(named)
    last = depth + 1
    members: dict[_Key, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        layer = layer_id(name, depth) if config.layer_decay < 1 else last
        members.setdefault(_Key(layer, decays(name)), []).append((name, parameter))
    return [
        ParamGroup(
            params=[parameter for _, parameter in members[key]],
            names=[name for name, _ in members[key]],
            lr=config.lr * config.layer_decay ** (last - key.layer),
            lr_scale=config.layer_decay ** (last - key.layer),
            weight_decay=config.weight_decay if key.decays else 0.0,
        )
        for key in sorted(members)
    ]


def decays(name: str) -> bool:
    """Whether weight decay applies: to the matrices of linear maps; not to biases, norms, tokens, PE tables and
    LayerScale's factors."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and "norm" not in module.rpartition(".")[2]


def layer_id(name: str, depth: int) -> int:
    """Layer of a parameter as in BEiT (arXiv 2106.08254) and MAE: embeddings 0, block i is i + 1, the rest last.

    A position table that all blocks share counts as an embedding.
    """
    top, _, rest = name.partition(".")
    if top in ("patch_embed", "cls_token", "reg_token", "rel_pos") or top.startswith("pos_embed"):
        return 0
    if top == "blocks" and (number := rest.partition(".")[0]).isdecimal() and int(number) < depth:
        return int(number) + 1
    if top in ("norm", "fc_norm", "attn_pool", "pre_logits", "head"):
        return depth + 1
    raise ValueError(f"parameter {name!r} belongs to no layer of a model with {depth} blocks")


def _refuse_repeats(named: list[tuple[str, nn.Parameter]]) -> None:
    seen: dict[int, str] = {}
    names: set[str] = set()
    for name, parameter in named:
        if name in names:
            raise ValueError(f"parameter {name!r} is listed twice")
        if id(parameter) in seen:
            raise ValueError(f"parameters {seen[id(parameter)]!r} and {name!r} are one and the same")
        seen[id(parameter)] = name
        names.add(name)
