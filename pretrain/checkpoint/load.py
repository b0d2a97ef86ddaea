"""Reading a checkpoint: verify, then read just the ranges that are asked for."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import Manifest
from pretrain.config import Config, ModelConfig
from pretrain.distributed import Ranks
from pretrain.errors import CheckpointError
from pretrain.logs import log


class Slices:
    """A verified checkpoint's tensors, read by range. Memory stays that of the ranges asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter (or of its optimizer state): fp32 [stop - start]."""
        out = torch.empty(stop - start)
        for first, last, rank in self.manifest.slices[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                stored = self._file(rank).get_slice(layout.slice_key(kind, name, first, last))
                out[low - start : high - start] = stored[low - first : high - first]
        return out

    def whole(self, name: str) -> Tensor:
        """A parameter's fp32 weight in its own shape."""
        shape = self.manifest.shapes[name]
        return self.read("weight", name, 0, torch.Size(shape).numel()).reshape(shape)

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self.folder / layout.rank_file(rank), framework="pt")
        return self._open[rank]


class _Weights(Mapping[str, Tensor]):
    """Parameter name to fp32 weight, read when asked for."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def __getitem__(self, name: str) -> Tensor:
        return self._slices.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices.manifest.shapes)

    def __len__(self) -> int:
        return len(self._slices.manifest.shapes)


@dataclass(frozen=True)
class WeightsFile:
    """A verified checkpoint as what a hand-off, an evaluation or an export needs of it."""

    path: Path
    step: int
    config: Config
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]
    """Lazy: parameter name (timm's) to fp32 tensor on the CPU."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model


def open_weights(path: Path, which: str = "last") -> WeightsFile:
    """Verify and open the checkpoint that a run directory (its `last` or `best`) or a step folder names. One process."""
    folder = layout.resolve(path, which)
    manifest = layout.read_manifest(folder)
    problems = _damaged(folder, manifest, 0, 1)
    if problems:
        raise CheckpointError(f"{folder} is damaged and was not loaded: {'; '.join(problems)}")
    config = config_of(manifest, folder)
    return WeightsFile(folder, manifest.step, config, manifest.metrics, _Weights(Slices(folder, manifest)))


def newest_valid(run_dir: Path, ranks: Ranks) -> Slices | None:
    """The newest checkpoint of a run that verifies, the same on all ranks; None where there is none at all.

    All ranks share the hashing. Damaged ones are named in the log and left where they are. Raises
    `CheckpointError` if there are checkpoints and none verifies.
    """
    folders = ranks.broadcast([folder.name for folder in reversed(layout.checkpoints(run_dir))])
    rejected = []
    for name in folders:
        folder = run_dir / layout.FOLDER / name
        manifest, problems = None, []
        try:
            manifest = layout.read_manifest(folder)
            problems = _damaged(folder, manifest, ranks.rank, ranks.size)
        except CheckpointError as error:
            problems = [str(error)]
        found = [problem for answer in ranks.gather(problems) for problem in answer]
        if manifest is not None and not found:
            return Slices(folder, manifest)
        rejected.append(f"{folder}: {'; '.join(dict.fromkeys(found))}")
        if ranks.is_main:
            log.warning("damaged checkpoint passed over: %s", rejected[-1])
    if rejected:
        raise CheckpointError(
            "none of the run's checkpoints can be loaded:\n  " + "\n  ".join(rejected) + "\n"
            f"Restore one from a copy, or move {run_dir / layout.FOLDER} away to start the run anew."
        )
    return None


def config_of(manifest: Manifest, folder: Path) -> Config:
    """The config that a checkpoint was written under."""
    try:
        return Config.model_validate_json(json.dumps(manifest.config))
    except ValueError as error:
        raise CheckpointError(
            f"{folder} was written under a config that this release does not read: {error}"
        ) from None


def _damaged(folder: Path, manifest: Manifest, part: int, parts: int) -> list[str]:
    """What is wrong with the `part`-th of `parts` shares of a checkpoint's files."""
    problems = manifest.problems() if part == 0 else []
    for name, (size, digest) in list(manifest.files.items())[part::parts]:
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        else:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    problems.append(f"{name} does not match its sha256")
    return problems
