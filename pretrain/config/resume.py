"""What may differ between the attempts of one run, and what may not."""

from typing import Any

from pretrain.config.schema import Config

MAY_CHANGE = (
    "train.total_steps",
    "train.total_epochs",
    "train.total_samples",
    "train.micro_batch",
    "train.log_every_steps",
    "train.eval_every_steps",
    "engine.zero_stage",
    "engine.checkpoint_every_blocks",
    "engine.timeout_seconds",
    "data.decode_threads",
    "data.prefetch_steps",
    "checkpoint",
    "tracking",
    "run.dir",
    "run.campaign",
)
"""Keys that a resumed run may set anew: they do not change which samples are seen, nor what is computed with them,
except for the length, which moves the end of the learning-rate schedule and is meant to."""


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys outside `MAY_CHANGE` whose values differ, each as `key: before -> now`."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == may or key.startswith(may + ".") for may in MAY_CHANGE)
    ]


def flatten(config: Config) -> dict[str, Any]:
    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v
            for name, inner in value.items()
            for k, v in walk(f"{prefix}.{name}" if prefix else name, inner).items()
        }

    return walk("", config.model_dump(mode="json", by_alias=True))
