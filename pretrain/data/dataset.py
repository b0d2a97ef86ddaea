"""A data set: shards in a fixed order, opened from their manifests. No tar and no index is read here."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from pretrain.config.plan import DataFacts
from pretrain.data.index import SUFFIX, remedy
from pretrain.data.manifest import NAME, Manifest, Shard, digest, digest_of_sources, read_manifest
from pretrain.draws import IntArray
from pretrain.errors import DataError

_SCHEME = re.compile(r"^\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_SHOWN = 5


@dataclass(frozen=True)
class Dataset:
    """paths: where each shard lies; shards: what the manifest says of it; labels: lowest and highest.

    source_shards: where several sources were put together (`data.sources`), the number of shards of each.
    """

    source: str
    paths: tuple[str, ...]
    shards: tuple[Shard, ...]
    labels: tuple[int, int]
    class_names: tuple[str, ...] | None
    source_shards: tuple[int, ...] = ()

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
    def source_samples(self) -> IntArray:
        """Samples of each of `source_shards`: int64."""
        samples: IntArray = np.diff(self.starts[np.cumsum([0, *self.source_shards])])
        return samples

    @cached_property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """What identifies the samples, their numbers and their sources; hex."""
        if not self.source_shards:
            return digest(self.shards)
        bounds = np.cumsum([0, *self.source_shards])
        return digest_of_sources(digest(self.shards[a:b]) for a, b in pairwise(bounds))

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
    if Path(source).is_dir() or not source.strip().endswith(".tar"):
        manifests = {source: read_manifest(Path(source))}
        shards = manifests[source].shards
        folder = str(Path(source))
        paths = [f"{folder}/{shard.name}" for shard in shards]
    else:
        paths = _expand(source)
        manifests = {f: read_manifest(Path(f)) for f in dict.fromkeys(map(_folder, paths))}
        shards = _listed(paths, manifests)
    _check_files(paths, shards)
    return Dataset(
        source,
        tuple(paths),
        tuple(shards),
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
        source_samples=tuple(int(n) for n in train.source_samples),
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


def _expand(pattern: str) -> list[str]:
    """A brace pattern (several joined by `::`) as paths, by webdataset's own expander."""
    from webdataset.shardlists import expand_urls  # imports torch; a folder does without

    try:
        names = expand_urls(pattern)
    except ValueError as error:
        raise DataError(f"{pattern!r}: not a pattern of braces: {error}") from None
    for name in names:
        _refuse_remote(name)
    paths = [str(Path(name)) for name in names]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(
            f"{pattern!r} names {_some(twice)} twice; an epoch holds every sample once. List it once."
        )
    return paths


def _listed(paths: list[str], manifests: dict[str, Manifest]) -> list[Shard]:
    """What the manifests say of each path."""
    known = {
        folder: {shard.name: shard for shard in manifest.shards} for folder, manifest in manifests.items()
    }
    unlisted = [path for path in paths if _name(path) not in known[_folder(path)]]
    if unlisted:
        raise DataError(
            f"{_some(unlisted)}: not in the {NAME} beside {'it' if len(unlisted) == 1 else 'them'}\n"
            f"  Check the pattern, or, where shards were added: {remedy(_folder(unlisted[0]))}"
        )
    return [known[_folder(path)][_name(path)] for path in paths]


def _check_files(paths: list[str], shards: list[Shard]) -> None:
    """One listing of each folder; one `stat` a shard."""
    folders = dict.fromkeys(map(_folder, paths))
    present = {folder: {entry.name for entry in os.scandir(folder)} for folder in folders}
    for what, suffix in (("shards", ""), ("indexes", SUFFIX)):
        missing = [path + suffix for path in paths if _name(path) + suffix not in present[_folder(path)]]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} {what} are missing: {_some(missing)}\n"
                f"  Bring them back; or, to go on with what is there: {remedy(_folder(missing[0]))}"
            )
    for path, shard in zip(paths, shards, strict=True):
        try:
            size = Path(path).stat().st_size
        except OSError as error:  # a link to nowhere
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if size != shard.bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but its manifest says {shard.bytes:,}: cut short, or replaced\n"
                f"  Bring the file back; or, if it was changed on purpose: {remedy(_folder(path))}"
            )


def _class_names(manifests: list[Manifest]) -> tuple[str, ...] | None:
    names = manifests[0].class_names
    if any(manifest.class_names != names for manifest in manifests):
        raise DataError(
            "the folders of this pattern name their classes differently; their labels cannot be mixed"
        )
    return tuple(names) if names is not None else None


def _folder(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return folder or slash or "."


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _some(paths: list[str]) -> str:
    more = len(paths) - _SHOWN
    return ", ".join(paths[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
