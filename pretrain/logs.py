"""Where words go: one log file per rank in the run directory; rank 0 also speaks on stderr.

Standard output stays free for what a command was asked to print. DeepSpeed writes warnings and bare prints to
stdout at any time; `quiet_stdout` sends them to the rank's log file.
"""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from pretrain.redact import redact_text

log = logging.getLogger("pretrain")

_FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def to_stderr(*, debug: bool = False) -> None:
    """Send the product's log to stderr. Called once by a command, never at import."""
    _attach(log, logging.StreamHandler(sys.stderr), "%(message)s")
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False


def all_to_stderr() -> None:
    """Send the product's log and that of all libraries to stderr, with the time: for a process whose stderr is a file."""
    root = logging.getLogger()
    _attach(root, logging.StreamHandler(sys.stderr), _FORMAT)
    root.setLevel(logging.INFO)


def to_rank_file(run_dir: Path, rank: int) -> Path:
    """Send the log of this rank, and the libraries' warnings, to `run_dir/logs/rank_N.log`. Every rank."""
    path = run_dir / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    _attach(log, handler, _FORMAT)
    log.setLevel(logging.INFO)
    log.propagate = False
    _attach(logging.getLogger(), handler, _FORMAT)
    logging.captureWarnings(True)
    return path


def redirect(library: str, path: Path) -> None:
    """Send a library's own logger to a file in place of wherever it wrote."""
    logger = logging.getLogger(library)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    _attach(logger, logging.FileHandler(path), _FORMAT)
    logger.propagate = False


def to_file_only(path: Path, error: BaseException) -> None:
    """Append an error with its traceback to a rank's log file, and say nothing on the terminal."""
    with path.open("a") as file:
        file.write(redact_text("".join(traceback.format_exception(error))))


@contextlib.contextmanager
def quiet_stdout(path: Path) -> Iterator[None]:
    """Append what is printed inside to the file at `path`."""
    with path.open("a") as file, contextlib.redirect_stdout(file):
        yield


class _Formatter(logging.Formatter):
    """Takes secrets out, those of other libraries' messages and of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def _attach(logger: logging.Logger, handler: logging.Handler, form: str) -> None:
    handler.setFormatter(_Formatter(form, datefmt="%H:%M:%S"))
    logger.addHandler(handler)
