"""Writing an export: aside, proven, then renamed. The formats differ in what they write and in who loads it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import ExportError
from pretrain.formats import EXPORTS, exporter
from pretrain.formats.adapt import renormalised
from pretrain.formats.card import card
from pretrain.formats.files import CARD, CONFIG, KEY, About, Provenance, hashes, input_of, is_export
from pretrain.formats.native import load_export
from pretrain.model import build, num_parameters

LARGEST_DIFFERENCE = 1e-4
"""Of any logit in float32 between what was given and what was loaded again."""

ROUNDING = 2e-6
"""The same as a share of the largest logit, where logits are so large that this allows more."""


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
    about: About,
    out: Path,
    form: str,
    *,
    fold_normalization: bool = False,
    images: Tensor | None = None,
    expected: Callable[[Tensor], Tensor] | None = None,
    before_head: bool = False,
    verify: bool = True,
) -> Exported:
    """Write `weights` (timm's names, float32) as the folder `out`, replacing only an earlier export of ours.

    form                a name of `pretrain.formats.EXPORTS`
    fold_normalization  the export takes pixels in [0, 1]: mean and std go into the patch filters
    images              uint8 [B, H, W, C] to compare logits on; none: noise
    expected            whose logits the export must give; none: the model's own, as it is trained here
    before_head         compare what the head sees instead, for safetensors alone: the head is ours, not the source's
    Raises `ExportError`, and leaves nothing, where the format cannot express the model, its library is missing, or
    the export loaded again differs by more than `LARGEST_DIFFERENCE`.
    """
    chosen = exporter(form)
    _refuse_foreign(out)
    _refuse_inexpressible(form, model)
    with _aside(out) as folder:
        tensors: Mapping[str, Tensor] = {name: value.float().clone() for name, value in weights.items()}
        folded = renormalised(tensors, model, (0.0,), (1.0,)) if fold_normalization else (tensors, model)
        adapted, described = chosen.adapt(*folded)
        try:
            chosen.write(
                folder, {name: value.contiguous() for name, value in adapted.items()}, described, about
            )
            _finish(folder, form, model, described, about)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"cannot write {folder}: {error}") from None
        difference, seen = None, ""
        if verify:
            seen = "noise (no images at hand)" if images is None else f"{len(images)} images"
            images = _noise(model) if images is None else images
            wanted = (expected or torch.no_grad()(build(model, tensors)))(images)
            difference = largest_difference(
                _features(folder, images) if before_head else chosen.load(folder)(images), wanted
            )
        _publish(folder, out)
    how_to_load = chosen.HOW_TO_LOAD.format(folder=str(out))
    return Exported(out, num_parameters(described), difference, seen, how_to_load)


def _features(folder: Path, images: Tensor) -> Tensor:
    net = load_export(folder)[0]
    with torch.no_grad():
        return net.forward_head(net.forward_features(images), pre_logits=True)


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Of any logit; raises `ExportError` where it is more than allowed, or not a number."""
    if got.shape != expected.shape:
        raise ExportError(
            f"loaded again it answers {list(got.shape)} where {list(expected.shape)} is expected; nothing was kept"
        )
    difference = float((got.float() - expected.float()).abs().max())
    allowed = max(LARGEST_DIFFERENCE, ROUNDING * float(expected.abs().max()))
    if not difference <= allowed:  # also where it is not a number
        raise ExportError(
            f"loaded again it answers otherwise: its logits differ by {difference:.2e}, {allowed:.0e} is allowed; "
            "nothing was kept"
        )
    return difference


def _refuse_inexpressible(form: str, model: ModelConfig) -> None:
    if not (reasons := list(exporter(form).inexpressible(model))):
        return
    able = [name for name in EXPORTS if name != form and not list(exporter(name).inexpressible(model))]
    raise ExportError(
        f"{form} cannot express this model; use --format {' or '.join(able)}:\n"
        + "\n".join(f"  - {reason}" for reason in reasons)
    )


def _finish(folder: Path, form: str, trained: ModelConfig, model: ModelConfig, about: About) -> None:
    """The card, and our part of config.json, which names every other file with its hash."""
    (folder / CARD).write_text(card(form, trained, model, about), encoding="utf-8")
    provenance = Provenance(
        format=form,
        files={name: facts for name, facts in hashes(folder).items() if name != CONFIG},
        model=model.model_dump(mode="json"),
        input=input_of(model, about.preprocess),
        lineage=about.lineage,
        class_names=about.class_names,
        probabilities=about.probabilities,
        licence=about.licence,
    )
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({KEY: asdict(provenance), **document}, indent=2) + "\n")


def _noise(model: ModelConfig) -> Tensor:
    shape = (8, *model.img_size, model.in_chans)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _refuse_foreign(out: Path) -> None:
    """Replacing is for what this command wrote; anything else stays."""
    if out.name in ("", ".."):
        raise ExportError(f"{out} is not the name of a folder; give another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
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
