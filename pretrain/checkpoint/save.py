"""Writing a checkpoint: aside, flushed, hashed, agreed, renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import Manifest
from pretrain.config import Config, Plan
from pretrain.distributed import Ranks
from pretrain.errors import CheckpointError
from pretrain.logs import log


@dataclass(frozen=True)
class Content:
    """What goes into a checkpoint. Tensors are this rank's own; everything else is the same on all ranks."""

    step: int
    config: Config
    plan: Plan
    data: Mapping[str, Any]
    progress: Mapping[str, Any]
    metrics: Mapping[str, float]
    optimizer_steps: int
    shapes: Mapping[str, tuple[int, ...]]
    slices: Iterable[tuple[str, int, int, Mapping[str, Tensor]]]
    """(parameter, start, stop, {kind: fp32 tensor of stop - start elements}) for each slice this rank owns."""


def save(run_dir: Path, content: Content, ranks: Ranks) -> Path:
    """Commit a checkpoint and return its folder. All ranks; returns when it is durable.

    Raises `CheckpointError` on every rank if any of them cannot write; what was committed before stays.
    """
    folder = layout.folder_of(run_dir, content.step)
    aside = folder.with_name(folder.name + ".tmp")
    receipt, problem = None, None
    try:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    except OSError as error:
        problem = str(error)
    ranks.barrier()
    try:
        if problem is None:
            receipt = _write_rank_file(aside, content, ranks.rank)
    except OSError as error:
        problem = str(error)
    answers = ranks.gather((receipt, problem))
    failed = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(answers) if why is not None]
    if not failed:
        problem = None
        if ranks.is_main:
            try:
                _commit(aside, folder, _manifest(content, [r for r, _ in answers if r], ranks.size))
            except OSError as error:
                problem = str(error)
        problem = ranks.broadcast(problem)
        failed = [f"rank 0: {problem}"] if problem else []
    if failed:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {content.step} could not be written ({'; '.join(failed)}). "
            "Earlier checkpoints are untouched; free space or mend the path, then start the run again."
        )
    return folder


def mark_best(run_dir: Path, folder: Path) -> None:
    """Rank 0: let `best` name this checkpoint."""
    layout.point(run_dir, layout.BEST, folder)


def prune(run_dir: Path, keep: int, step: int) -> None:
    """Rank 0: delete all but the newest `keep` checkpoints and the best one, and what killed saves left.

    step: of the checkpoint just saved. Later ones are damaged ones that the run fell back from: they count for nothing
    and stay where they are until the run comes past them.
    """
    known = [folder for folder in layout.checkpoints(run_dir) if layout.step_of(folder) <= step]
    spared = {layout.pointer(run_dir, layout.BEST), *known[-keep:]}
    for folder in known:
        if folder not in spared:
            _remove(folder)
    for left in (run_dir / layout.FOLDER).glob("step_*.*"):
        shutil.rmtree(left, ignore_errors=True)
        log.debug("removed %s", left)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = folder.with_name(folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


_Receipt = tuple[str, int, str, list[tuple[str, int, int]]]


def _write_rank_file(folder: Path, content: Content, rank: int) -> _Receipt:
    """Write this rank's slices; returns (file name, bytes, sha256, slices)."""
    tensors, slices = {}, []
    for name, start, stop, kinds in content.slices:
        slices.append((name, start, stop))
        for kind, tensor in kinds.items():
            tensors[layout.slice_key(kind, name, start, stop)] = tensor.detach().cpu().contiguous()
    path = folder / layout.rank_file(rank)
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.name, path.stat().st_size, digest, slices


def _manifest(content: Content, receipts: list[_Receipt], world_size: int) -> Manifest:
    slices: dict[str, list[tuple[int, int, int]]] = {name: [] for name in content.shapes}
    for rank, (_, _, _, owned) in enumerate(receipts):
        for name, start, stop in owned:
            slices[name].append((start, stop, rank))
    manifest = Manifest(
        step=content.step,
        world_size=world_size,
        zero_stage=content.plan.zero_stage,
        config=content.config.model_dump(mode="json", by_alias=True),
        plan=content.plan.as_dict(),
        data=content.data,
        progress=content.progress,
        metrics=content.metrics,
        optimizer=content.config.optim.name,
        optimizer_steps=content.optimizer_steps,
        shapes={name: list(shape) for name, shape in content.shapes.items()},
        slices={name: sorted(parts) for name, parts in slices.items()},
        files={name: (size, digest) for name, size, digest, _ in receipts},
    )
    problems = manifest.problems()
    assert not problems, f"slices do not cover the model: {problems}"
    return manifest


def _commit(aside: Path, folder: Path, manifest: Manifest) -> None:
    layout.write_manifest(aside, manifest)
    if folder.exists():  # a damaged one that this run fell back from
        _remove(folder)
    aside.rename(folder)
    layout.sync_folder(folder.parent)
    layout.point(folder.parent.parent, layout.LATEST, folder)
