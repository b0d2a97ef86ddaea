"""How far a journal was delivered: the drainer's note, `RUN/tracking/delivered.json`, and its lock."""

import json
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

from pretrain.documents import read_object
from pretrain.tracking import records
from pretrain.tracking.locks import LockFile

PAGE = "page"
_PAGE = re.compile(r"#/experiments/[\w-]+/runs/[\w-]+", re.ASCII)


class Delivered(NamedTuple):
    """The journal up to byte `offset` is with the MLflow at `uri`. `error`: why it is not further, if it is not."""

    uri: str
    offset: int = 0
    error: str | None = None

    def save(self, run_dir: Path) -> None:
        """Replace the note in one step. Lost with the power it costs a repeated delivery, nothing else."""
        path = _path(run_dir)
        # of this process alone: a file system may have no locks that other nodes see
        aside = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.new")
        aside.write_text(json.dumps(self._asdict()) + "\n")
        aside.replace(path)


def read(run_dir: Path) -> Delivered | None:
    """The drainer's note, or None where there is none that can be read."""
    try:
        match read_object(_path(run_dir)):
            case {"uri": str(uri), "offset": int(offset), "error": str() | None as error} if offset >= 0:
                return Delivered(uri, offset, error)
    except (OSError, ValueError):
        pass
    return None


def count_unsent(run_dir: Path) -> int:
    """Lines of the journal that no drainer has dealt with yet."""
    note = read(run_dir)
    with (run_dir / records.FILE).open("rb") as file:
        return sum(1 for _ in records.read_lines(file, note.offset if note else 0))


def is_beyond(run_dir: Path, size: int) -> bool:
    """Whether the note tells of more bytes than the `size` that the journal has: it lost its end, and what will stand there
    has not been delivered."""
    note = read(run_dir)
    return note is not None and note.offset > size


def forget(run_dir: Path) -> None:
    """Take the note away: all of the journal is to be looked at again."""
    _path(run_dir).unlink(missing_ok=True)


def drain_lock(run_dir: Path) -> LockFile:
    """Held by whoever is delivering a run at this moment."""
    return LockFile(run_dir / "tracking" / "drain.lock")


def save_page(run_dir: Path, page: str) -> None:
    """Note where MLflow shows the run: the part of the address that comes after the server's."""
    path = run_dir / "tracking" / PAGE
    aside = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.new")
    aside.write_text(page + "\n")
    aside.replace(path)


def read_page(run_dir: Path) -> str | None:
    """What `save_page` noted, or None where the run has not reached MLflow yet."""
    try:
        page = (run_dir / "tracking" / PAGE).read_text().strip()
    except (OSError, ValueError):
        return None
    return page if _PAGE.fullmatch(page) else None


def _path(run_dir: Path) -> Path:
    return run_dir / "tracking" / "delivered.json"
