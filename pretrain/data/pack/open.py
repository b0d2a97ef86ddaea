"""What kind of source a path is."""

from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.pack.folder import open_folder
from pretrain.data.pack.idx import has_idx, open_idx
from pretrain.data.pack.labels import read_label_map
from pretrain.data.pack.parquet_images import Columns, holds_images, open_parquet_images
from pretrain.data.pack.source import Source
from pretrain.data.pack.table import open_csv, open_parquet_table
from pretrain.errors import DataError


@dataclass(frozen=True)
class Options:
    """How to read a source. root: folder that the paths of a table are relative to and must lie in; label_map: file
    with the index of each class name; columns: of parquet files with images."""

    root: Path | None = None
    label_map: Path | None = None
    columns: Columns = field(default_factory=Columns)


def open_source(path: Path, options: Options | None = None) -> Source:
    """List the images of a folder by class, of idx files, of a CSV or parquet table, or of parquet files with images.

    Raises `DataError` where it is none of them, where an option says nothing to its kind, where two images would have
    one key, and where a label is not in the map.
    """
    options = options or Options()
    label_map = read_label_map(options.label_map) if options.label_map else None
    suffix = path.suffix.lower()
    if path.is_file() and suffix == ".csv":
        return open_csv(path, options.root, label_map)
    if path.is_file() and suffix == ".parquet" and not holds_images(path, options.columns):
        return open_parquet_table(path, options.root, label_map)
    if options.root is not None:
        raise DataError(f"{path}: is no table of paths; leave --root out")
    if path.is_file() and suffix == ".parquet":
        return open_parquet_images([path], options.columns, label_map)
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{path}: a folder, a .csv or a .parquet file is needed")
        raise DataError(f"{path}: there is no such folder or file")
    if has_idx(path):
        return open_idx(path, label_map)
    files = sorted(path.glob("*.parquet"))
    if files:
        return open_parquet_images(files, options.columns, label_map)
    return open_folder(path, label_map)
