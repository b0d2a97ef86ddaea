"""From images to shards.

1. source   `open_source` lists what is there: items by split, each with key, label and a way to its bytes
2. layout   `assign` and `cut` decide split, order and shard of each: a hash of (seed, key) decides
3. unpack   images inside parquet files are laid out so that they can be read one by one
4. write    a job for each shard: tar, index, and a note by which the next attempt keeps them
5. publish  the finished folder is renamed into place

Jobs run in worker processes. The same source, options and seed give the same bytes, with any number of workers and
after any number of interruptions.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.data.index import index_path
from pretrain.data.manifest import NAME, Manifest
from pretrain.data.pack.layout import ShardSize, assign, cut
from pretrain.data.pack.open import Options, open_source
from pretrain.data.pack.parquet_images import Columns
from pretrain.data.pack.source import SPLITS, Source
from pretrain.data.pack.write import Encoding, Made, ShardJob, UnpackJob, make_shard, unpack_part
from pretrain.data.pool import Advance, run
from pretrain.data.scan import write_aside, write_manifest
from pretrain.errors import DataError

__all__ = [
    "SKIPPED",
    "Columns",
    "Encoding",
    "Options",
    "Packed",
    "ShardSize",
    "Source",
    "open_source",
    "pack",
]

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class Packed:
    """A split that is done. kept: shards that an interrupted attempt had finished; skipped: images left out."""

    manifest: Manifest
    kept: int
    skipped: int


def pack(
    source: Source,
    out: Path,
    *,
    val_share: float,
    size: ShardSize,
    seed: int,
    encoding: Encoding | None = None,
    overwrite: bool = False,
    workers: int = 1,
    on_unpacked: Advance = lambda _: None,
    on_images: Advance = lambda _: None,
    on_shard: Callable[[], object] = lambda: None,
) -> dict[str, Packed]:
    """Write `out/train` and `out/val` (where it has samples): tars, indexes, manifest.

    All is written in `.NAME.partial` beside `out` and renamed at the end: `out` is whole or it is what it was. Where an
    attempt ends early, its finished shards stay there, and the next one checks and keeps those that it would make
    itself. workers: processes. on_unpacked, on_images: told of each few images.

    Raises `DataError` where `out` exists and `overwrite` is false, where an image cannot be packed, where another
    process is packing to `out`, and where it cannot be written.
    """
    out = out.resolve()  # `.` has no name to put a folder beside
    _refuse_to_replace(out, overwrite)
    splits = assign(source.splits, val_share, seed)
    work = out.with_name(f".{out.name}.partial")
    shards, notes, unpacked = (work / name for name in ("shards", "notes", "unpacked"))
    jobs = [
        ShardJob(
            shards / split / f"{split}-{number:06d}.tar",
            notes / f"{split}-{number:06d}.json",
            unpacked,
            items,
            encoding or Encoding(),
        )
        for split, in_split in splits.items()
        for number, items in enumerate(cut(in_split, size))
    ]
    try:
        with _only_one(work):
            _make_folders(work, jobs, [part.name for part in source.parts])
            unpacking = [UnpackJob(part, unpacked) for part in source.parts]
            for outcome in run(unpack_part, unpacking, workers, on_unpacked):
                outcome.result()
            made = _make(jobs, workers, on_images, on_shard)
            packed = {split: _finish(shards / split, split, made, source.class_names) for split in splits}
            _publish(shards, out)
            shutil.rmtree(work, ignore_errors=True)
    except _BusyError:
        raise
    except (OSError, DataError) as error:
        raise DataError(f"packing stopped, nothing was changed: {error}{_what_remains(work)}") from None
    return packed


def _make(
    jobs: list[ShardJob], workers: int, on_images: Advance, on_shard: Callable[[], object]
) -> dict[Path, Made]:
    made = {}
    for outcome in run(make_shard, jobs, workers, on_images):
        made[jobs[outcome.number].path] = outcome.result()
        on_shard()
    return {job.path: made[job.path] for job in jobs}


def _finish(folder: Path, split: str, made: dict[Path, Made], class_names: list[str] | None) -> Packed:
    """Manifest of a split, and the list of what was left out of it."""
    mine = {path: one for path, one in made.items() if path.parent == folder}
    manifest = write_manifest(folder, (one.indexed for one in mine.values()), class_names)
    skipped = [{"shard": path.name, **asdict(bad)} for path, one in mine.items() for bad in one.skipped]
    if skipped:
        write_aside(folder / SKIPPED, "".join(json.dumps(line) + "\n" for line in skipped).encode())
    return Packed(manifest, sum(one.kept for one in mine.values()), len(skipped))


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists\n  Choose another folder, or replace it with --overwrite.")
    foreign = []
    if out.is_dir():
        foreign = [p.name for p in out.iterdir() if not (p.name in SPLITS and (p / NAME).is_file())]
    elif out.exists():
        raise DataError(f"{out} is no folder\n  Choose another.")
    if foreign:
        raise DataError(
            f"{out} holds more than packed shards ({', '.join(sorted(foreign)[:3])}); --overwrite would delete it\n"
            "  Choose another folder."
        )


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """Make `work` and hold it; the system lets go of it however we end."""
    work.mkdir(parents=True, exist_ok=True)
    held = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _BusyError(f"another process is packing to {work}; wait for it, or end it") from None
        yield
    finally:
        os.close(held)


class _BusyError(DataError):
    """Somebody else holds the folder that we would write in."""


def _make_folders(work: Path, jobs: Sequence[ShardJob], parts: Sequence[str]) -> None:
    """What jobs write into; what another attempt left there for other jobs goes."""
    wanted = {job.note for job in jobs}
    wanted |= {path for job in jobs for path in (job.path, index_path(job.path))}
    wanted |= {work / "unpacked" / f"{part}{suffix}" for part in parts for suffix in (".bin", ".npy")}
    for path in work.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    for folder in {path.parent for path in wanted} | {work / "unpacked"}:
        folder.mkdir(parents=True, exist_ok=True)
    splits = {job.path.parent for job in jobs}
    for folder in work.glob("shards/*"):
        if folder not in splits:
            folder.rmdir()


def _publish(aside: Path, out: Path) -> None:
    """Put `aside` in the place of `out`; where that fails, `out` is put back."""
    if not out.exists():
        aside.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _what_remains(work: Path) -> str:
    """Words about what a failed attempt leaves for the next; `work` goes where that is nothing."""
    if any(work.rglob("*.json")) or any(work.rglob("*.npy")):
        return f"\n  What is finished waits in {work}; the same command goes on from there."
    shutil.rmtree(work, ignore_errors=True)
    return ""
