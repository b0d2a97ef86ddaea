"""Delivery for many runs from one place: a login node, for compute nodes that have no route to MLflow.

Runs are looked for again in every round, so that one may begin at any time. Each has its turn under the same lock that
a run's own drainer takes, and what the file system's locks do not show does no harm: points sent twice are one point.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pretrain.errors import UserError
from pretrain.logs import log
from pretrain.tracking import progress, records
from pretrain.tracking.deliver import Drainer
from pretrain.tracking.journal import journal_path
from pretrain.tracking.store import UnreachableError

QUIET_SECONDS = 900.0
"""A journal may be locked by a process of another node, which not every file system shows: a run is called dead only
after this long without a line."""


_Mark = tuple[int, int]
"""Size and time of a journal: those that have ended are many and long, and are read again only where these differ."""


class Watch:
    """Rounds of delivery over run directories and folders of them.

    uri_of: where a run is to be delivered; raises `UserError` for one that cannot be.
    """

    def __init__(self, places: Iterable[Path], uri_of: Callable[[Path], str]) -> None:
        self._places = list(places)
        self._uri_of = uri_of
        self._drainers: dict[tuple[Path, str], Drainer] = {}
        self._words: dict[Path, str] = {}
        self._ended: dict[Path, _Mark] = {}

    def follow(self, every_seconds: float) -> None:
        """Go round for ever; a Ctrl-C ends it."""
        while True:
            self.round()
            time.sleep(every_seconds)

    def round(self) -> int:
        """Deliver what every run has to give; returns the lines that wait for a store. One that does not answer is asked
        once a round."""
        silent: dict[str, str] = {}
        left = 0
        for run in (run for place in self._places for run in find_runs(place)):
            try:
                if self._ended.get(run) == _mark(run):
                    continue
                uri = self._uri_of(run)
                if uri in silent:
                    self._say(run, f"waits for {uri}: {silent[uri]}")
                elif error := self._deliver(run, uri):
                    silent[uri] = error
                left += progress.count_unsent(run)
            except (UserError, OSError) as error:
                self._say(run, str(error))
        return left

    def _deliver(self, run: Path, uri: str) -> str | None:
        """Why it did not work, or None."""
        drainer = self._drainers.setdefault((run, uri), Drainer(run, uri, quiet_seconds=QUIET_SECONDS))
        before, mark = progress.count_unsent(run), _mark(run)
        try:
            with drainer.turn() as is_mine:
                if not is_mine:
                    self._say(run, "its own process is delivering")
                    return None
                while drainer.advance() or not drainer.close_abandoned():
                    pass
        except UnreachableError as error:
            drainer.note_error(error)
            self._say(run, f"waits for {uri}: {error}")
            return str(error)
        if before:
            log.info("%s: %d records delivered", run, before)
        last = records.last_record(journal_path(run))
        ended = ""
        if last and last["op"] == "status":
            ended, self._ended[run] = f", and it has ended: {last['status']}", mark
        self._say(run, f"everything is in MLflow{ended}")
        return None

    def _say(self, run: Path, words: str) -> None:
        """Once, until there is something else to say."""
        if self._words.get(run) != words:
            self._words[run] = words
            log.info("%s: %s", run, words)


def _mark(run: Path) -> _Mark:
    found = journal_path(run).stat()
    return found.st_size, found.st_mtime_ns


def find_runs(place: Path) -> Iterator[Path]:
    """The run directories at or below `place`, in order; what lies inside of one is not searched."""
    for folder, names, files in os.walk(place):
        if journal_path(Path(folder)).name in files:
            yield Path(folder)
            names.clear()
        names.sort()
