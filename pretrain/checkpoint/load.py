"""Reading a checkpoint: verify, then read just the ranges that are asked for."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import Manifest
from pretrain.config import Config, ModelConfig
from pretrain.distributed import Ranks
from pretrain.errors import CheckpointError
from pretrain.logs import log

MOST_MAPPED = 16 * 2**20
"""Bytes read from files that are mapped, before the mappings are let go of: their pages count as this process's memory."""


class Slices:
    """A verified checkpoint's tensors, read by range. Memory stays that of the ranges asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}
        self._mapped = 0

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter (or of its optimizer state): fp32 [stop - start]."""
        out = torch.empty(stop - start)
        for first, last, rank in self.manifest.slices[name]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                try:
                    stored = self._file(rank).get_slice(layout.slice_key(kind, name, first, last))
                    out[low - start : high - start] = stored[low - first : high - first]
                except (
                    SafetensorError,
                    RuntimeError,
                    IndexError,
                ) as error:  # whole, and yet not what a save writes
                    raise CheckpointError(
                        f"{self.folder / layout.rank_file(rank)} does not hold {kind} {name} as its manifest says: {error}"
                    ) from None
                except FileNotFoundError:
                    raise CheckpointError(
                        f"{self.folder} was deleted while it was read: the run that it belongs to has a newer one"
                    ) from None
        self._mapped += out.nbytes
        if self._mapped > MOST_MAPPED:
            self.close()
        return out

    def whole(self, name: str) -> Tensor:
        """A parameter's fp32 weight in its own shape."""
        shape = self.manifest.shapes[name]
        return self.read("weight", name, 0, torch.Size(shape).numel()).reshape(shape)

    def close(self) -> None:
        """Let go of the files: a shared file system does not delete what is open somewhere."""
        self._open.clear()
        self._mapped = 0

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
    digest: str
    """sha256 of the manifest, and with it of everything that the checkpoint holds; hex."""

    config: Config
    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]
    """Lazy: parameter name (timm's) to fp32 tensor on the CPU."""

    slices: Slices

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def close(self) -> None:
        self.slices.close()


def open_weights(path: Path, which: str = "last") -> WeightsFile:
    """Verify and open the checkpoint that a run directory (its `last` or `best`) or a step folder names. One process.

    Raises `CheckpointError` where there is none, or it is damaged.
    """
    folder = layout.resolve(path, which)
    manifest = layout.read_manifest(folder)
    return _opened(folder, manifest, damaged(folder, manifest, 0, 1))


def open_weights_together(path: Path, which: str, ranks: Ranks) -> WeightsFile:
    """`open_weights` by all ranks: rank 0 says which checkpoint, all share the hashing and fail together.

    A run that is still saving has another `last` from one moment to the next.
    """
    folder = None
    with ranks.together():
        if ranks.is_main:
            folder = layout.resolve(path, which)
    folder = ranks.broadcast(folder)
    manifest, problems = _verified_together(folder, ranks)
    if manifest is None:
        raise CheckpointError(f"{folder} was not loaded: {'; '.join(problems)}")
    return _opened(folder, manifest, problems)


def newest_valid(run_dir: Path, ranks: Ranks, before: float = math.inf) -> Slices | None:
    """The newest checkpoint of a run that verifies, the same on all ranks; None where there is none at all.

    before: only checkpoints of earlier steps than this count.

    All ranks share the hashing. Damaged ones are named in the log and left where they are. Raises
    `CheckpointError` if there are checkpoints and none verifies.
    """
    known = [folder for folder in layout.checkpoints(run_dir) if layout.step_of(folder) < before]
    folders = ranks.broadcast([folder.name for folder in reversed(known)])
    rejected = []
    for name in folders:
        folder = run_dir / layout.FOLDER / name
        manifest, problems = _verified_together(folder, ranks)
        if manifest is not None and not problems:
            return Slices(folder, manifest)
        rejected.append(f"{folder}: {'; '.join(problems)}")
        if ranks.is_main:
            log.warning("damaged checkpoint passed over: %s", rejected[-1])
    if rejected:
        raise CheckpointError(
            "none of the run's checkpoints can be loaded:\n  " + "\n  ".join(rejected) + "\n"
            f"Restore one from a copy, or move {run_dir / layout.FOLDER} away to start the run anew."
        )
    return None


def _opened(folder: Path, manifest: Manifest, problems: Sequence[str]) -> WeightsFile:
    if problems:
        raise CheckpointError(f"{folder} is damaged and was not loaded: {'; '.join(problems)}")
    slices = Slices(folder, manifest)
    config = layout.config_of(manifest, folder)
    digest = layout.manifest_digest(manifest)
    return WeightsFile(folder, manifest.step, digest, config, manifest.metrics, _Weights(slices), slices)


def _verified_together(folder: Path, ranks: Ranks) -> tuple[Manifest | None, list[str]]:
    """A checkpoint's manifest, and what any rank found wrong. All ranks, each hashing its share; same list on all."""
    manifest, problems = None, []
    try:
        manifest = layout.read_manifest(folder)
        problems = damaged(folder, manifest, ranks.rank, ranks.size)
    except CheckpointError as error:
        problems = [str(error)]
    digests, found = zip(
        *ranks.gather((manifest and layout.manifest_digest(manifest), problems)), strict=True
    )
    if len(set(digests)) > 1 and None not in digests:
        found = (
            *found,
            ["the ranks do not see the same manifest: the file system is not shared, or it lags"],
        )
    return manifest, list(dict.fromkeys(problem for answer in found for problem in answer))


def damaged(folder: Path, manifest: Manifest, part: int, parts: int) -> list[str]:
    """What is wrong with the `part`-th of `parts` shares of a checkpoint's files."""
    problems = manifest.problems() if part == 0 else []
    for name, (size, digest) in list(manifest.files.items())[part::parts]:
        try:
            with (folder / name).open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    problems.append(f"{name} has {found} bytes, not {size}")
                elif hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    problems.append(f"{name} does not match its sha256")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:  # a bad sector is damage too: the run falls back
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems
