"""`pretrain predict`: classes of images, by an export."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from pretrain.errors import BadSampleError, CheckpointError, DataError, ExportError
from pretrain.redact import printable

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.config import ModelConfig
    from pretrain.formats.files import Provenance

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 178_956_970
"""Of one image, twice what Pillow warns at."""

_UNPREDICTABLE = {"mlflow": "an MLflow model names code to load it with: serve it with `mlflow models serve`"}

_WEIGHTS = {
    "safetensors": "model.safetensors",
    "timm": "model.safetensors",
    "transformers": "model.safetensors",
    "bigvision": "model.npz",
    "onnx": "model.onnx",
}
_READ_AS_A_SOURCE = {"timm": "timm", "transformers": "transformers"}
"""Formats whose own config.json says what a library is to build, and the importer that takes only what it knows from it."""


class Picture(NamedTuple):
    """What became of one file: its best classes with their probabilities, or why there are none."""

    path: Path
    top: list[tuple[int, float]]
    problem: str | None = None


@click.command()
@click.argument("export", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to name for an image."
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images of a forward pass."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def predict(export: Path, images: tuple[Path, ...], top: int, batch: int, as_json: bool) -> None:
    """Classify IMAGES, files and folders, by EXPORT, which `pretrain export` or `pretrain import` wrote, in any format but
    mlflow.

    Images are resized and cropped as in the model's validation. One that cannot be read is named and passed over; the
    command then ends with exit code 3 once the others are done.
    """
    from pretrain.formats.files import read_provenance, verify

    found = read_provenance(export)
    if found.format in _UNPREDICTABLE:
        raise ExportError(f"{export} is of format {found.format}: {_UNPREDICTABLE[found.format]}")
    if found.model.get("num_classes") == 1 and found.probabilities == "softmax":
        raise ExportError(
            f"{export} has one class, which every image would be: its source had no head; fine-tune it first (init.from)"
        )
    files = list(_files(images))
    if not files:
        raise DataError(f"there is no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, images))}")
    if _WEIGHTS[found.format] not in found.files:
        raise CheckpointError(f"{export}/config.json is damaged: it does not name its weights")
    verify(export, found)
    answer = _opened(export, found)
    pictures = list(_classified(answer, found, files, top, batch))
    names = found.class_names
    click.echo(_as_json(pictures, names) if as_json else _as_table(pictures, names))
    bad = [picture for picture in pictures if picture.problem]
    for picture in bad:
        click.echo(printable(f"not classified: {picture.path}: {picture.problem}"), err=True)
    if bad:
        raise DataError(f"{len(bad)} of {len(pictures)} images could not be read")


def _opened(export: Path, found: "Provenance") -> "Callable[[Tensor], Tensor]":
    """The exported model, uint8 images to logits. An export may be a stranger's: what its config.json says to the library
    is vetted as that of any source."""
    from pretrain.formats import exporter, importer
    from pretrain.formats.source import Hints

    if (height := found.config.img_size[0]) * (width := found.config.img_size[1]) > MAX_PIXELS:
        raise CheckpointError(
            f"{export} is of a model of images of {height} x {width} pixels, which is too large"
        )
    if found.format not in _READ_AS_A_SOURCE:
        return exporter(found.format).load(export)
    library = importer(_READ_AS_A_SOURCE[found.format])
    imported = library.read(export, Hints())
    for name in ("img_size", "in_chans", "num_classes"):
        if (theirs := getattr(imported.model, name)) != (ours := getattr(found.config, name)):
            raise CheckpointError(
                f"{export}/config.json says two things of the model: {name} {theirs} and {ours}"
            )
    return library.judge(export, imported)


def _files(given: Iterable[Path]) -> Iterator[Path]:
    """Every file that is named, and in folders every one that is called an image, in order."""
    for path in given:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            yield path


def _classified(
    answer: "Callable[[Tensor], Tensor]", found: "Provenance", files: list[Path], top: int, batch: int
) -> Iterator[Picture]:
    import torch
    from tqdm import tqdm

    model = found.config
    view = _view(found)
    with tqdm(total=len(files), desc="classifying", unit="image", disable=None) as bar:
        for start in range(0, len(files), batch):
            read = [(path, *_read(path, model, view)) for path in files[start : start + batch]]
            good = [pixels for _, pixels, _ in read if pixels is not None]
            rows = iter(_best(_answered(answer, torch.stack(good), model), found, top) if good else ())
            for path, pixels, problem in read:
                yield Picture(path, [] if pixels is None else next(rows), problem)
            bar.update(len(read))


def _answered(answer: "Callable[[Tensor], Tensor]", images: "Tensor", model: "ModelConfig") -> "Tensor":
    logits = answer(images)
    if logits.shape != (wanted := (len(images), model.num_classes)):
        raise CheckpointError(f"the export answers {list(logits.shape)} where {list(wanted)} is expected")
    return logits


def _view(found: "Provenance") -> Any:
    from pretrain.data.augment import EvalView

    return EvalView(*found.preprocess)


def _read(path: Path, model: "ModelConfig", view: Any) -> "tuple[Tensor | None, str | None]":
    """uint8 [H, W, C] as in validation, or the reason why not."""
    import numpy as np
    import torch

    from pretrain.data.decode import decode

    try:
        pixels = decode(path.read_bytes(), model.in_chans, MAX_PIXELS)
    except BadSampleError as error:
        return None, error.reason
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    out = np.empty((*model.img_size, model.in_chans), np.uint8)
    view.render(pixels, np.empty(0), out)
    return torch.from_numpy(out), None


def _best(logits: "Tensor", found: "Provenance", top: int) -> list[list[tuple[int, float]]]:
    shares = logits.sigmoid() if found.probabilities == "sigmoid" else logits.softmax(-1)
    values, classes = shares.topk(min(top, shares.shape[-1]))
    return [
        list(zip(row, some, strict=True)) for row, some in zip(classes.tolist(), values.tolist(), strict=True)
    ]


def _as_json(pictures: list[Picture], names: tuple[str, ...] | None) -> str:
    done = [
        {
            "path": str(picture.path),
            "top": [
                {"class": number, "name": names[number] if names else None, "probability": share}
                for number, share in picture.top
            ],
        }
        for picture in pictures
        if not picture.problem
    ]
    bad = [{"path": str(picture.path), "problem": picture.problem} for picture in pictures if picture.problem]
    return json.dumps({"images": done, "not_classified": bad}, indent=1)


def _as_table(pictures: list[Picture], names: tuple[str, ...] | None) -> str:
    """A line for each image: its classes, the likeliest first."""
    lines = []
    for picture in pictures:
        if not picture.problem:
            words = [f"{names[number] if names else number} {share:.1%}" for number, share in picture.top]
            lines.append(printable(f"{picture.path}: {', '.join(words)}"))
    return "\n".join(lines)
