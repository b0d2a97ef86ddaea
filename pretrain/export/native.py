"""Our own export: model.safetensors and a config.json that says everything needed to build the model again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.export.files import CONFIG, WEIGHTS, Preprocess, Provenance, per_channel
from pretrain.model import VisionTransformer, build


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """Every model is expressed as it is."""
    return weights, model


def describe(model: ModelConfig, preprocess: Preprocess, provenance: Provenance) -> dict[str, Any]:
    mean, std = per_channel(model)
    return {
        Provenance.KEY: provenance.as_dict(),
        "model": model.model_dump(mode="json"),
        "input": {
            "images": f"uint8 [batch, {model.img_size[0]}, {model.img_size[1]}, {model.in_chans}]",
            "normalisation": "(pixel / 255 - mean) / std, inside the model",
            "mean": mean,
            "std": std,
            **preprocess._asdict(),
        },
    }


def logits(folder: Path, images: Tensor) -> Tensor:
    model, _ = load_export(folder)
    with torch.no_grad():
        answer: Tensor = model(images)
    return answer


def load_export(folder: Path | str) -> tuple[VisionTransformer, ModelConfig]:
    """The exported model, float32 on the host, and its config.

    Raises `CheckpointError` if a file is missing, damaged, or not what config.json says; no pickle is read.
    """
    folder = Path(folder)
    document = _read_config(folder / CONFIG)
    _verify(folder / WEIGHTS, document[Provenance.KEY])
    try:
        config = ModelConfig.model_validate_json(json.dumps(document["model"]))
        return build(config, load_file(folder / WEIGHTS)), config
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold the model that it describes: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict) or not {Provenance.KEY, "model"} <= document.keys():
        raise CheckpointError(f"{path} is not from `pretrain export --format safetensors`")
    version = document[Provenance.KEY].get("version")
    if version != Provenance.VERSION:
        raise CheckpointError(f"{path} has version {version}; this release reads {Provenance.VERSION}")
    return document


def _verify(weights: Path, expected: dict[str, Any]) -> None:
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be read: {error.strerror}") from None
    if digest != expected.get("sha256"):
        raise CheckpointError(
            f"{weights} is damaged or was replaced: its sha256 is not the one in {CONFIG}; export again"
        )
