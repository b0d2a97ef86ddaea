"""Folders of images by class, split in train/ and val/ or not."""

from pathlib import Path

from pretrain.data.pack.labels import names_of
from pretrain.data.pack.source import SPLITS, ImageFile, Item, Keys, Source, key_of, suffix_of
from pretrain.data.tar import IMAGE_SUFFIXES
from pretrain.errors import DataError


def open_folder(folder: Path, label_map: dict[str, int] | None) -> Source:
    """`folder/CLASS/**`, or `folder/train/CLASS/**` and `folder/val/CLASS/**`; classes in the order of their names."""
    split_folders = [folder / split for split in SPLITS]
    if not all(path.is_dir() for path in split_folders):
        labels = _labels(_classes(folder), label_map, folder)
        return Source({"": _items(folder, labels)}, names_of(label_map or labels))
    labels = _labels({name for path in split_folders for name in _classes(path)}, label_map, folder)
    return Source({path.name: _items(path, labels) for path in split_folders}, names_of(label_map or labels))


def _labels(names: set[str], label_map: dict[str, int] | None, folder: Path) -> dict[str, int]:
    if label_map is None:
        return {name: number for number, name in enumerate(sorted(names))}
    missing = sorted(names - label_map.keys())
    if missing:
        raise DataError(f"{folder}: the class folders {', '.join(missing[:5])} are not in the label map")
    return {name: label_map[name] for name in names}


def _classes(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not names:
        raise DataError(
            f"{folder}: holds neither MNIST's idx files nor a folder for each class\n"
            "  Expected: CLASS/*.jpg, or train/CLASS/*.jpg and val/CLASS/*.jpg, or *-images-idx3-ubyte[.gz],\n"
            "  or *.parquet with images; or give a .csv or .parquet file."
        )
    return names


def _items(folder: Path, labels: dict[str, int]) -> list[Item]:
    keys, items = Keys(), []
    for name, label in sorted(labels.items()):
        for path in sorted((folder / name).rglob("*")):
            suffix = suffix_of(path)
            if not suffix or path.name.startswith(".") or not path.is_file():
                continue
            key = key_of(path.relative_to(folder))
            keys.add(key, str(path))
            items.append(Item(key, label, suffix, ImageFile.of(path)))
    if not items:
        raise DataError(f"{folder}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) below its class folders")
    return items
