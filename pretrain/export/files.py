"""What all formats share: names of the files, and what config.json says beside the format's own."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pretrain.config import ModelConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Preprocess(NamedTuple):
    """How validation images were made: `val_crop` and `interpolation` of the data section."""

    crop: float = 1.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass(frozen=True)
class Provenance:
    """The weights file that a config.json belongs to, and where its numbers come from."""

    KEY: ClassVar = "pretrain"
    VERSION: ClassVar = 1

    sha256: str
    bytes: int
    lineage: Mapping[str, Any]

    @classmethod
    def of(cls, weights: Path, lineage: Mapping[str, Any]) -> "Provenance":
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(digest, weights.stat().st_size, lineage)

    def as_dict(self) -> dict[str, Any]:
        return {"version": self.VERSION, **asdict(self)}


def per_channel(model: ModelConfig) -> tuple[list[float], list[float]]:
    """Mean and std of the input, one value a channel."""
    mean, std = (list(v) * (model.in_chans // len(v)) for v in (model.mean, model.std))
    return mean, std
