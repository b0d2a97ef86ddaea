"""A data set: shards in a fixed order, opened from their manifests. No tar and no index is read here."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.config.plan import DataFacts
from pretrain.data.index import index_path, remedy
from pretrain.data.manifest import NAME, Manifest, Shard, digest, read_manifest
from pretrain.draws import IntArray
from pretrain.errors import DataError

_SCHEME = re.compile(r"^\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_SHOWN = 5


@dataclass(frozen=True)
class Dataset:
    """paths: where each shard lies; shards: what the manifest says of it; labels: lowest and highest."""

    source: str
    paths: tuple[Path, ...]
    shards: tuple[Shard, ...]
    labels: tuple[int, int]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def shard_samples(self) -> IntArray:
        """int64 [number of shards]."""
        return np.fromiter((shard.samples for shard in self.shards), np.int64, len(self.shards))

    @cached_property
    def starts(self) -> IntArray:
        """Number of the first sample of each shard, and the number of samples: int64 [number of shards + 1]."""
        return np.concatenate(([0], np.cumsum(self.shard_samples)))

    @cached_property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """What identifies the samples and their numbers; hex."""
        return digest(self.shards)

    def locate(self, numbers: IntArray) -> tuple[IntArray, IntArray]:
        """Sample numbers in the data set to (shard, sample in it)."""
        shard = np.searchsorted(self.starts, numbers, side="right") - 1
        return shard, numbers - self.starts[shard]

    def require_classes(self, num_classes: int) -> None:
        """Raise `DataError` where a label is not below `num_classes`."""
        if self.labels[1] >= num_classes:
            raise DataError(
                f"{self.source}: labels go up to {self.labels[1]}, but model.num_classes is {num_classes}; "
                f"labels must be below it.\n  Set model.num_classes to at least {self.labels[1] + 1}, or fix the labels."
            )


def open_dataset(source: str) -> Dataset:
    """Open a folder of shards (all of its manifest), or a brace pattern of tars such as `dir/a-{000..099}.tar`.

    Raises `DataError` for anything but local paths, for shards without a manifest or not in it, for shards or
    indexes that are missing, and for tars of another size than the manifest says.
    """
    _refuse_remote(source)
    folder = Path(source)
    if folder.is_dir() or not source.strip().endswith(".tar"):
        manifests = {folder: read_manifest(folder)}
        paths = tuple(folder / shard.name for shard in manifests[folder].shards)
    else:
        paths = _expand(source)
        manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(p.parent for p in paths)}
    listed = {f / shard.name: shard for f, manifest in manifests.items() for shard in manifest.shards}
    _refuse_unlisted([path for path in paths if path not in listed])
    _check_files(paths, listed)
    return Dataset(
        source,
        paths,
        tuple(listed[path] for path in paths),
        (min(m.min_label for m in manifests.values()), max(m.max_label for m in manifests.values())),
        _class_names(list(manifests.values())),
    )


def facts(train: Dataset, val: Dataset | None) -> DataFacts:
    """What the plan needs to know."""
    return DataFacts(
        samples=len(train),
        shards=len(train.shards),
        bytes=train.num_bytes,
        digest=train.digest,
        val_samples=len(val) if val else 0,
        val_digest=val.digest if val else "",
    )


def _refuse_remote(pattern: str) -> None:
    """Before expansion and after: nothing of what we are given may be a URL or a command."""
    for piece in re.split(r"[{},]|::", pattern):
        if _SCHEME.match(piece) or "|" in piece or "$" in piece:
            raise DataError(
                f"{pattern!r} is not a local path: {piece.strip()!r}\n"
                "  Shards are read from a folder or a brace pattern of paths, such as data/train or data/a-{000..099}.tar;\n"
                "  URLs, commands and variables are not."
            )


def _expand(pattern: str) -> tuple[Path, ...]:
    """A brace pattern (several joined by `::`) as paths, by webdataset's own expander."""
    from webdataset.shardlists import expand_urls  # imports torch; a folder does without

    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern!r}: not a pattern of braces: {error}") from None
    for name in names:
        _refuse_remote(name)
    paths = tuple(Path(name) for name in names)
    if len(set(paths)) != len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise DataError(f"{pattern!r} names {twice} twice; an epoch holds every sample once. List it once.")
    return paths


def _refuse_unlisted(paths: list[Path]) -> None:
    if paths:
        raise DataError(
            f"{_some(paths)}: not in the {NAME} beside {'it' if len(paths) == 1 else 'them'}\n"
            f"  Check the pattern, or, where shards were added: {remedy(paths[0].parent)}"
        )


def _check_files(paths: tuple[Path, ...], listed: dict[Path, Shard]) -> None:
    """One listing of each folder; one `stat` a shard."""
    present = {
        Path(folder) / entry.name: entry
        for folder in dict.fromkeys(path.parent for path in paths)
        for entry in os.scandir(folder)
        if entry.is_file()
    }
    missing = [path for path in paths if path not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards are missing: {_some(missing)}\n"
            f"  Bring them back; or, to go on without them: {remedy(missing[0].parent)}"
        )
    unindexed = [index_path(path) for path in paths if index_path(path) not in present]
    if unindexed:
        raise DataError(
            f"{len(unindexed)} of {len(paths)} indexes are missing: {_some(unindexed)}\n"
            f"  {remedy(unindexed[0].parent)}"
        )
    for path in paths:
        size = present[path].stat().st_size
        if size != listed[path].bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but its manifest says {listed[path].bytes:,}: cut short, or replaced\n"
                f"  Bring the file back; or, if it was changed on purpose: {remedy(path.parent)}"
            )


def _class_names(manifests: list[Manifest]) -> tuple[str, ...] | None:
    names = manifests[0].class_names
    if any(manifest.class_names != names for manifest in manifests):
        raise DataError(
            "the folders of this pattern name their classes differently; their labels cannot be mixed"
        )
    return tuple(names) if names is not None else None


def _some(paths: list[Path]) -> str:
    more = len(paths) - _SHOWN
    return ", ".join(map(str, paths[:_SHOWN])) + (f" and {more:,} more" if more > 0 else "")
