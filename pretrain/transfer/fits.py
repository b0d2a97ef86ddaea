"""Why weights do not fit: settings that may not differ, and weights that are not what their own config says."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.model import parameter_shapes
from pretrain.transfer.position import converts, stays_in_place

SHOWN = 6
_MUST_AGREE = ("embed_dim", "depth", "num_heads", "mlp_dim", "in_chans", "act", "qk_norm", "norm_eps")
POOLS = {
    "token": ("token", "avg", "norm_avg"),
    "avg": ("avg",),
    "norm_avg": ("norm_avg", "avg"),
    "map": ("map", "avg", "norm_avg"),
}
"""Pooling of the source, and what the target may use in its place: nothing that would have to be invented."""


def misfits(source: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig, init: InitConfig) -> list[str]:
    """All reasons against the hand-off; none: it can go ahead. Reads every source tensor once."""
    return [
        *_differing_settings(old, new, init),
        *_positions(old, new, init),
        *wrong_weights(source, old),
    ]


def _differing_settings(old: ModelConfig, new: ModelConfig, init: InitConfig) -> Iterator[str]:
    for name in _MUST_AGREE:
        if getattr(old, name) != getattr(new, name):
            yield _differs(name, old, new)
    if old.patch_size != new.patch_size and init.patch == "keep":
        yield f"{_differs('patch_size', old, new)}; init.patch: resize would adapt the filters"
    for name in ("mean", "std"):
        before, now = (tuple(getattr(config, name)) for config in (old, new))
        if before * (old.in_chans // len(before)) != now * (new.in_chans // len(now)):
            yield f"model.{name}: the source has {list(before)}, this config {list(now)}"
    if new.global_pool not in POOLS[old.global_pool]:
        yield (
            f"model.global_pool: {new.global_pool} needs weights that a source with {old.global_pool} lacks; "
            f"possible: {', '.join(POOLS[old.global_pool])}"
        )
    if new.num_registers < old.num_registers:
        yield (
            f"{_differs('num_registers', old, new)}; registers can be added, "
            "but what the model keeps in one has nowhere else to go"
        )
    if init.head == "keep" and old.num_classes != new.num_classes:
        yield (
            f"init.head: keep, but the source has {old.num_classes} classes and this config {new.num_classes}; "
            "use auto or zero"
        )
    if init.head == "keep" and old.representation_size != new.representation_size:
        yield f"init.head: keep, but {_differs('representation_size', old, new)}; use auto or zero"


def _positions(old: ModelConfig, new: ModelConfig, init: InitConfig) -> Iterator[str]:
    if init.position != "resize":
        return
    if not converts(old, new):
        yield (
            f"{_differs('pos_embed', old, new)}: the one cannot be written as the other; "
            "init.position: reset or drop gives the source's positions up"
        )
    elif not stays_in_place(old, new):
        yield (
            f"{_differs('pos_embed_at', old, new)}: only a stem's or a shared table can become tables of every layer; "
            "init.position: reset or drop gives the source's positions up"
        )
    elif (
        old.pos_embed_at != "stem" and old.num_pos_prefix and not new.num_pos_prefix and new.num_prefix_tokens
    ):
        yield (
            f"{_differs('pos_embed_order', old, new)}: the rows of the prefix tokens are added in every block and "
            "cannot be folded into the tokens; keep cls_then_pe"
        )


def _differs(name: str, old: ModelConfig, new: ModelConfig) -> str:
    return f"model.{name}: the source has {getattr(old, name)}, this config {getattr(new, name)}"


def wrong_weights(source: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Names, shapes and numbers that are not what the weights' own config says. Reads every tensor once."""
    expected = parameter_shapes(config)
    problems = []
    if missing := [name for name in expected if name not in source]:
        problems.append(f"missing in the source: {listed(missing)}")
    if extra := [name for name in source if name not in expected]:
        problems.append(f"not part of the source's model: {listed(extra)}")
    misshapen, not_finite = [], []
    for name in expected.keys() & set(source):
        value = source[name]
        if tuple(value.shape) != expected[name]:
            misshapen.append(f"{name} {list(value.shape)} instead of {list(expected[name])}")
        elif not value.isfinite().all():
            not_finite.append(name)
    if misshapen:
        problems.append(f"of another shape: {listed(misshapen)}")
    if not_finite:
        problems.append(f"with values that are not finite: {listed(not_finite)}")
    return problems


def listed(names: Iterable[str]) -> str:
    """A few names in order, and how many more there are."""
    names = sorted(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
