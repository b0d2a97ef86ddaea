"""Writing an export: aside, proven, then renamed. The formats differ in config.json and in who loads them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import ExportError
from pretrain.export import native, timm_folder
from pretrain.export.files import CONFIG, WEIGHTS, Preprocess, Provenance
from pretrain.model import build, num_parameters

__all__ = ["LARGEST_DIFFERENCE", "Exported", "Preprocess", "write_export"]

LARGEST_DIFFERENCE = 1e-4
"""Of any logit in float32 between the checkpoint and the export that was loaded again."""


class _Format(NamedTuple):
    adapt: Callable[[Mapping[str, Tensor], ModelConfig], tuple[Mapping[str, Tensor], ModelConfig]]
    """Weights and model as the format says them; raises `ExportError` for a model that it cannot express."""

    describe: Callable[[ModelConfig, Preprocess, Provenance], dict[str, Any]]
    """The content of config.json."""

    logits: Callable[[Path, Tensor], Tensor]
    """Load the folder as its users will and answer uint8 images [B, H, W, C] with float32 logits [B, K]."""

    how_to_load: str


_FORMATS = {
    "safetensors": _Format(
        native.adapt, native.describe, native.logits, "pretrain.export.native.load_export({folder!r})"
    ),
    "timm": _Format(
        timm_folder.adapt,
        timm_folder.describe,
        timm_folder.logits,
        "timm.create_model('local-dir:{folder}', pretrained=True)",
    ),
}


@dataclass(frozen=True)
class Exported:
    """What was written. `difference` is the largest of any logit, None where it was not verified."""

    path: Path
    parameters: int
    difference: float | None
    images: str
    how_to_load: str


def write_export(
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    lineage: Mapping[str, Any],
    out: Path,
    form: str,
    *,
    preprocess: Preprocess | None = None,
    images: Tensor | None = None,
    verify: bool = True,
) -> Exported:
    """Write `weights` (timm's names, float32) as the folder `out`, replacing only an earlier export of ours.

    lineage  where the weights come from, as JSON takes it; kept in config.json
    form     a name of `pretrain.export.FORMATS`
    images   uint8 [B, H, W, C] to compare logits on; none: noise
    Raises `ExportError`, and leaves nothing, where the format cannot express the model, its library is missing, or
    the export loaded again differs by more than `LARGEST_DIFFERENCE`.
    """
    _refuse_foreign(out)
    chosen = _FORMATS[form]
    with _aside(out) as folder:
        tensors = {name: value.float().clone() for name, value in weights.items()}
        adapted, described = chosen.adapt(tensors, model)
        _save(dict(adapted), folder / WEIGHTS)
        provenance = Provenance.of(folder / WEIGHTS, lineage)
        document = chosen.describe(described, preprocess or Preprocess(), provenance)
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
        difference, seen = None, ""
        if verify:
            seen = "noise (no validation images at hand)" if images is None else f"{len(images)} images"
            images = _noise(model) if images is None else images
            difference = _largest_difference(tensors, model, images, chosen.logits(folder, images))
        _publish(folder, out)
    how_to_load = chosen.how_to_load.format(folder=str(out))
    return Exported(out, num_parameters(model), difference, seen, how_to_load)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {path}: {error}") from None


def _largest_difference(
    weights: Mapping[str, Tensor], model: ModelConfig, images: Tensor, got: Tensor
) -> float:
    with torch.no_grad():
        expected = build(model, weights)(images)
    difference = float((got - expected).abs().max())
    if not difference <= LARGEST_DIFFERENCE:  # also where it is not a number
        raise ExportError(
            f"the export loaded again answers otherwise: its logits differ by {difference:.2e}, "
            f"{LARGEST_DIFFERENCE:.0e} is allowed; nothing was kept"
        )
    return difference


def _noise(model: ModelConfig) -> Tensor:
    shape = (8, *model.img_size, model.in_chans)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _refuse_foreign(out: Path) -> None:
    """Replacing is for what this command wrote; anything else stays."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = Provenance.KEY in json.loads((out / CONFIG).read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ExportError(f"{out} exists and is not an export; give another --out, or move it away")


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards, unless it was renamed."""
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"cannot write to {out.parent}: {error.strerror}; give another --out") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    replaced = folder.with_name(folder.name + ".old")
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
