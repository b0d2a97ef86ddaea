"""Small files, JSON most of them: written whole or not at all, and read as they are found, cut short by a death, written
by a hand or by nobody of ours.

Only the standard library is imported here: the batch script's questions are answered by a plain Python.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 2**20


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `OSError`, or `ValueError` with what is wrong with it."""
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError("it is no file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return parse_object(text)


def parse_object(text: bytes) -> dict[str, Any]:
    """`read_object` for what was read already, a line of a file for instance."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no object")
    return found


def write_object(path: Path, facts: Mapping[str, Any]) -> None:
    """Let a file hold this JSON object; see `replace_file`."""
    replace_file(path, json.dumps(facts, indent=1) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and make it last. Raises `OSError`."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def number(value: object) -> float | None:
    """`value` where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def whole(value: object) -> int | None:
    """`value` where it is a whole number that something can be counted with, else None."""
    return value if type(value) is int and 0 <= value < 2**53 else None
