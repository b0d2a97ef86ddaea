"""What each library calls our model: one module a format, each with what it writes, what it reads, and how its own
library loads it again. `pretrain export`, `pretrain import` and `pretrain predict` are built on these.

A module that is in `EXPORTS` has `inexpressible`, `adapt`, `write` and `load` (`Exporter`), one in `IMPORTS` has
`recognises`, `read` and `judge` (`Importer`). Where names differ from ours, one table of them serves both ways.

This file names them without importing any, so that `--help` answers at once.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.config import ModelConfig
    from pretrain.formats.files import About
    from pretrain.formats.source import Hints, Imported

EXPORTS = {
    "safetensors": ("native", "weights and our own config.json; holds every model, `init.from` takes it"),
    "timm": ("timm_models", "a folder for timm.create_model"),
    "transformers": ("transformers_vit", "a folder for ViTForImageClassification.from_pretrained"),
    "bigvision": ("npz", "big_vision's .npz"),
    "onnx": ("onnx_file", "an ONNX file, uint8 images in, any batch"),
    "mlflow": ("mlflow_model", "an MLflow model (pt2, no pickle) for `mlflow models serve`"),
}
"""Name of a format: its module here, and what `--help` says of it."""

IMPORTS = {
    "timm": ("timm_source", "a folder of timm's, or a state dict as .safetensors or .pth"),
    "transformers": ("transformers_vit", "a folder of ViTForImageClassification or ViTModel"),
    "npz": ("npz", "the original ViT's or big_vision's .npz"),
}


class Exporter(Protocol):
    HOW_TO_LOAD: str
    """A line of Python or shell with {folder}."""

    def inexpressible(self, model: "ModelConfig") -> "Iterator[str]":
        """All that the format cannot say of a model, each with its reason."""

    def adapt(
        self, weights: "Mapping[str, Tensor]", model: "ModelConfig"
    ) -> "tuple[Mapping[str, Tensor], ModelConfig]":
        """The same function as the format says it, of a model that it can express."""

    def write(
        self, folder: Path, weights: "Mapping[str, Tensor]", model: "ModelConfig", about: "About"
    ) -> None:
        """Put what `adapt` gave into an empty folder."""

    def load(self, folder: Path) -> "Callable[[Tensor], Tensor]":
        """Load it as its users will: a function of uint8 images [B, H, W, C] to float32 logits [B, K]."""


class Importer(Protocol):
    HINTS: set[str]
    """Fields of `Hints` that mean something for this format."""

    def recognises(self, source: Path) -> bool:
        """Whether a file or folder looks like one of this format; reads names, at most a small JSON."""

    def read(self, source: Path, hints: "Hints") -> "Imported":
        """Weights and config as we say them; raises `CheckpointError` with all that is wrong or inexpressible."""

    def judge(self, source: Path, imported: "Imported") -> "Callable[[Tensor], Tensor]":
        """The library's own network of what was read: a function of uint8 images [B, H, W, C] to logits [B, K], or to the
        head's input where there is no head. Nothing in a config of the source is believed that `read` has not vetted."""


def exporter(name: str) -> Exporter:
    return cast(Exporter, importlib.import_module(f"pretrain.formats.{EXPORTS[name][0]}"))


def importer(name: str) -> Importer:
    return cast(Importer, importlib.import_module(f"pretrain.formats.{IMPORTS[name][0]}"))
