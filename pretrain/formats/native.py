"""Our own export: model.safetensors and a config.json that says everything needed to build the model again.

It is what `pretrain import` makes, and what `init.from` takes besides a run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.distributed import Ranks
from pretrain.errors import CheckpointError
from pretrain.formats.files import CONFIG, WEIGHTS, About, Provenance, read_provenance, sha256, verify
from pretrain.model import LazyWeights, VisionTransformer, build
from pretrain.transfer.fits import wrong_weights

HOW_TO_LOAD = "pretrain.formats.native.load_export('{folder}'), or init.from: {folder}"
NAME = "safetensors"


def inexpressible(model: ModelConfig) -> Iterator[str]:
    """Nothing."""
    yield from ()


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """Every model is expressed as it is."""
    return weights, model


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text("{}")


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(load_export(folder)[0])


def load_export(folder: Path | str) -> tuple[VisionTransformer, ModelConfig]:
    """The exported model, float32 on the host, and its config.

    Raises `CheckpointError` if a file is missing, damaged, or not what config.json says; no pickle is read.
    """
    folder = Path(folder)
    config = _verified(folder)
    try:
        return build(config, load_file(folder / WEIGHTS)), config
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold the model that it describes: {error}") from None


def open_export(folder: Path) -> tuple[Mapping[str, Tensor], Provenance]:
    """The weights of a verified export, read when they are asked for, and all that its config.json says of them."""
    _verified(folder)
    found = read_provenance(folder)
    weights = _lazy(folder / WEIGHTS)
    if problems := wrong_weights(weights, found.config):
        raise CheckpointError(f"{folder} does not hold the model that it describes: {'; '.join(problems)}")
    return weights, found


@dataclass(frozen=True)
class ExportedWeights:
    """A verified export as what a hand-off needs of it."""

    path: Path
    step: int
    digest: str
    """sha256 of its config.json, and with it of every file; hex."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    """Lazy: parameter name to fp32 tensor on the CPU."""

    def close(self) -> None:
        """Nothing is held open."""


def open_export_together(folder: Path, ranks: Ranks) -> ExportedWeights:
    """Open an export on all ranks: rank 0 verifies it, the others see that they look at the same."""
    seen = None
    with ranks.together():
        if ranks.is_main:
            _verified(folder)
            seen = sha256(folder / CONFIG)
    digest = str(ranks.broadcast(seen))
    with ranks.together():
        if not (folder / CONFIG).is_file() or sha256(folder / CONFIG) != digest:
            raise CheckpointError(
                f"rank {ranks.rank} does not see the same {folder / CONFIG} as rank 0: the file system is not shared, "
                "or it lags"
            )
        found = read_provenance(folder)
        weights = _lazy(folder / WEIGHTS)
    step = found.lineage.get("step")
    return ExportedWeights(folder, step if isinstance(step, int) else 0, digest, found.config, weights)


def _verified(folder: Path) -> ModelConfig:
    found = read_provenance(folder)
    if WEIGHTS not in found.files and found.format == NAME:
        raise CheckpointError(f"{folder / CONFIG} is damaged: it does not name its weights")
    if found.format != NAME:
        raise CheckpointError(
            f"{folder} is an export of format {found.format}; `pretrain import` makes one that can be loaded here"
        )
    verify(folder, found)
    with _opened(folder / WEIGHTS) as tensors:
        if found.config.num_blocks > len(tensors.keys()):  # nothing is built, not even without memory
            raise CheckpointError(f"{folder} does not hold the model that it describes: too few weights")
    return found.config


def _lazy(file: Path) -> LazyWeights:
    """The tensors of a file as float32, each read when it is asked for."""
    with _opened(file) as tensors:
        names = list(tensors.keys())
    return LazyWeights({name: _reader(file, name) for name in names})


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with _opened(file) as tensors:
            value: Tensor = tensors.get_tensor(name)
        return value.float()

    return read


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
