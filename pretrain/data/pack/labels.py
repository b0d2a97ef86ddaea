"""From names to class indexes: in the order of the names, or as a label map says."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path

from pretrain.errors import DataError

_INDEX = re.compile(r"[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?|nan", re.IGNORECASE)


def read_label_map(path: Path) -> dict[str, int]:
    """Class indexes by name: a JSON object `{"cat": 0}`, or CSV with a name and an index in each line.

    Raises `DataError` unless the K names have the K indexes from 0 to K - 1, each once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    pairs = _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)
    found: dict[str, int] = {}
    for name, index in pairs:
        if name in found:
            raise DataError(f"{path}: {name!a} occurs twice")
        found[name] = index
    if not found or sorted(found.values()) != list(range(len(found))):
        raise DataError(
            f"{path}: {len(found)} names need the indexes 0 to {len(found) - 1}, each once; "
            f"it gives {_some(sorted(found.values()))}"
        )
    return found


def indexed(
    labels: Iterable[tuple[str, str]], label_map: dict[str, int] | None
) -> tuple[list[int], list[str] | None]:
    """Class index of each (label, where it stands), and the names of the classes.

    By the map, if there is one. Without: decimal numbers are indexes, and have no names; names are numbered in their
    order. Raises `DataError` for a label that the map does not have, and for numbers that are no indexes: in the order
    of their names 10 would come before 2.
    """
    pairs = list(labels)
    if label_map is not None:
        for name, where in pairs:
            if name not in label_map:
                raise DataError(
                    f"{where}: the label {name!a} is not in the label map; it has {_some(list(label_map))}"
                )
        return [label_map[name] for name, _ in pairs], names_of(label_map)
    distinct = {name for name, _ in pairs}
    if all(_INDEX.fullmatch(name) for name in distinct):
        return [int(name) for name, _ in pairs], None
    if all(_NUMBER.fullmatch(name) for name in distinct):
        name, where = next(pair for pair in pairs if not _INDEX.fullmatch(pair[0]))
        raise DataError(
            f"{where}: the label {name} is a number, but no class index; those are whole numbers from 0 on\n"
            "  Mend the labels, or give the index of each by --label-map."
        )
    numbers = {name: number for number, name in enumerate(sorted(distinct))}
    return [numbers[name] for name, _ in pairs], list(numbers)


def cell_text(cell: object, name: str, where: str) -> str:
    """The cell of column `name`; raises `DataError` where it is empty, or neither text nor a number."""
    if not isinstance(cell, str | int | float | None):
        raise DataError(f"{where}: the {name} is of type {type(cell).__name__}; text or a number is needed")
    text = "" if cell is None else str(cell)
    if not text.strip():
        raise DataError(f"{where}: the {name} is empty")
    return text


def names_of(label_map: dict[str, int]) -> list[str]:
    return sorted(label_map, key=label_map.__getitem__)


def _from_json(text: str, path: Path) -> list[tuple[str, int]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # keeps a name that occurs twice
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(pairs, list) or not all(
        isinstance(pair, tuple) and type(pair[1]) is int for pair in pairs
    ):
        raise DataError(f'{path}: an object of names and indexes is needed, such as {{"cat": 0, "dog": 1}}')
    return pairs


def _from_csv(text: str, path: Path) -> list[tuple[str, int]]:
    try:
        rows = [row for row in csv.reader(text.splitlines(), strict=True) if row]
    except csv.Error as error:
        raise DataError(f"{path}: not CSV: {error}") from None
    if rows and len(rows[0]) == 2 and not _INDEX.fullmatch(rows[0][1].strip()):
        del rows[0]  # the names of the columns
    for row in rows:
        if len(row) != 2 or not _INDEX.fullmatch(row[1].strip()):
            raise DataError(f"{path}: a name and an index are needed in each line; one is {','.join(row)!a}")
    return [(name, int(index)) for name, index in rows]


def _some(values: list[int] | list[str]) -> str:
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
