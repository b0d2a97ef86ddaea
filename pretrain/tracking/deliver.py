"""A journal becomes an MLflow run: read lines, send them, note how far it came."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from pretrain.documents import read_object
from pretrain.errors import RunDirError
from pretrain.logs import log
from pretrain.tracking import progress, records
from pretrain.tracking.journal import artifact_file, journal_path
from pretrain.tracking.locks import LockFile, is_locked
from pretrain.tracking.progress import Delivered
from pretrain.tracking.records import Record
from pretrain.tracking.store import Item, MlflowRun, RefusedError, RunLostError, UnreachableError

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
POLL_SECONDS = 1.0
MAX_BATCH, MIN_BATCH = 1000, 50
SHOWN_BYTES = 4096
"""Of a damaged line, in the dead letters."""
CAMPAIGN_LOCK = ".campaign.lock"
CAMPAIGN_WAIT_SECONDS = 5.0
RUN_STATUS = "status.json"
"""How the run stands, in the trainer's own words; written before the journal is closed."""


class Drainer:
    """Delivers one journal to one store, in turns: several processes may do so, one at a time.

    from_start: deliver everything again; what MLflow has already stays as it is.
    quiet_seconds: how long a journal that nobody seems to write has been silent before its run counts as dead. 0 where
    the lock of its writer can be seen for sure; other nodes may not see it.
    """

    def __init__(
        self, run_dir: Path, uri: str, *, from_start: bool = False, quiet_seconds: float = 0.0
    ) -> None:
        self._run_dir = run_dir
        self._path = journal_path(run_dir)
        self._from_start = from_start
        self._quiet_seconds = quiet_seconds
        self._batch = MAX_BATCH
        self._mlflow: MlflowRun | None = None
        self._attempts: dict[int, int] = {}
        self._scanned = 0
        self._gap: float = math.inf
        self._stored: dict[str, dict[int, tuple[float, int]]] = {}
        self._is_closed = False
        self.note = Delivered(uri, -1)
        self.error: str | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Hold the run's lock inside; False if somebody else has it. What others delivered meanwhile is taken note of."""
        lock = progress.drain_lock(self._run_dir)
        try:
            is_mine = lock.acquire()
            if is_mine:
                self._catch_up()
            yield is_mine
        finally:
            lock.release()

    def advance(self) -> bool:
        """Deliver the next few lines; False when there is none. Raises `UnreachableError` when they did not get
        through. In a turn only."""
        group, end = self._next_group()
        if end == self.note.offset:
            return False
        try:
            if self._is_closed and "values" in group[0]:  # it was not dead, only silent
                self._open().set_status("RUNNING", group[-1]["time"])
                self._is_closed = False
            self._deliver(group, self._open())
        except UnreachableError:
            self._batch = max(MIN_BATCH, self._batch // 2)  # a slow server may take less at a time
            raise
        except RunLostError:
            self._begin_anew()
            return True
        self._batch = min(MAX_BATCH, self._batch * 2)
        self._save(Delivered(self.note.uri, end))
        return True

    def close_abandoned(self) -> bool:
        """Give a run whose process died without a word the status that it deserves. Call when `advance` has nothing
        left. Returns False where the run turned out to be gone from MLflow, so that `advance` has something again."""
        last = records.last_record(self._path)
        if last is None or last["op"] == "status" or self._is_closed or is_locked(self._path):
            return True
        if time.time() - self._path.stat().st_mtime >= self._quiet_seconds:
            try:
                self._open().set_status(self._deserved_status(last["attempt"]), last["time"])
            except RunLostError:
                self._begin_anew()
                return False
            except RefusedError as error:
                log.warning("MLflow did not take the status of %s: %s", self._run_dir, error)
            self._is_closed = True
        return True

    def note_error(self, error: Exception) -> None:
        """Leave the reason of an outage where the trainer's last words can quote it. Progress that somebody else made
        with another store is left alone."""
        self.error = str(error)
        found = progress.read(self._run_dir)
        if found is None or found.uri == self.note.uri:
            offset = max(0, self.note.offset) if found is None else found.offset
            with contextlib.suppress(OSError):  # the disk may be the very reason
                Delivered(self.note.uri, offset, self.error).save(self._run_dir)

    def _catch_up(self) -> None:
        """Begin where the note says that delivery stands."""
        found, uri = progress.read(self._run_dir), self.note.uri
        if found is None or found.uri != uri or self._from_start or not self._is_line_end(found.offset):
            found = Delivered(uri)
        if self._from_start:
            found.save(self._run_dir)
            self._from_start = False
        if not self._is_line_end(self._scanned):  # the journal lost its end since
            self._scanned = 0
        with self._path.open("rb") as file:
            # Known ahead, so that what a later attempt took the place of is not delivered in the first place.
            for line, end in records.read_lines(file, self._scanned):
                self._scanned = end
                if line.startswith((b'{"op":"attempt"', b'{"op":"gap"')) and (record := records.decode(line)):
                    if record["op"] == "gap":
                        self._gap = min(self._gap, record["attempt"])
                    else:
                        self._attempts[record["attempt"]] = record["from_step"]
        self.note = found

    def _is_line_end(self, offset: int) -> bool:
        """Whether the journal is what it was when a line of it ended here."""
        with self._path.open("rb") as file:
            file.seek(max(0, offset - 1))
            return offset == 0 or file.read(1) == b"\n"

    def _begin_anew(self) -> None:
        log.warning("MLflow no longer has this run; everything is delivered again")
        self._mlflow = None
        self._stored.clear()
        self._save(Delivered(self.note.uri))

    def _deserved_status(self, attempt: int) -> str:
        """What an attempt's process had already said of its end to others, if it died before it could say it here."""
        try:
            status = read_object(self._run_dir / RUN_STATUS)
            if status.get("attempt") == attempt:
                return {"finished": "FINISHED", "failed": "FAILED"}.get(str(status.get("status")), "KILLED")
        except (OSError, ValueError):
            pass
        return "KILLED"

    def _open(self) -> MlflowRun:
        if self._mlflow is None:
            run = next(records.read_ops(self._path, "run"), None)
            if run is None:
                raise RunDirError(
                    f"{self._path} does not begin with the description of its run; was it edited?"
                )
            with self._alone_in_campaign(run):
                self._mlflow = MlflowRun(self.note.uri, run)
            progress.save_page(self._run_dir, self._mlflow.page)
        return self._mlflow

    @contextlib.contextmanager
    def _alone_in_campaign(self, run: Record) -> Iterator[None]:
        """Runs of one campaign look for its run in turns: of those that begin together, such as the members of a sweep,
        each would make one of its own. They are neighbours on disk, and MLflow has nothing to agree by."""
        lock = None
        if run.get("campaign") is not None:
            with contextlib.suppress(OSError):  # a folder that is not ours: then luck has to do
                lock = LockFile(self._run_dir.absolute().parent / CAMPAIGN_LOCK)
        if lock is None:
            yield
            return
        try:
            deadline = time.monotonic() + CAMPAIGN_WAIT_SECONDS
            while not lock.acquire():
                if time.monotonic() > deadline:
                    raise UnreachableError("another run of the campaign has been asking MLflow for long")
                time.sleep(POLL_SECONDS / 10)
            yield
        finally:
            lock.release()

    def _next_group(self) -> tuple[list[Record], int]:
        """Lines that can travel in one request, or one line that cannot be joined, and the offset after them."""
        group: list[Record] = []
        end, size = self.note.offset, 0
        with self._path.open("rb") as file:
            for line, line_end in records.read_lines(file, end):
                record = records.decode(line) or _damaged(line, line_end - end)
                if "values" in record:
                    group.append(record)
                    size += max(1, len(record["values"]))
                elif group:
                    break
                else:
                    return [record], line_end
                end = line_end
                if size >= self._batch:
                    break
        return group, end

    def _deliver(self, group: list[Record], run: MlflowRun) -> None:
        if group and "values" not in group[0]:
            try:
                self._deliver_alone(group[0], run)
            except (RefusedError, ValueError, OSError) as error:
                self._bury(group[0], str(error))
        else:
            self._send([item for record in group for item in self._items(record)], run)

    def _deliver_alone(self, record: Record, run: MlflowRun) -> None:
        match record["op"]:
            case "attempt":
                self._is_closed = False
                run.set_status("RUNNING", record["time"])
                run.log([RunTag("attempt", str(record["attempt"]))])
            case "status":
                run.set_status(record["status"], record["time"])
            case "dataset":
                run.log_dataset(record)
            case "artifact":
                file = artifact_file(self._run_dir, record["path"])
                run.log_artifact(file, Path(record["path"]).parent)
            case "damaged":
                raise ValueError("not a line of a journal")

    def _items(self, record: Record) -> Iterator[Item]:
        """What a line stands for in MLflow's terms."""
        if record["op"] in ("params", "tags"):
            entity = Param if record["op"] == "params" else RunTag
            for name, text in record["values"].items():
                yield entity(name, text)
        elif record["op"] == "system" or not self._is_superseded(record):
            known = record.get("known", {})
            for name, measured in record["values"].items():
                value, stamp = known.get(name) or (measured, record["time"])
                point = (math.nan if value is None else float(value), int(stamp))
                if record["op"] == "metrics" and record["attempt"] >= self._gap:
                    point = self._as_stored(name, record["step"], point)
                yield Metric(name, *point, record["step"])

    def _as_stored(self, name: str, step: int, point: tuple[float, int]) -> tuple[float, int]:
        """The point itself or, where that is a step executed again and MLflow has its value from lines that are lost, the
        one there (see `records`)."""
        if name not in self._stored:
            first = min((s for attempt, s in self._attempts.items() if attempt >= self._gap), default=-1)
            self._stored[name] = self._open().newest_points(name, first)
        stored = self._stored[name].get(step)
        if stored is None:
            return point
        same = stored[0] == point[0] or (math.isnan(stored[0]) and math.isnan(point[0]))
        if same or name.startswith(records.WALL_CLOCK):
            return stored
        newer = max(point[1], stored[1] + 1)  # also where this node's clock is behind the lost one's
        return point[0], newer

    def _is_superseded(self, record: Record) -> bool:
        return any(
            attempt > record["attempt"] and from_step < record["step"]
            for attempt, from_step in self._attempts.items()
        )

    def _send(self, items: list[Item], run: MlflowRun) -> None:
        """Deliver a batch; one that MLflow refuses is halved until the culprit stands alone, and is set aside."""
        if not items:
            return
        try:
            run.log(items)
        except RefusedError as error:
            if len(items) == 1:
                self._bury(dict(items[0]), str(error))
                return
            middle = len(items) // 2
            self._send(items[:middle], run)
            self._send(items[middle:], run)

    def _bury(self, content: dict[str, Any], error: str) -> None:
        log.warning("MLflow did not take %.300s: %s", content, error)
        with (self._run_dir / "tracking" / "dead_letter.jsonl").open("a") as file:
            file.write(json.dumps({"error": error, **content}, default=str) + "\n")

    def _save(self, note: Delivered) -> None:
        note.save(self._run_dir)
        self.note = note


def _damaged(line: bytes, length: int) -> Record:
    """A line that cannot be delivered, as it is set aside: what there is to see of it."""
    return {"op": "damaged", "bytes": length, "line": line[:SHOWN_BYTES].decode(errors="replace")}


def deliver(
    drainer: Drainer,
    ends: Callable[[], bool],
    grace: float,
    heard: Callable[[int], None] = lambda offset: None,
) -> bool:
    """Deliver until `ends()` says that no more will come and all is delivered, or until that has been so for `grace`
    seconds without a success: True if all is delivered.

    `heard` is called with the journal's offset after each success. While MLflow is out of reach the lock is free, so
    that somebody with a better route may deliver.
    """
    wait, deadline = FIRST_WAIT, math.inf
    while True:
        ending = deadline < math.inf
        if not ending and ends():
            ending, deadline, wait = True, time.monotonic() + grace, FIRST_WAIT
        pause = POLL_SECONDS
        try:
            with drainer.turn() as is_mine:
                while is_mine and drainer.advance():
                    heard(drainer.note.offset)
                    wait = FIRST_WAIT
                    deadline = time.monotonic() + grace if ending else math.inf
                if is_mine and ending and drainer.close_abandoned():
                    return True
        except (UnreachableError, OSError) as error:
            words = "MLflow does not answer" if isinstance(error, UnreachableError) else "no delivery"
            log.warning("%s, next try in %.1f s: %s", words, wait, error)
            drainer.note_error(error)
            pause, wait = wait, min(LONGEST_WAIT, 2 * wait)
        resume = min(deadline, time.monotonic() + pause)
        while time.monotonic() < resume and (ending or not ends()):
            time.sleep(max(0.0, min(POLL_SECONDS, resume - time.monotonic())))
        if time.monotonic() >= deadline:
            return False
