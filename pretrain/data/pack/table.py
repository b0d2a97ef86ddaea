"""A CSV or parquet file that lists images: columns path and label, and if it likes split and key."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.pack.labels import cell_text, indexed
from pretrain.data.pack.source import ImageFile, Item, Keys, Source, key_of, split_names, suffix_of
from pretrain.data.pack.unpack import parquet_file
from pretrain.data.tar import IMAGE_SUFFIXES
from pretrain.errors import DataError

_NEEDED, _OPTIONAL = ("path", "label"), ("split", "key")


class Row(NamedTuple):
    """where: file and row, for messages; split, key: none where the table has no such column."""

    where: str
    path: str
    label: str
    split: str | None
    key: str | None


def open_csv(path: Path, root: Path | None, label_map: dict[str, int] | None) -> Source:
    """A table of UTF-8 text with a line of column names; other columns are not looked at."""
    return _source(_csv_rows(path), path, root, label_map)


def open_parquet_table(path: Path, root: Path | None, label_map: dict[str, int] | None) -> Source:
    return _source(_parquet_rows(path), path, root, label_map)


def _source(rows: Iterable[Row], table: Path, root: Path | None, label_map: dict[str, int] | None) -> Source:
    """Paths are relative to `root`, else to the table's folder, and may not lead out of it, by links neither."""
    inside = _Inside(root or table.parent)
    listed = list(rows)
    if not listed:
        raise DataError(f"{table}: lists no image")
    labels, class_names = indexed(((row.label, row.where) for row in listed), label_map)
    split_of = split_names((row.split for row in listed if row.split is not None), str(table))
    splits: dict[str, list[Item]] = {}
    keys: dict[str, Keys] = {}
    for row, label in zip(listed, labels, strict=True):
        split = split_of[row.split] if row.split is not None else ""
        key = row.key if row.key is not None else key_of(Path(row.path.lstrip("/")))
        keys.setdefault(split, Keys()).add(key, row.where)
        splits.setdefault(split, []).append(Item(key, label, _suffix(row), inside.file(row)))
    return Source(splits, class_names)


def _suffix(row: Row) -> str:
    suffix = suffix_of(Path(row.path))
    if not suffix:
        raise DataError(f"{row.where}: {row.path!a} ends in none of {', '.join(sorted(IMAGE_SUFFIXES))}")
    return suffix


@dataclass
class _Inside:
    """Files below one folder. folders: where each folder named really lies; asked once."""

    root: Path
    folders: dict[str, str] = field(default_factory=dict)

    def file(self, row: Row) -> ImageFile:
        if not row.path.isprintable():
            raise DataError(f"{row.where}: the path {row.path!a} holds control characters")
        path = self.root / row.path
        real = self._real(path)
        base = self._folder(str(self.root))
        if os.path.commonpath((real, base)) != base:
            raise DataError(
                f"{row.where}: {row.path!a} leads out of {self.root}\n"
                "  If the images lie elsewhere, name the folder that holds them with --root."
            )
        try:
            if not path.is_file():
                raise DataError(f"{row.where}: {path} is no file")
            return ImageFile.of(path)
        except OSError as error:
            raise DataError(f"{row.where}: {path} cannot be read: {error.strerror}") from None

    def _real(self, path: Path) -> str:
        if path.is_symlink() or path.name in ("", ".."):
            return os.path.realpath(path)
        return os.path.join(self._folder(str(path.parent)), path.name)  # noqa: PTH118 - faster, for each image

    def _folder(self, folder: str) -> str:
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        return self.folders[folder]


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip() for name in next(reader, [])]
            columns = _columns(names, path)
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cells; the table has {len(names)} columns")
                yield _row(where, {name: cells[column] for name, column in columns.items()})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    with parquet_file(path) as file:
        columns = list(_columns(file.schema_arrow.names, path))
        for batch in file.iter_batches(columns=columns):
            for cells in batch.to_pylist():
                yield _row(f"{path}, row {number}", cells)
                number += 1


def _columns(names: Sequence[str], path: Path) -> dict[str, int]:
    """Places of our columns; raises `DataError` where one is missing or named twice."""
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise DataError(
            f"{path}: has no column {' nor '.join(missing)}; it has {', '.join(names[:10]) or 'none'}\n"
            "  Needed are path and label; split and key are optional."
        )
    twice = [name for name in (*_NEEDED, *_OPTIONAL) if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: has two columns named {twice[0]}")
    return {name: names.index(name) for name in (*_NEEDED, *_OPTIONAL) if name in names}


def _row(where: str, cells: dict[str, Any]) -> Row:
    """Cells as text; an empty one is a mistake, never a default."""
    texts = {name: cell_text(cell, name, where).strip() for name, cell in cells.items()}
    return Row(where, texts["path"], texts["label"], texts.get("split"), texts.get("key"))
