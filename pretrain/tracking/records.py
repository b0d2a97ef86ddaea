"""The lines of a journal, and how their values are checked. One JSON object per line, `op` first:

    {"op": "run", "format": 1, "uid", "experiment", "name", "campaign", "time"}        first line, once
    {"op": "attempt", "attempt", "from_step", "uri", "time", "other_samples"}          a process takes over, or goes back
    {"op": "metrics", "attempt", "step", "time", "values": {name: value}, "known": {name: [value, time]}}
    {"op": "system", "attempt", "step", "time", "values": {name: value}}               machines; step: second of the run
    {"op": "params" | "tags", "attempt", "time", "values": {name: text}}
    {"op": "dataset", "attempt", "time", "name", "digest", "source", "context"}
    {"op": "artifact", "attempt", "time", "path"}                                      path below the run directory
    {"op": "status", "attempt", "time", "status"}                                      the attempt ended by itself

Times are milliseconds since 1970, given once and never again: MLflow keeps a point per (name, time, step, value), so
the same point sent twice is one point. They never fall within a journal, whatever the clock does.

An attempt that begins at `from_step` takes the place of what earlier attempts wrote about later steps. Where it goes
back to train on `other_samples` (true or missing), its values are not compared with theirs.
`known` names the values of a line that stand for a point written before: an equal value of a step that was executed
again keeps its first time, and a wall-clock value (`WALL_CLOCK`) keeps its first value too. Those points are what
MLflow gets; `values` is what this attempt measured. Lines of `system` belong to the clock: nothing takes their place. NaN is null; an infinity is clamped to the largest float.
"""

import json
import math
import numbers
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

Record = dict[str, Any]
Status = Literal["FINISHED", "FAILED", "KILLED"]

FORMAT = 1
WALL_CLOCK = ("perf/", "system/")
"""Names of values that differ each time a step is executed, by prefix."""
NONFINITE = "nonfinite/"
DIVERGED = "resume/diverged"

_NAME = re.compile(r"[\w.\- :/]{1,230}", re.ASCII)  # MLflow takes 250; prefixes of ours need some
_STAMP = {"attempt": int, "time": int}
_FIELDS: dict[str, dict[str, type]] = {
    "run": {**_STAMP, "uid": str, "experiment": str, "name": str},
    "attempt": {**_STAMP, "from_step": int},
    "metrics": {**_STAMP, "step": int, "values": dict},
    "system": {**_STAMP, "step": int, "values": dict},
    "params": {**_STAMP, "values": dict},
    "tags": {**_STAMP, "values": dict},
    "dataset": {**_STAMP, "name": str, "digest": str, "source": str, "context": str},
    "artifact": {**_STAMP, "path": str},
    "status": {**_STAMP, "status": str},
}
"""What a line must have to be used; `known`, `campaign`, `uri` and `other_samples` may be missing."""
_LARGEST = 1.7976931348623157e308


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
    """One line."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Record | None:
    """The record of a line, or None where it is none of ours (damaged by a disk or a hand)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fields = _FIELDS.get(str(record.get("op"))) if isinstance(record, dict) else None
    whole = fields is not None and all(isinstance(record.get(name), kind) for name, kind in fields.items())
    return record if whole else None


def read_lines(file: IO[bytes], start: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines from byte `start`, each with the offset of its end. A tail without its newline is not a line yet."""
    file.seek(start)
    end = start
    for line in file:
        if not line.endswith(b"\n"):
            return
        end += len(line)
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
    """The newest whole record, read from the end of the file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        span = 4096
        while True:
            file.seek(max(0, size - span))
            lines = file.read(min(span, size)).splitlines(keepends=True)
            whole = [line for line in (lines[1:] if span < size else lines) if line.endswith(b"\n")]
            if whole or span >= size:
                return decode(whole[-1]) if whole else None
            span *= 4
