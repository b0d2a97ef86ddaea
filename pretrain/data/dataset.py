"""A data set: shards in a fixed order, opened from their manifests. No tar and no index is read here."""

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pretrain.config.plan import DataFacts
from pretrain.data.contact import indexed, indexed_objects
from pretrain.data.index import SUFFIX, remedy
from pretrain.data.manifest import (
    NAME,
    Manifest,
    Shard,
    digest,
    digest_of_sources,
    parse_manifest,
    read_manifest,
)
from pretrain.data.store import TIMEOUT_SECONDS, NoSuchObjectError, Stores
from pretrain.data.urls import check_source, expand, folder_of, is_remote, name_of, some
from pretrain.draws import IntArray
from pretrain.errors import DataError
from pretrain.logs import log

MAX_MANIFEST_BYTES = 2**30
"""Of a remote manifest; a shard takes about 250 bytes of it."""


@dataclass(frozen=True)
class Dataset:
    """paths: where each shard lies; shards: what the manifest says of it; labels: lowest and highest.

    source_shards: where several sources were put together (`data.sources`), the number of shards of each.
    indexes: where the index of each shard lies; empty where all lie beside their shards.
    """

    source: str
    paths: tuple[str, ...]
    shards: tuple[Shard, ...]
    labels: tuple[int, int]
    class_names: tuple[str, ...] | None
    source_shards: tuple[int, ...] = ()
    indexes: tuple[str, ...] = ()

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

    def index_of(self, shard: int) -> str:
        """Path or URL."""
        return self.indexes[shard] if self.indexes else self.paths[shard] + SUFFIX

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


class _Place(NamedTuple):
    """A folder of tars, the folder of their indexes, and what speaks for both."""

    tars: str
    indexes: str
    manifest: Manifest


def open_dataset(source: str, timeout_seconds: float = TIMEOUT_SECONDS) -> Dataset:
    """Open a folder of shards (all of its manifest), or a brace pattern of tars such as `dir/a-{000..099}.tar`.

    A folder is a path or a URL (`data.urls`). Of a remote one the manifest alone is read; each shard and its index are
    held against it when they are first read. A few tars without a manifest are indexed, wherever they lie
    (`data.contact`). timeout_seconds: of one read from a store. Raises `DataError` for anything else, for shards
    without a manifest or not in it, and for local shards or indexes that are missing or of another size than the
    manifest says.

    On a cluster one process opens and the others are told: to look at every shard is cheap once, not 4,096 times.
    """
    check_source(source)
    try:
        return _open(source, timeout_seconds)
    except OSError as error:  # a folder that this user may not enter
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _open(source: str, timeout_seconds: float) -> Dataset:
    stores = Stores(timeout_seconds)
    whole = Path(source).is_dir() or not source.strip().endswith(".tar")
    if whole:
        folder = source.rstrip("/") if is_remote(source) else str(Path(source))
        places = {folder: _placed(folder, None, stores)}
        shards = places[folder].manifest.shards
        where = [(places[folder], shard.name) for shard in shards]
    else:
        names: dict[str, list[str]] = {}
        for path in (paths := expand(source)):
            names.setdefault(folder_of(path), []).append(name_of(path))
        places = {folder: _placed(folder, found, stores) for folder, found in names.items()}
        shards = _listed(paths, {folder: place.manifest for folder, place in places.items()})
        where = [(places[folder_of(path)], name_of(path)) for path in paths]
    paths = [f"{place.tars}/{name}" for place, name in where]
    _check_files(
        [(path, shard) for path, shard in zip(paths, shards, strict=True) if not is_remote(path)], whole=whole
    )
    elsewhere = any(place.tars != place.indexes for place in places.values())
    manifests = [place.manifest for place in places.values()]
    return Dataset(
        source,
        tuple(paths),
        tuple(shards),
        (min(m.min_label for m in manifests), max(m.max_label for m in manifests)),
        _class_names(manifests),
        indexes=tuple(f"{place.indexes}/{name}{SUFFIX}" for place, name in where) if elsewhere else (),
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


def _placed(folder: str, names: list[str] | None, stores: Stores) -> _Place:
    """Where tars of a folder, those of `names` or all, and their indexes lie; makes a manifest for a few without one."""
    if not is_remote(folder):
        place = indexed(Path(folder))
        return _Place(str(place), str(place), read_manifest(place))
    try:
        content = stores.read_whole(f"{folder}/{NAME}", MAX_MANIFEST_BYTES)
    except NoSuchObjectError:
        place = indexed_objects(stores, folder, names)
        return _Place(folder, str(place), read_manifest(place))
    return _Place(folder, folder, parse_manifest(content, folder))


def _listed(paths: list[str], manifests: dict[str, Manifest]) -> list[Shard]:
    """What the manifests say of each path."""
    known = {
        folder: {shard.name: shard for shard in manifest.shards} for folder, manifest in manifests.items()
    }
    unlisted = [path for path in paths if name_of(path) not in known[folder_of(path)]]
    if unlisted:
        raise DataError(
            f"{some(unlisted)}: not in the {NAME} beside {'it' if len(unlisted) == 1 else 'them'}\n"
            f"  Check the pattern, or, where shards were added: {remedy(folder_of(unlisted[0]))}"
        )
    return [known[folder_of(path)][name_of(path)] for path in paths]


def _check_files(files: list[tuple[str, Shard]], *, whole: bool) -> None:
    """One listing of each folder; one `stat` a shard. whole: all tars of a folder should be among them."""
    folders = dict.fromkeys(folder_of(path) for path, _ in files)
    present = {
        folder: {entry.name for entry in os.scandir(folder) if entry.is_file() or entry.is_symlink()}
        for folder in folders
    }
    for what, suffix in (("shards", ""), ("indexes", SUFFIX)):
        missing = [
            path + suffix for path, _ in files if name_of(path) + suffix not in present[folder_of(path)]
        ]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(files)} {what} are missing: {some(missing)}\n"
                f"  Bring them back; or, to go on with what is there: {remedy(folder_of(missing[0]))}"
            )
    for folder, names in present.items():
        known = {name_of(path) for path, _ in files if folder_of(path) == folder}
        others = sorted(name for name in names - known if name.endswith(".tar"))
        if others and whole:
            log.warning(
                "%s: %d tars are not in its manifest and are left out: %s\n  To take them in: %s",
                folder, len(others), some(others), remedy(folder),
            )  # fmt: skip
    for path, shard in files:
        try:
            size = Path(path).stat().st_size
        except OSError as error:  # a link to nowhere
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if size != shard.bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but its manifest says {shard.bytes:,}: cut short, or replaced\n"
                f"  Bring the file back; or, if it was changed on purpose: {remedy(folder_of(path))}"
            )


def _class_names(manifests: list[Manifest]) -> tuple[str, ...] | None:
    names = manifests[0].class_names
    if any(manifest.class_names != names for manifest in manifests):
        raise DataError(
            "the folders of this pattern name their classes differently; their labels cannot be mixed"
        )
    return tuple(names) if names is not None else None
