"""Where a run's weights come from: the run, its data, its recipe, and every hand-off that led to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpoint.load import WeightsFile
from pretrain.config import Config
from pretrain.data import open_dataset
from pretrain.errors import CheckpointError, DataError
from pretrain.formats.files import (
    CONFIG,
    About,
    Preprocess,
    Provenance,
    is_export,
    read_json,
    read_provenance,
    sha256,
)
from pretrain.lineage import code_facts
from pretrain.logs import log
from pretrain.redact import redact_text
from pretrain.run_dir import HANDOFF

MAX_HAND_OFFS = 32
"""Nobody has so many stages; files that name each other in a circle do."""

_RECIPE = ("objective", "optim", "train")


def about(found: WeightsFile, licence: str | None) -> About:
    """What goes with a checkpoint's weights."""
    config = found.config
    return About(
        _lineage(found),
        Preprocess(config.data.val_crop, config.data.interpolation),
        _class_names(config),
        "sigmoid" if config.objective.name == "sigmoid" else "softmax",
        _clean(licence),
        _recipe(config),
    )


def about_again(folder: Path, found: Provenance, licence: str | None) -> About:
    """What goes with the weights of an export that is written in another format: all that went with them before."""
    return About(
        {**found.lineage, "export_of": {"folder": folder.name, "sha256": sha256(folder / CONFIG)}},
        found.preprocess,
        found.class_names,
        "sigmoid" if found.probabilities == "sigmoid" else "softmax",
        licence or found.licence,
    )


def _lineage(found: WeightsFile) -> dict[str, Any]:
    config, plan = found.config, found.slices.manifest.plan
    facts = {
        "run": config.run.dir,
        "checkpoint": found.path.name,
        "checkpoint_sha256": found.digest,
        "step": found.step,
        "metrics": dict(found.metrics),
        "trained_on": "::".join(config.data.train.patterns),
        "train_digest": plan.get("train_digest"),
        "val_digest": plan.get("val_digest"),
        "init_from": config.init.source if config.init else None,
        "hand_offs": list(_hand_offs(found.path)),
        "code": code_facts(),
    }
    return {key: _clean(value) for key, value in facts.items()}


def _clean(value: Any) -> Any:
    """Without what looks like a secret: an address of shards may carry one."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _hand_offs(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The hand-off into the run of this checkpoint, then that into the run before, as far as they are at hand; at the
    end the export that it all began with, if it was one."""
    for _ in range(MAX_HAND_OFFS):
        try:
            if is_export(checkpoint):
                before = dict(read_provenance(checkpoint).lineage)
                earlier = before.pop("hand_offs", [])
                yield {"run": str(checkpoint), "lineage": before}
                yield from earlier
                return
            run = checkpoint.parents[1] if len(checkpoint.parents) > 1 else checkpoint
            if not (run / HANDOFF).is_file():
                return
            document = read_json(run / HANDOFF)
        except CheckpointError as error:
            log.warning("the lineage ends early: %s", error)
            return
        yield {"run": str(run), **document}
        checkpoint = Path(str(document.get("checkpoint")))


def _class_names(config: Config) -> tuple[str, ...] | None:
    """As the manifest of the validation or the training shards says, where one is at hand."""
    patterns = [config.data.val.shards] if config.data.val else []
    for pattern in [*patterns, *config.data.train.patterns]:
        try:
            names = open_dataset(pattern).class_names
        except DataError as error:
            log.warning("class names are not taken from %s: %s", redact_text(pattern), error)
            continue
        if names is not None and len(names) == config.model.num_classes:
            return names
    return None


def _recipe(config: Config) -> str:
    """The sections that say how the weights were trained; no path and no address is in them."""
    document = config.model_dump(mode="json", exclude_defaults=True)
    recipe = {name: document[name] for name in _RECIPE if name in document}
    augment = document.get("data", {}).get("augment")
    return yaml.safe_dump(recipe | ({"augment": augment} if augment else {}), sort_keys=False)
