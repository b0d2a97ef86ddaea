"""What all formats share: names of files, and the part of an export's config.json that is ours."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from pretrain.config import ModelConfig
from pretrain.documents import read_object
from pretrain.errors import CheckpointError
from pretrain.formats import EXPORTS

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
KEY = "pretrain"
VERSION = 2

MAX_JSON_BYTES = 64 * 2**20
"""Of a config or an index of weight files; a table of a million names stays below it."""


class Preprocess(NamedTuple):
    """How validation images were made: `val_crop` and `interpolation` of the data section."""

    crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


AS_IT_IS = Preprocess()


@dataclass(frozen=True)
class About:
    """What goes with the weights."""

    lineage: Mapping[str, Any]
    """Where they come from, as JSON takes it."""

    preprocess: Preprocess = AS_IT_IS
    class_names: tuple[str, ...] | None = None
    probabilities: Literal["softmax", "sigmoid"] = "softmax"
    licence: str | None = None
    recipe: str = ""
    """The settings that the weights were trained with, as YAML."""


@dataclass(frozen=True)
class Provenance:
    """The key `pretrain` of an export's config.json: what is in the folder, and what a reader needs to use it."""

    format: str
    files: Mapping[str, tuple[int, str]]
    """Name of every other file -> (bytes, sha256)."""

    model: Mapping[str, Any]
    input: Mapping[str, Any]
    lineage: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None
    probabilities: str = "softmax"
    licence: str | None = None
    version: int = VERSION

    @property
    def config(self) -> ModelConfig:
        """Raises `CheckpointError` where this release does not know such a model."""
        try:
            return ModelConfig.model_validate_json(json.dumps(self.model))
        except ValidationError as error:
            raise CheckpointError(f"an export of a model that is not one: {in_a_line(error)}") from None

    @property
    def preprocess(self) -> Preprocess:
        crop, interpolation = self.input.get("crop"), self.input.get("interpolation")
        if not isinstance(crop, int | float) or not 0 < crop <= 1:
            raise CheckpointError(f"input.crop is {crop!r}; it is a share of the side above 0")
        if interpolation not in ("bilinear", "bicubic"):
            raise CheckpointError(f"input.interpolation is {interpolation!r}; it is bilinear or bicubic")
        return Preprocess(float(crop), interpolation)


def in_a_line(error: ValidationError) -> str:
    """What is wrong with settings, each with its name."""
    return "; ".join(
        ": ".join([".".join(map(str, each["loc"])), each["msg"]] if each["loc"] else [each["msg"]])
        for each in error.errors(include_url=False, include_context=False)
    )


def input_of(model: ModelConfig, preprocess: Preprocess) -> dict[str, Any]:
    """What the model takes, in words and numbers."""
    mean, std = per_channel(model)
    return {
        "images": f"uint8 [batch, {model.img_size[0]}, {model.img_size[1]}, {model.in_chans}]",
        "normalisation": "(pixel / 255 - mean) / std",
        "mean": mean,
        "std": std,
        **preprocess._asdict(),
    }


def per_channel(model: ModelConfig) -> tuple[list[float], list[float]]:
    """Mean and std of the input, one value a channel."""
    mean, std = (list(v) * (model.in_chans // len(v)) for v in (model.mean, model.std))
    return mean, std


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file below a folder, by name within it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path)) for path in found}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; raises `CheckpointError`."""
    try:
        return read_object(path, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `pretrain export` or `pretrain import`."""
    try:
        return KEY in read_json(folder / CONFIG)
    except CheckpointError:
        return False


def read_provenance(folder: Path) -> Provenance:
    """The part that is ours of an export's config.json; raises `CheckpointError`. Hashes nothing: see `verify`."""
    path = folder / CONFIG
    try:
        document = read_json(path).get(KEY)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is no export; `pretrain export` makes one of a run: {error}"
        ) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not from `pretrain export` or `pretrain import`")
    if document.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {document.get('version')}; this release reads {VERSION}")
    try:
        if document.get("format") not in EXPORTS:
            raise ValueError(f"it has format {document.get('format')!r}")
        names = document.get("class_names")
        found = Provenance(**document | {"class_names": None if names is None else tuple(map(str, names))})
        if not all(isinstance(part, dict) for part in (found.files, found.model, found.input, found.lineage)):
            raise ValueError("its files, model, input or lineage is no JSON object")
        if names is not None and (isinstance(names, str) or len(names) != found.model.get("num_classes")):
            raise ValueError("it has not one name for each class")
        for name, (size, digest) in found.files.items():
            if not isinstance(size, int) or not isinstance(digest, str):
                raise ValueError(f"of {name!r} it has no size and hash")
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return found


def verify(folder: Path, found: Provenance) -> None:
    """See that the files are those that were written; raises `CheckpointError`, before any of them is loaded."""
    for name, (size, digest) in found.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder / CONFIG} names {name!r}, which is outside of the folder")
        if name == CARD:
            continue  # a card is for people, who fill in the licence
        try:
            same = path.stat().st_size == size and path.is_file() and sha256(path) == digest
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if not same:
            raise CheckpointError(
                f"{path} is damaged or was replaced: its sha256 is not the one in {CONFIG}; export again"
            )
