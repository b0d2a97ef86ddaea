"""Settings that were given and cannot take effect beside the others: said once, never passed over in silence."""

from collections.abc import Iterator
from typing import NamedTuple

from pretrain.config.model import ModelConfig
from pretrain.config.schema import Config, InitConfig
from pretrain.config.section import Section


class _Idle(NamedTuple):
    """Fields of a section that nothing reads in this config. path: the section's key."""

    path: str
    section: Section
    names: tuple[str, ...]
    reason: str


def idle_settings(config: Config) -> list[str]:
    """Settings that differ from their default and have no effect in this config, each with the reason."""
    return [
        f"{path}.{name}={getattr(section, name)} has no effect: {reason}"
        for path, section, names, reason in _idle(config)
        for name in names
        if getattr(section, name) != type(section).model_fields[name].default
    ]


def _idle(config: Config) -> Iterator[_Idle]:
    optim, data = config.optim, config.data
    if optim.name == "sgd":
        yield _Idle("optim", optim, ("betas", "eps"), "they belong to adamw, and optim.name is sgd")
    else:
        yield _Idle("optim", optim, ("momentum",), "it belongs to sgd, and optim.name is adamw")
    if optim.schedule == "constant":
        yield _Idle("optim", optim, ("min_lr",), "optim.schedule is constant")
    if data.augment.crop in ("resize", "resize_crop"):
        reason = f"crop is {data.augment.crop}: no area and no shape are drawn"
        yield _Idle("data.augment", data.augment, ("scale", "ratio"), reason)
    jitter = data.augment.color_jitter
    if jitter is not None and config.model.in_chans == 1:
        yield _Idle(
            "data.augment.color_jitter", jitter, ("saturation", "hue"), "model.in_chans is 1: no colour"
        )
    if data.decode_threads == 0:
        reason = "data.decode_threads is 0: nothing is done ahead"
        yield _Idle("data", data, ("prefetch_steps", "workers", "read_ahead_mib"), reason)
    stores = ("read_ahead_mib", "block_memory_mib", "cache_dir", "cache_gib", "read_timeout_seconds")
    if not any("://" in source.model_dump_json() for source in (data.train, data.val) if source is not None):
        yield _Idle("data", data, stores, "all shards are local files, which the system caches")
    elif data.cache_dir is not None:
        yield _Idle("data", data, ("block_memory_mib",), "blocks are kept in data.cache_dir")
    if config.checkpoint.every_minutes != "auto":
        reason = "checkpoint.every_minutes is not auto"
        yield _Idle("checkpoint", config.checkpoint, ("failures_per_day",), reason)
    if config.engine.zero_stage == 3:
        reason = "engine.zero_stage is 3: no rank holds what another holds"
        yield _Idle("recovery", config.recovery, ("check_replicas_every_steps",), reason)
    if data.val is None:
        yield _Idle("data", data, ("val_crop",), "there is no data.val")
        yield _Idle(
            "train", config.train, ("eval_every_steps", "figures_every_steps"), "there is no data.val"
        )
        yield _Idle("checkpoint", config.checkpoint, ("keep_best",), "there is no data.val")
    objective = config.objective
    if not objective.mixes:
        reason = "mixup_alpha and cutmix_alpha are 0: nothing is mixed"
        yield _Idle("objective", objective, ("mix_prob", "mix_switch_prob"), reason)
    elif not (objective.mixup_alpha and objective.cutmix_alpha):
        reason = "only one of mixup_alpha and cutmix_alpha is above 0"
        yield _Idle("objective", objective, ("mix_switch_prob",), reason)
    yield from _idle_of_the_model(config.model)
    if config.init is not None:
        yield from _idle_of_the_hand_off(config.init, config.model)
    if config.tracking.uri is None:
        reason = "tracking.uri is null: nothing is sent to MLflow"
        yield _Idle("tracking", config.tracking, ("experiment", "run_name"), reason)
        yield _Idle("run", config.run, ("campaign",), reason)


def _idle_of_the_model(model: ModelConfig) -> Iterator[_Idle]:
    if not model.has_position_table:
        yield _Idle("model", model, ("pos_embed_order",), f"pos_embed {model.pos_embed} gives no token a row")
    elif not model.num_prefix_tokens:
        reason = f"{model.global_pool} pooling has no cls token, and there are no registers"
        yield _Idle("model", model, ("pos_embed_order",), reason)
    if model.pos_embed != "rope_2d":
        yield _Idle("model", model, ("rope_reference_grid",), f"pos_embed is {model.pos_embed}")


def _idle_of_the_hand_off(init: InitConfig, model: ModelConfig) -> Iterator[_Idle]:
    learned = model.has_position_table or model.pos_embed == "relative"
    if not learned and model.pos_embed != "none":
        yield _Idle("init", init, ("position",), f"pos_embed {model.pos_embed} is computed, never learned")
    if init.patch == "keep" and (init.position != "resize" or not learned):
        yield _Idle("init", init, ("resize_kernel",), "neither positions nor patch filters are interpolated")
