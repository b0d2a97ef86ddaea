"""Parquet files that hold the images themselves, as Hugging Face's data sets do: `image {bytes, path}` and a label.

Labels, keys and splits are columns that are read without the images; what the images need is in `unpack`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.data.pack.labels import cell_text, indexed
from pretrain.data.pack.source import Item, Keys, Source, digest, key_of, split_names
from pretrain.data.pack.unpack import Cell, RowGroups, parquet_file
from pretrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

PART_BYTES = 256 * 2**20
"""Row groups are unpacked together up to this size: one job, one file."""


class Columns(NamedTuple):
    """Names of the columns with image and label."""

    image: str = "image"
    label: str = "label"


class _Row(NamedTuple):
    """label: name of the class, or its index as text; split, key: none where the files do not say."""

    where: str
    label: str
    split: str | None
    key: str
    content: Cell


def holds_images(path: Path, columns: Columns) -> bool:
    """Whether a parquet file has the column of images."""
    with parquet_file(path) as file:
        return columns.image in file.schema_arrow.names


def open_parquet_images(files: list[Path], columns: Columns, label_map: dict[str, int] | None) -> Source:
    """Splits by the column `split`, else by the names of the files (`train-*`, `validation-*`, `test-*`), else none.

    A key is the cell of the column `key`, else name of the file and number of the row. Class names are Hugging Face's,
    where the file has them.
    """
    rows: list[_Row] = []
    parts: list[RowGroups] = []
    by_file = _splits_by_file(files)
    all_names = []
    for path in files:
        with parquet_file(path) as file:
            names = _class_names(file, columns)
            all_names.append(names)
            for part, size in _parts(file, path, columns):
                parts.append(part)
                rows += _rows(file, part, size, columns, names, by_file[path])
    if any(names != all_names[0] for names in all_names):
        raise DataError(f"{files[0].parent}: its parquet files name their classes differently")
    if not rows:
        raise DataError(f"{files[0]}: holds no row")
    if all_names[0] is not None and label_map is None:
        label_map = {name: number for number, name in enumerate(all_names[0])}
    labels, class_names = indexed(((row.label, row.where) for row in rows), label_map)
    meant = split_names((row.split for row in rows if row.split is not None), str(files[0].parent))
    splits: dict[str, list[Item]] = {}
    keys: dict[str, Keys] = {}
    for row, label in zip(rows, labels, strict=True):
        split = meant[row.split] if row.split is not None else ""
        keys.setdefault(split, Keys()).add(row.key, row.where)
        splits.setdefault(split, []).append(Item(row.key, label, "", row.content))
    return Source(splits, class_names, parts)


def _splits_by_file(files: list[Path]) -> dict[Path, str | None]:
    """What stands before the first - of each name, if that is a split for all of them."""
    prefixes = {path: path.name.partition("-")[0] for path in files}
    try:
        split_names(prefixes.values(), "")
    except DataError:
        if {"train", "validation", "val"} & set(prefixes.values()):
            split_names(prefixes.values(), str(files[0].parent))
        return dict.fromkeys(files)
    return dict(prefixes)


def _class_names(file: "pq.ParquetFile", columns: Columns) -> list[str] | None:
    """Names in Hugging Face's notes on the label column; none where there are none."""
    notes = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names: Any = json.loads(notes)["info"]["features"][columns.label]["names"] if notes else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names if len(set(names)) == len(names) else None


def _parts(file: "pq.ParquetFile", path: Path, columns: Columns) -> Iterator[tuple[RowGroups, int]]:
    """Row groups that are unpacked together, and the mean bytes of their images."""
    _check_columns(file, path, columns)
    found = path.stat()
    first = rows = size = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows, size = rows + metadata.num_rows, size + metadata.total_byte_size
        if size >= PART_BYTES or group == file.num_row_groups - 1:
            stop = group + 1
            words = (
                str(path),
                columns.image,
                str(first),
                str(stop),
                str(found.st_size),
                str(found.st_mtime_ns),
            )
            yield RowGroups(str(path), columns.image, first, stop, digest(words)[:32]), size // max(rows, 1)
            first, rows, size = stop, 0, 0


def _check_columns(file: "pq.ParquetFile", path: Path, columns: Columns) -> None:
    import pyarrow as pa

    schema = file.schema_arrow
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise DataError(
            f"{path}: has no column {' nor '.join(missing)}; it has {', '.join(schema.names[:10])}\n"
            "  Name them with --image-column and --label-column."
        )
    kind = schema.field(columns.image).type
    if pa.types.is_struct(kind) and "bytes" in kind.names:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{path}: the column {columns.image} is of type {kind}; bytes of image files are needed, "
            "alone or as `bytes` of a struct"
        )


def _rows(
    file: "pq.ParquetFile",
    part: RowGroups,
    size: int,
    columns: Columns,
    names: list[str] | None,
    split: str | None,
) -> Iterable[_Row]:
    wanted = [name for name in (columns.label, "split", "key") if name in file.schema_arrow.names]
    before = sum(file.metadata.row_group(group).num_rows for group in range(part.first))
    groups = list(range(part.first, part.stop))
    number = 0
    for batch in file.iter_batches(columns=wanted, row_groups=groups):
        for cells in batch.to_pylist():
            where = f"{part.path}, row {before + number}"
            label = _label(cells.pop(columns.label), names, where)
            said = {name: cell_text(cell, name, where) for name, cell in cells.items()}
            key = said.get("key", f"{key_of(Path(Path(part.path).name))}/{before + number:08d}")
            yield _Row(where, label, said.get("split", split), key, Cell(part, number, size))
            number += 1


def _label(cell: Any, names: list[str] | None, where: str) -> str:
    text = cell_text(cell, "label", where)
    if names is None or isinstance(cell, str):
        return text
    if not isinstance(cell, int) or not 0 <= cell < len(names):
        raise DataError(f"{where}: the label is {cell}, but the file names classes 0 to {len(names) - 1}")
    return names[cell]
