"""The lines of a journal, and how their values are checked. One JSON object per line, `op` first:

    {"op": "run", "format": 1, "uid", "experiment", "name", "campaign", "time"}        first line, once
    {"op": "attempt", "attempt", "from_step", "uri", "time", "other_samples"}          a process takes over, or goes back
    {"op": "metrics", "attempt", "step", "time", "values": {name: value}, "known": {name: [value, time]}}
    {"op": "system", "attempt", "step", "time", "values": {name: value}}               machines; step: second of the run
    {"op": "params" | "tags", "attempt", "time", "values": {name: text}}
    {"op": "dataset", "attempt", "time", "name", "digest", "source", "context"}
    {"op": "artifact", "attempt", "time", "path"}                                      path below the run directory
    {"op": "status", "attempt", "time", "status"}                                      the attempt ended by itself
    {"op": "gap", "attempt", "time"}                                                   lines that stood here are lost

Times are milliseconds since 1970, given once and never again: MLflow keeps a point per (name, time, step, value), so
the same point sent twice is one point. They never fall within a journal, whatever the clock does.

An attempt that begins at `from_step` takes the place of what earlier attempts wrote about later steps. Where it goes
back to train on `other_samples` (true or missing), its values are not compared with theirs.
`known` names the values of a line that stand for a point written before: an equal value of a step that was executed
again keeps its first time, and a wall-clock value (`WALL_CLOCK`) keeps its first value too. Those points are what
MLflow gets; `values` is what this attempt measured. Lines of `system` belong to the clock: nothing takes their place. NaN is null; an infinity is clamped to the largest float.
After a `gap` MLflow may hold points that the journal does not: from its `attempt` on, MLflow is asked for them, and they
are treated like `known` ones.

Whoever reads a line may have been given it by a dying disk or a stranger: what is not exactly one of these is no line of
a journal, costs itself alone, and is shown in `tracking/dead_letter.jsonl`.
"""

import json
import math
import numbers
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

Record = dict[str, Any]
Status = Literal["FINISHED", "FAILED", "KILLED"]

FILE = "metrics.jsonl"
FORMAT = 1
MAX_LINE = 16 * 2**20
"""Bytes of a line. Hundreds of times what a run has to say at once: a longer one is damage, and is never held whole."""

WALL_CLOCK = ("perf/", "system/")
"""Names of values that differ each time a step is executed, by prefix."""
NONFINITE = "nonfinite/"
DIVERGED = "resume/diverged"

_NAME = re.compile(r"[\w.\- :/]{1,230}", re.ASCII)  # MLflow takes 250; prefixes of ours need some
_UID = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1.7976931348623157e308
_LAST_TIME = 253_402_300_799_999
"""The end of the year 9999, in milliseconds."""


def is_uid(text: object) -> bool:
    """Whether this may name a run: it stands in a query of MLflow's, which knows no quoting."""
    return isinstance(text, str) and _UID.fullmatch(text) is not None


def _is_count(found: object) -> bool:
    return type(found) is int and 0 <= found < 2**63


def _is_time(found: object) -> bool:
    return type(found) is int and 0 <= found <= _LAST_TIME


def _is_text(found: object) -> bool:
    return isinstance(found, str)


def _is_text_or_none(found: object) -> bool:
    return found is None or isinstance(found, str)


def _is_number(found: object) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return found is None
    return -_LARGEST <= found <= _LARGEST


def _are_numbers(found: object) -> bool:
    return isinstance(found, dict) and all(map(_is_number, found.values()))


def _are_texts(found: object) -> bool:
    return isinstance(found, dict) and all(map(_is_text, found.values()))


def _are_points(found: object) -> bool:
    return found is None or (
        isinstance(found, dict)
        and all(
            isinstance(point, list) and len(point) == 2 and _is_number(point[0]) and _is_time(point[1])
            for point in found.values()
        )
    )


_STAMP: dict[str, Callable[[object], bool]] = {"attempt": _is_count, "time": _is_time}
_FIELDS: dict[str, dict[str, Callable[[object], bool]]] = {
    "run": {**_STAMP, "uid": is_uid, "experiment": _is_text, "name": _is_text, "campaign": _is_text_or_none},
    "attempt": {**_STAMP, "from_step": _is_count, "uri": _is_text_or_none},
    "metrics": {**_STAMP, "step": _is_count, "values": _are_numbers, "known": _are_points},
    "system": {**_STAMP, "step": _is_count, "values": _are_numbers},
    "params": {**_STAMP, "values": _are_texts},
    "tags": {**_STAMP, "values": _are_texts},
    "dataset": {**_STAMP, "name": _is_text, "digest": _is_text, "source": _is_text, "context": _is_text},
    "artifact": {**_STAMP, "path": _is_text},
    "status": {**_STAMP, "status": lambda found: found in get_args(Status)},
    "gap": _STAMP,
}
"""What a line must be to be used. A missing field is None; fields that are not named here do not matter."""


def check_name(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag, or `ValueError`."""
    is_path = posixpath.normpath(name) == name and name != "." and not name.startswith(("/", ".."))
    if not (_NAME.fullmatch(name) and is_path):
        raise ValueError(
            f"{name[:300]!r} is no name for a metric, parameter or tag: 1 to 230 ASCII letters, digits, _ - . : / or "
            "spaces, not starting with a slash, without empty or dotted parts"
        )
    return name


def check_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """Metric values as the journal holds them; a `nonfinite/NAME` of 1 is added for each that is no finite number.

    Raises `ValueError` for a bad name and `TypeError` for what is no plain number (a tensor: that would be a hidden
    wait for the device).
    """
    checked: dict[str, float | None] = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"metric {name} is a {type(value).__name__}; give a number (`.item()` of a tensor)"
            )
        number = float(value)
        checked[name] = None if math.isnan(number) else max(-_LARGEST, min(number, _LARGEST))
        if not math.isfinite(number):
            checked[NONFINITE + name] = 1.0
    return checked


def encode(record: Record) -> bytes:
    """One line; `ValueError` where it is too long to be read again."""
    line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line):,} bytes is too long for a journal, which takes {MAX_LINE:,}")
    return line


def decode(line: bytes) -> Record | None:
    """The record of a line, or None where it is none of ours (damaged by a disk or a hand)."""
    if len(line) > MAX_LINE:
        return None
    try:
        record = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_no_number)
        if b"\\u" in line:  # half of a pair cannot be written down again, by MLflow as little as here
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    fields = _FIELDS.get(str(record.get("op"))) if isinstance(record, dict) else None
    whole = fields is not None and all(is_one(record.get(name)) for name, is_one in fields.items())
    return record if whole else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object: nobody knows which value is meant")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read_lines(file: IO[bytes], start: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines from byte `start`, each with the offset of its end. A tail without its newline is not a line yet.

    Of a line that is too long the beginning is given, which is more than `decode` takes.
    """
    file.seek(start)
    end = start
    while line := file.readline(MAX_LINE + 1):
        end += len(line)
        piece = line
        while piece and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE)
            end += len(piece)
        if not piece:
            return
        yield line, end


def read_ops(path: Path, *ops: str) -> Iterator[Record]:
    """All records of a journal, or those of the given kinds (cheaply: other lines are not parsed)."""
    starts = tuple(f'{{"op":"{op}"'.encode() for op in ops)
    with path.open("rb") as file:
        for line, _ in read_lines(file, 0):
            if not ops or line.startswith(starts):
                record = decode(line)
                if record is not None:
                    yield record


def last_record(path: Path) -> Record | None:
    """The newest record, damaged lines behind it passed over. Read from the end of the file, if it can be."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for span in (2**12, 2**16, 2**20, 2 * MAX_LINE):
            file.seek(max(0, size - span))
            lines = file.read(min(span, size)).split(b"\n")[:-1]
            whole = lines if span >= size else lines[1:]
            found = next((record for line in reversed(whole) if (record := decode(line))), None)
            if found is not None or span >= size:
                return found
    for record in read_ops(path):
        found = record
    return found
