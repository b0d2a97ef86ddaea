"""From images to shards: what a source holds, which split each image goes to, and the tars.

Samples are ordered by a hash of (seed, key), so a shard is never ordered by class; the same hash decides between
train and val, so an image stays where it is when others join. The same source, options and seed give the same bytes.
"""

import gzip
import hashlib
import io
import math
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data.manifest import NAME, Manifest
from pretrain.data.scan import index_folder
from pretrain.data.tar import IMAGE_SUFFIXES, split_name
from pretrain.errors import DataError

SPLITS = ("train", "val")
_IDX_SPLITS = {"train": "train", "t10k": "val"}
_IDX_SUFFIXES = ("-images-idx3-ubyte", "-labels-idx1-ubyte")
_NOT_IN_A_KEY = re.compile(r"[^\w-]")


@dataclass(frozen=True)
class Item:
    """One image to pack. read: gives the bytes of the file."""

    key: str
    label: int
    suffix: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """What was found. splits: items by split; a single "" where the source is not split."""

    splits: dict[str, list[Item]]
    class_names: list[str] | None


@dataclass(frozen=True)
class ShardSize:
    """Shards of one split: `count` of them, or as many as hold `num_bytes` of content each."""

    count: int | None
    num_bytes: int


def open_source(folder: Path) -> Source:
    """Recognise MNIST's idx files, or folders of images by class, split in train/ and val/ or not.

    Raises `DataError` where it is neither, or where two images would have one key.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    if any(folder.glob(f"*{_IDX_SUFFIXES[0]}*")):
        return Source({split: _idx_items(folder, name) for name, split in _IDX_SPLITS.items()}, None)
    split_folders = [folder / split for split in SPLITS]
    if all(path.is_dir() for path in split_folders):
        names = sorted({name for path in split_folders for name in _folders(path)})
        return Source({path.name: _image_items(path, names) for path in split_folders}, names)
    names = _folders(folder)
    return Source({"": _image_items(folder, names)}, names)


def pack(
    source: Source,
    out: Path,
    *,
    val_share: float,
    size: ShardSize,
    seed: int,
    overwrite: bool = False,
    on_sample: Callable[[], object] = lambda: None,
) -> dict[str, Manifest]:
    """Write `out/train` and `out/val` (where it has samples): tars, indexes, manifest. Returns the manifests.

    All is written aside and renamed at the end: `out` is whole or it is what it was. Raises `DataError` where it
    exists and `overwrite` is false.
    """
    out = out.resolve()  # `.` has no name to put a folder beside
    _refuse_to_replace(out, overwrite)
    splits = _split(source.splits, val_share, seed)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        manifests = {}
        for split, items in splits.items():
            (aside / split).mkdir(parents=True)
            _write_split(aside / split, split, items, size, on_sample)
            manifests[split] = index_folder(aside / split, source.class_names)
        _publish(aside, out)
    except OSError as error:
        raise DataError(f"packing stopped, nothing was changed: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifests


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists\n  Choose another folder, or replace it with --overwrite.")
    foreign = (
        [p.name for p in out.iterdir() if not (p.name in SPLITS and (p / NAME).is_file())]
        if out.exists()
        else []
    )
    if foreign:
        raise DataError(
            f"{out} holds more than packed shards ({', '.join(sorted(foreign)[:3])}); --overwrite would delete it\n"
            "  Choose another folder."
        )


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


def _split(splits: dict[str, list[Item]], val_share: float, seed: int) -> dict[str, list[Item]]:
    """Items by split, each in the order in which they are written."""
    if "" not in splits:
        if val_share:
            raise DataError("the source is already split in train and val; leave --val-share out")
        return {split: _shuffled(items, seed) for split, items in splits.items() if items}
    items = _shuffled(splits[""], seed)
    chosen = {item.key for item in items if _draw(seed, item.key)[1] < val_share}
    if val_share and not 0 < len(chosen) < len(items):
        raise DataError(
            f"--val-share {val_share} of {len(items)} images leaves train or val empty; choose another share"
        )
    parts = {
        "train": [item for item in items if item.key not in chosen],
        "val": [item for item in items if item.key in chosen],
    }
    return {split: part for split, part in parts.items() if part}


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    return sorted(items, key=lambda item: (_draw(seed, item.key)[0], item.key))


def _draw(seed: int, key: str) -> tuple[int, float]:
    """A place in the order, and a number in [0, 1), of one key."""
    place, share = struct.unpack(">QQ", hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16])
    return place, share / 2**64


def _write_split(
    folder: Path, split: str, items: list[Item], size: ShardSize, on_sample: Callable[[], object]
) -> None:
    from webdataset import TarWriter  # imports torch

    for number, shard in enumerate(_shards(items, size)):
        path = folder / f"{split}-{number:06d}.tar"
        with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for item, content in shard:
                tar.write({"__key__": item.key, item.suffix: content, "cls": str(item.label).encode("ascii")})
                on_sample()


def _shards(items: Sequence[Item], size: ShardSize) -> Iterator[Iterable[tuple[Item, bytes]]]:
    """The items of each shard, with their content; consume one shard before asking for the next."""
    if size.count is not None:
        count = min(size.count, len(items))
        edges = [i * len(items) // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            yield ((item, item.read()) for item in items[start:stop])
        return
    remaining = ((item, item.read()) for item in items)
    for first in remaining:
        yield _up_to(size.num_bytes, first, remaining)


def _up_to(
    num_bytes: int, first: tuple[Item, bytes], remaining: Iterator[tuple[Item, bytes]]
) -> Iterator[tuple[Item, bytes]]:
    """`first` and what follows, until `num_bytes` are reached."""
    yield first
    total = len(first[1])
    while total < num_bytes and (item := next(remaining, None)) is not None:
        yield item
        total += len(item[1])


def _folders(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(
            f"{folder}: holds neither MNIST's idx files nor a folder for each class\n"
            "  Expected: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg, or *-images-idx3-ubyte[.gz]."
        )
    return names


def _image_items(folder: Path, class_names: list[str]) -> list[Item]:
    items: dict[str, tuple[Item, Path]] = {}
    for label, name in enumerate(class_names):
        for path in sorted((folder / name).rglob("*")):
            suffix = path.suffix.lower().removeprefix(".")
            if suffix not in IMAGE_SUFFIXES or path.name.startswith(".") or not path.is_file():
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            key = "/".join(_NOT_IN_A_KEY.sub("_", part) for part in parts)
            if split_name(f"{key}.{suffix}") is None:
                raise DataError(f"{path}: readers skip names that begin with __x__; rename it")
            if key in items:
                raise DataError(
                    f"{path} and {items[key][1]} would both have the key {key}; rename one of them\n"
                    "  (a key is the path without its ending; dots, blanks and the like become _)"
                )
            items[key] = Item(key, label, suffix, path.read_bytes), path
    if not items:
        raise DataError(f"{folder}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) below its class folders")
    return [item for item, _ in items.values()]


def _idx_items(folder: Path, name: str) -> list[Item]:
    """Images of `name-images-idx3-ubyte` as greyscale PNG, labels of `name-labels-idx1-ubyte`."""
    images, labels = (_read_idx(folder, name + suffix) for suffix in _IDX_SUFFIXES)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: {name} has images {images.shape} and labels {labels.shape}; they do not match"
        )
    return [
        Item(f"{name}/{i:06d}", int(label), "png", partial(_png, image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _read_idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """An idx file of unsigned bytes, compressed or not: magic 0, 0, 8, dimensions; their sizes; the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: {name}[.gz] is missing; both train-* and t10k-* files are needed")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    dimensions = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dimensions
    if not data.startswith(b"\0\0\x08") or not 1 <= dimensions <= 3 or len(data) < start:
        raise DataError(f"{path}: not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path}: {len(data) - start:,} bytes of values, but its header says {shape}: cut short?"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()
