"""Names and the manifest of a checkpoint."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.documents import replace_file, write_object
from pretrain.errors import CheckpointError

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
VERSION = 1
MAX_MANIFEST_BYTES = 2**30
"""A manifest names every slice of every rank; more than this is none."""
_STEP = re.compile(r"step_(\d{8,})")
_RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is. Everything but the slices themselves; JSON on disk."""

    step: int
    world_size: int
    zero_stage: int
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    data: Mapping[str, Any]
    progress: Mapping[str, Any]
    metrics: Mapping[str, float]
    optimizer: str
    optimizer_steps: int
    shapes: Mapping[str, list[int]]
    slices: Mapping[str, list[tuple[int, int, int]]]
    """parameter -> (start, stop, rank) of every slice, in order; together they cover the parameter."""

    files: Mapping[str, tuple[int, str]]
    """file name -> (bytes, sha256)."""

    version: int = VERSION

    def problems(self) -> list[str]:
        """Parameters whose slices do not cover them exactly; empty for a whole checkpoint."""
        found = []
        for name, shape in self.shapes.items():
            end = 0
            for start, stop, _ in self.slices.get(name, []):
                if start != end or stop <= start:
                    break
                end = stop
            if end != math.prod(shape):
                found.append(f"{name}: slices cover {end} of {math.prod(shape)} elements")
        return found


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def slice_key(kind: str, name: str, start: int, stop: int) -> str:
    """`kind` is `weight` or a state of the optimizer such as `exp_avg`."""
    return f"{kind}:{name}:{start}:{stop}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoint folders of a run, oldest first. Committed is not verified."""
    found = [
        p for p in (run_dir / FOLDER).glob("step_*") if _STEP.fullmatch(p.name) and (p / MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def pointer(run_dir: Path, name: str) -> Path | None:
    """The folder that `latest` or `best` names; None where there is no such file or folder."""
    file = run_dir / FOLDER / name
    if not file.is_file():
        return None
    target = file.read_text(errors="replace").strip()
    folder = run_dir / FOLDER / target
    return folder if _STEP.fullmatch(target) and folder.is_dir() else None


def point(run_dir: Path, name: str, folder: Path) -> None:
    """Make `latest` or `best` name a folder, atomically."""
    replace_file(run_dir / FOLDER / name, folder.name + "\n")


def resolve(path: Path, which: str) -> Path:
    """The checkpoint folder meant by a run directory or a checkpoint folder; `which` is `last` or `best`."""
    if (path / MANIFEST).is_file():
        return path
    known = checkpoints(path)
    if not known:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run directory with checkpoints/ or a step_N folder of one"
        )
    if which == "last":
        # a damaged one that the run fell back from may have a later step than the one saved last
        return pointer(path, LATEST) or known[-1]
    best = pointer(path, BEST)
    if best is None:
        raise CheckpointError(
            f"{path} has no best checkpoint: it was not evaluated or checkpoint.keep_best was off; use the last one"
        )
    return best


def read_manifest(folder: Path) -> Manifest:
    """Read and verify a manifest; raises `CheckpointError` if it is missing, damaged or of another version."""
    file = folder / MANIFEST
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("it is larger than any manifest")
        text = file.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a manifest ({error})") from None
    return parse_manifest(text, str(file))


def parse_manifest(text: bytes, file: str) -> Manifest:
    """`read_manifest` for a text; `file` stands for it in messages."""
    try:
        document = json.loads(text)
        body, digest = document["body"], document["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a manifest ({error or type(error).__name__})"
        ) from None
    if hashlib.sha256(_canonical(body)).hexdigest() != digest:
        raise CheckpointError(f"{file} is damaged: its content does not match its sha256")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has version {body.get('version')}; this release reads version {VERSION}"
        )
    try:
        manifest = Manifest(**body)
    except TypeError as error:
        raise CheckpointError(
            f"{file} has other fields than a manifest of version {VERSION}: {error}"
        ) from None
    problem = _hostile(manifest)
    if problem is not None:
        raise CheckpointError(f"{file} is not one that this program wrote: {problem}")
    return manifest


def _hostile(manifest: Manifest) -> str | None:
    """What no save writes: its sha256 proves a manifest whole, not honest."""
    if type(manifest.step) is not int or manifest.step < 0:
        return f"step {manifest.step!r}"
    sections = (manifest.config, manifest.plan, manifest.data, manifest.progress, manifest.metrics)
    if not all(
        isinstance(part, dict) for part in (*sections, manifest.shapes, manifest.slices, manifest.files)
    ):
        return "a section of it is no object"
    for name, entry in manifest.files.items():
        if not _RANK_FILE.fullmatch(name):
            return f"a file called {name!r}"
        match entry:
            case [int(size), str(digest)] if type(size) is int and size >= 0 and _SHA256.fullmatch(digest):
                pass
            case _:
                return f"{name} of {entry!r}"
    for name, shape in manifest.shapes.items():
        if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
            return f"{name!r} of shape {shape!r}"
    for name, parts in manifest.slices.items():
        if not isinstance(parts, list) or not all(
            isinstance(part, list | tuple) and len(part) == 3 and all(type(n) is int and n >= 0 for n in part)
            for part in parts
        ):
            return f"slices of {name!r}"
        if any(rank_file(rank) not in manifest.files for _, _, rank in parts):
            return f"slices of {name!r} in files that are not listed"
    return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    document = {"sha256": manifest_digest(manifest), "body": asdict(manifest)}
    write_object(folder / MANIFEST, document)


def manifest_digest(manifest: Manifest) -> str:
    """sha256 of the manifest's content, hex: the identity of a checkpoint, since it names the hash of every file."""
    return hashlib.sha256(_canonical(json.loads(json.dumps(asdict(manifest))))).hexdigest()


def config_of(manifest: Manifest, folder: Path) -> Config:
    """The config that a checkpoint was written under."""
    try:
        return Config.model_validate_json(json.dumps(manifest.config))
    except ValueError as error:
        raise CheckpointError(
            f"{folder} was written under a config that this release does not read: {error}"
        ) from None


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
