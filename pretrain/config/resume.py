"""What may differ between the attempts of one run, and what may not."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.config.plan import Plan
from pretrain.config.schema import Config
from pretrain.errors import ConfigError

MAY_CHANGE = (
    "train.total_steps",
    "train.total_epochs",
    "train.total_samples",
    "train.micro_batch",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.figures_every_steps",
    "engine.zero_stage",
    "engine.checkpoint_every_blocks",
    "engine.timeout_seconds",
    "data.train.shards",
    "data.val.shards",
    "data.decode_threads",
    "data.workers",
    "data.prefetch_steps",
    "data.read_ahead_mib",
    "data.block_memory_mib",
    "data.cache_dir",
    "data.cache_gib",
    "data.read_timeout_seconds",
    "data.max_bad_share",
    "checkpoint",
    "profile",
    "recovery",
    "tracking",
    "run.dir",
    "run.campaign",
)
"""Keys that a resumed run may set anew: they do not change which samples are seen, nor what is computed with them,
except for the length, which moves the end of the learning-rate schedule and is meant to. Shards may move: what they
hold is compared, by the digests of their manifests."""


FIXED = (
    "run.seed",
    "data.train",
    "data.lanes",
    "data.block_mib",
    "data.window_blocks",
    "data.augment.repeats",
    "model",
    "optim.name",
    "train.global_batch",
    "init",
)
"""Keys that no option lets change within a run: another order of samples, another model, another beginning."""

MOVES = re.compile(r"data\.train\.mix\.\d+\.shards|init\.from")
"""Paths below `FIXED` to what the run began with. It may have moved since: of shards the digest tells, and the weights
are not read again."""

NOT_BY_THE_CONFIG = {"precision": "engine.precision", "val_digest": "data.val"}
"""Numbers of the plan that a resume keeps although the same config gives others elsewhere (`precision: auto` or ZeRO
stage 0 in bf16 on other settings and hardware, validation shards that were replaced), by the key that allows it."""

ADAPTS = ("world_size", "micro_batch", "accumulation", "zero_stage", "device_name", "total_steps")
"""Numbers of the plan that a resume may find changed, and says."""


class Refused(NamedTuple):
    """A difference that stops a resume. key: of the config, what `--allow-change` takes; words: what differs."""

    key: str
    words: str


def refused(changes: Sequence[Refused], allowed: Sequence[str]) -> list[str]:
    """The words of those changes that the user did not allow, or that nobody can."""
    return [c.words for c in changes if _is_fixed(c.key) or not _under(c.key, allowed)]


def check_allowed(allowed: Sequence[str], config: Config) -> None:
    """Raise `ConfigError` for a key that no config has, which would allow nothing."""
    known = flatten(config)
    for key in allowed:
        if not any(_under(name, [key]) for name in known):
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"--allow-change {key}: there is no such key{f'; did you mean {near[0]}?' if near else ''}"
            )


def _is_fixed(key: str) -> bool:
    return _under(key, FIXED) and not MOVES.fullmatch(key)


def changed_numbers(before: Mapping[str, Any], now: Plan) -> list[Refused]:
    """Numbers of `NOT_BY_THE_CONFIG` in which the plan differs from the one saved with a checkpoint."""
    numbers = now.as_dict()
    return [
        Refused(key, f"{key}: the plan has {name} {numbers[name]}, the run was trained with {before[name]}")
        for name, key in NOT_BY_THE_CONFIG.items()
        if before[name] != numbers[name]
    ]


def adapted(before: Mapping[str, Any], now: Plan) -> list[str]:
    """Numbers of `ADAPTS` that differ, each as `name before -> now`."""
    numbers = now.as_dict()
    return [f"{name} {before[name]} -> {numbers[name]}" for name in ADAPTS if before[name] != numbers[name]]


def changed_keys(before: Config, now: Config) -> list[Refused]:
    """Keys outside `MAY_CHANGE` whose values differ, each as `key: before -> now`."""
    old, new = flatten(before), flatten(now)
    return [
        Refused(key, f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _under(key, MAY_CHANGE)
    ]


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key; sections in a list are counted from 0: `data.train.mix.0.weight`."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v
            for name, inner in value.items()
            for k, v in walk(f"{prefix}.{name}" if prefix else name, inner).items()
        }

    return walk("", config.model_dump(mode="json", by_alias=True))


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
