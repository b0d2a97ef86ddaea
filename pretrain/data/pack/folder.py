"""Folders of images by class, split in train/ and val/ or not."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.pack.labels import names_of
from pretrain.data.pack.source import (
    SPLITS,
    ImageFile,
    Item,
    Keys,
    Source,
    is_split,
    key_of,
    split_names,
    suffix_of,
)
from pretrain.data.tar import IMAGE_SUFFIXES
from pretrain.errors import DataError
from pretrain.logs import log

_SHOWN = 5


def open_folder(folder: Path, label_map: dict[str, int] | None) -> Source:
    """`folder/CLASS/**`, or `folder/train/CLASS/**` and `folder/val/CLASS/**`; classes in the order of their names.

    Files of other kinds, and files beside the class folders, are left out with a warning; hidden files and folders in
    silence.
    """
    names = _classes(folder)
    parts = {split: folder / name for name, split in _splits(names, folder).items()} or {"": folder}
    labels = _labels({name for part in parts.values() for name in _classes(part)}, label_map, folder)
    return Source(
        {split: _items(part, labels) for split, part in parts.items()}, names_of(label_map or labels)
    )


def _splits(names: set[str], folder: Path) -> dict[str, str]:
    """What folders of these names mean as splits; nothing where they are classes."""
    if names.issuperset(SPLITS):
        return {split: split for split in SPLITS}
    return split_names(names, str(folder)) if all(map(is_split, names)) else {}


def _labels(names: set[str], label_map: dict[str, int] | None, folder: Path) -> dict[str, int]:
    if label_map is None:
        return {name: number for number, name in enumerate(sorted(names))}
    missing = sorted(names - label_map.keys())
    if missing:
        raise DataError(f"{folder}: the class folders {', '.join(missing[:5])} are not in the label map")
    return {name: label_map[name] for name in names}


def _classes(folder: Path) -> set[str]:
    try:
        names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    if not names:
        raise DataError(
            f"{folder}: holds neither MNIST's idx files nor a folder for each class\n"
            "  Expected: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg, or *-images-idx3-ubyte[.gz],\n"
            "  or *.parquet with images; or give a .csv or .parquet file."
        )
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        name = next(name for name in sorted(names) if not name.isprintable())
        raise DataError(
            f"{folder}: the folder {name!a} cannot name a class: it is not UTF-8; rename it"
        ) from None
    return names


def _items(folder: Path, labels: dict[str, int]) -> list[Item]:
    keys, items = Keys(), []
    others = Counter(_kind(path) for path in folder.iterdir() if path.is_file())
    for name, label in sorted(labels.items()):
        for path in _files(folder / name):
            suffix = suffix_of(path)
            if not suffix:
                others[_kind(path)] += 1
                continue
            if not path.is_file():
                raise DataError(f"{path}: is no file, or a link to nowhere")
            key = key_of(path.relative_to(folder))
            keys.add(key, str(path))
            items.append(Item(key, label, suffix, ImageFile.of(path)))
    wanted = f"{', '.join(sorted(IMAGE_SUFFIXES))} below a class folder"
    if not items:
        raise DataError(f"{folder}: no image ({wanted})")
    if others:
        some = ", ".join(f"{kind} ({n:,})" for kind, n in others.most_common(_SHOWN))
        log.warning("%s: files that are no %s are left out: %s", folder, wanted, some)
    return items


def _files(folder: Path) -> Iterator[Path]:
    """What lies below a class folder, but for what is hidden; nothing where only another split has that class.

    Raises `DataError` for what would be missing in silence: a folder that cannot be read, a link to one.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    if not folder.exists():
        return
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in folders):
            if path.is_symlink():
                raise DataError(
                    f"{path}: links to folders below a class are not followed\n"
                    "  Take it away, or put the images in its place."
                )
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _kind(path: Path) -> str:
    return path.suffix.lower() or path.name
