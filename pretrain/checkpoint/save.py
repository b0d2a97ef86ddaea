"""Writing a checkpoint: aside, flushed, hashed, agreed, renamed."""

import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pretrain import faults
from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import Manifest
from pretrain.config import Config, Plan
from pretrain.distributed import Ranks
from pretrain.documents import sync_folder
from pretrain.errors import RunDirError
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


class Saver:
    """Saves checkpoints of one run, one at a time, while training goes on. All ranks make one and call it together.

    `begin` copies this rank's slices to host memory, which is all that training waits for; a thread writes, flushes
    and hashes them. `commit` publishes the checkpoint once every rank has written: no collective runs in the thread.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._run_dir, self._ranks = run_dir, ranks
        self._writing: _Writing | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a save was begun and not committed; the same on all ranks."""
        return self._writing is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the pending save, or failed to."""
        return self._writing is not None and not self._writing.thread.is_alive()

    def begin(self, content: Content) -> None:
        """Start a save of `content`, which may change afterwards. All ranks; none may be pending."""
        assert self._writing is None, "the save before was not committed"
        faults.at("save", content.step)
        folder = layout.folder_of(self._run_dir, content.step)
        aside = folder.with_name(folder.name + ".tmp")
        problem = None
        try:
            if self._ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                # Its parents are not made: in a run directory that is gone, unmounted say, nothing is saved.
                aside.parent.mkdir(exist_ok=True)
                aside.mkdir()
        except OSError as error:
            problem = str(error)
        self._ranks.barrier()
        self._writing = _Writing(content, folder, aside, self._ranks.rank, problem)

    def commit(self) -> Path:
        """Finish the pending save: wait for this rank's part, agree, publish. All ranks; returns its folder.

        Raises `RunDirError` on every rank if any of them could not write; what was committed before stays.
        """
        assert self._writing is not None, "no save was begun"
        writing, self._writing = self._writing, None
        faults.at("commit", writing.content.step)
        writing.thread.join()
        answers = self._ranks.gather((writing.receipt, writing.problem))
        failed = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(answers) if why is not None]
        if not failed:
            problem = None
            if self._ranks.is_main:
                try:
                    receipts = [receipt for receipt, _ in answers if receipt]
                    manifest = _manifest(writing.content, receipts, self._ranks.size)
                    publish(writing.aside, writing.folder, manifest)
                except OSError as error:
                    problem = str(error)
            problem = self._ranks.broadcast(problem)
            failed = [f"rank 0: {problem}"] if problem else []
        if failed:
            if self._ranks.is_main:
                shutil.rmtree(writing.aside, ignore_errors=True)
            raise RunDirError(
                f"the checkpoint of step {writing.content.step} could not be written ({'; '.join(failed)}). "
                "Earlier checkpoints are untouched; free space or mend the path, then start the run again."
            )
        return writing.folder


class _Writing:
    """A save under way on this rank. receipt or problem: once the thread has ended."""

    def __init__(self, content: Content, folder: Path, aside: Path, rank: int, problem: str | None) -> None:
        self.content, self.folder, self.aside, self.problem = content, folder, aside, problem
        self.receipt: _Receipt | None = None
        self._slices = _on_host(content.slices)
        self.thread = threading.Thread(target=self._write, args=(rank,), name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self, rank: int) -> None:
        try:
            faults.at("write", self.content.step)
            if self.problem is None:
                self.receipt = _write_rank_file(self.aside, self._slices, rank)
        except OSError as error:
            self.problem = str(error)
        except Exception as error:  # out of memory, say: all ranks have to hear of it
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self._slices = []  # the memory is free before the commit


_Slices = list[tuple[str, int, int, dict[str, Tensor]]]


def _on_host(slices: Iterable[tuple[str, int, int, Mapping[str, Tensor]]]) -> _Slices:
    """A copy in host memory, from which training may go on to change the original."""
    copies = [(n, a, b, {kind: _copy(t.detach()) for kind, t in kinds.items()}) for n, a, b, kinds in slices]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def amend(folder: Path, progress: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Rank 0: give a committed checkpoint what was learnt of it since. Its weights stay as they are."""
    manifest = layout.read_manifest(folder)
    layout.write_manifest(folder, replace(manifest, progress=progress, metrics=metrics))


def mark_best(run_dir: Path, folder: Path) -> None:
    """Rank 0: let `best` name this checkpoint."""
    layout.point(run_dir, layout.BEST, folder)


def prune(run_dir: Path, keep: int, step: int, in_use: Path | None = None) -> None:
    """Rank 0: delete all but the newest `keep` checkpoints and the best one, and what killed saves left.

    step: of the checkpoint just saved. Later ones are damaged ones that the run fell back from: they count for nothing
    and stay where they are until the run comes past them. in_use: one that stays for now, whichever it is.
    """
    known = [folder for folder in layout.checkpoints(run_dir) if layout.step_of(folder) <= step]
    spared = {layout.pointer(run_dir, layout.BEST), in_use, *known[-keep:]}
    for folder in known:
        if folder not in spared:
            _remove(folder)
    for left in (run_dir / layout.FOLDER).glob("step_*.*"):
        shutil.rmtree(left, ignore_errors=True)
        log.debug("removed %s", left)


def remove_later(run_dir: Path, step: int) -> None:
    """Rank 0: delete the checkpoints of steps after this one, to which the run goes back."""
    for folder in reversed(layout.checkpoints(run_dir)):
        if layout.step_of(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks like one."""
    shutil.rmtree(
        _set_aside(folder), ignore_errors=True
    )  # what somebody holds open goes with a later `prune`


def _set_aside(folder: Path) -> Path:
    doomed = folder.with_name(folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


_Receipt = tuple[str, int, str, list[tuple[str, int, int]]]


def _write_rank_file(folder: Path, owned: _Slices, rank: int) -> _Receipt:
    """Write this rank's slices; returns (file name, bytes, sha256, slices)."""
    tensors, slices = {}, []
    for name, start, stop, kinds in owned:
        slices.append((name, start, stop))
        for kind, tensor in kinds.items():
            tensors[layout.slice_key(kind, name, start, stop)] = tensor
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


def publish(aside: Path, folder: Path, manifest: Manifest) -> None:
    """One process: make the files written aside the run's newest checkpoint."""
    faults.at("manifest", manifest.step)
    layout.write_manifest(aside, manifest)
    faults.at("rename", manifest.step)
    doomed = _set_aside(folder) if folder.exists() else None  # a damaged one that this run fell back from
    aside.rename(folder)
    if doomed is not None:
        shutil.rmtree(doomed, ignore_errors=True)
    sync_folder(folder.parent)
    faults.at("latest", manifest.step)
    layout.point(folder.parent.parent, layout.LATEST, folder)
