"""What `pretrain export` takes: a checkpoint of a run, or weights that `pretrain import` or an earlier export wrote."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pretrain.checkpoint.load import open_weights
from pretrain.config import ModelConfig
from pretrain.export.lineage import about, about_again
from pretrain.formats.files import About, is_export
from pretrain.formats.native import open_export
from pretrain.images import photographs, validation_images


class Opened(NamedTuple):
    weights: Mapping[str, Tensor]
    """By timm's names, fp32 on the CPU."""

    model: ModelConfig
    about: About
    name: str
    """Which weights they are, for people."""

    images: Callable[[], Tensor | None]
    """A few to compare logits on, uint8 [B, H, W, C]; None where there are none at hand."""


def open_source(path: Path, which: str, licence: str | None) -> Opened:
    """Verify and open what there is to export at `path`. Raises `CheckpointError`."""
    if is_export(path):
        weights, found = open_export(path)
        model = found.config
        return Opened(
            weights, model, about_again(path, found, licence), path.name, lambda: photographs(model)
        )
    run = open_weights(path, which)
    return Opened(
        run.weights,
        run.model,
        about(run, licence),
        f"step {run.step:,}",
        lambda: validation_images(run.config),
    )
