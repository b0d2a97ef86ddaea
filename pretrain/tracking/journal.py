"""The journal: what a run logged, on local disk, before anybody else hears of it.

`Journal` is one attempt's pen. A call checks its values, takes out secrets and appends one line by one `write`; it
never waits for a network. A killed process loses nothing that a call had returned for; a node that loses power loses
at most the last `FSYNC_SECONDS`.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain import faults
from pretrain.errors import RunDirError
from pretrain.logs import log
from pretrain.redact import redact_setting, redact_text
from pretrain.tracking import progress, records
from pretrain.tracking.locks import try_lock
from pretrain.tracking.records import Record, Status

FSYNC_SECONDS = 5.0
LOCK_WAIT_SECONDS = 10.0
MAX_ARTIFACT_BYTES = 16 * 2**20

Point = tuple[float | None, int]
"""A value and its time in milliseconds."""


def journal_path(run_dir: Path) -> Path:
    return run_dir / records.FILE


def restored_path(run_dir: Path) -> Path:
    """Where a copy of the journal is put that somebody brought back: the next attempt goes on with it."""
    return run_dir / (records.FILE + ".restored")


@dataclass
class _History:
    """What earlier attempts left: all that a new attempt needs in order to continue them."""

    run: Record | None = None
    attempt: int = 0
    time: int = 0
    params: dict[str, str] = field(default_factory=dict)
    points: dict[tuple[str, int], Point] = field(default_factory=dict)


class Journal:
    """One attempt's journal. Rank 0 only; one living `Journal` per run directory."""

    def __init__(
        self,
        descriptor: int,
        run_dir: Path,
        history: _History,
        uri: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._is_closed = False
        self._uri = uri
        self._run_dir = run_dir.resolve()
        self._clock = clock
        self._last_time = history.time
        self._began = clock() if history.run is None else history.run["time"] / 1000
        self._points = history.points
        self._params = history.params
        self._names: set[str] = set()
        self._synced_at = time.monotonic()
        self._warned = False
        self.attempt = history.attempt + 1

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        experiment: str,
        name: str,
        campaign: str | None = None,
        uri: str | None = None,
        from_step: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> "Journal":
        """Begin an attempt that continues after step `from_step` (0: from the start).

        experiment, name, campaign, uri: where MLflow shows the run; the first three are fixed by the first attempt.
        Raises `RunDirError` where the directory cannot be written or another process writes this journal.
        """
        path = journal_path(run_dir)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _adopt(restored_path(run_dir), path)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _lock(descriptor, path)
            _heal(descriptor, path)
            is_cut = progress.is_beyond(run_dir, os.fstat(descriptor).st_size)
            history = _read(path, from_step)
        except OSError as error:
            raise RunDirError(f"cannot write the journal {path}: {error.strerror or error}") from None

        journal = cls(descriptor, run_dir, history, uri, clock)
        identity = {
            "experiment": _clean(experiment),
            "name": _clean(name),
            "campaign": None if campaign is None else _clean(campaign),
        }
        if history.run is None:
            journal._append("run", format=records.FORMAT, uid=_run_uid(run_dir), **identity)
        else:
            _warn_of_changes(history.run, identity)
        if is_cut:
            log.warning("%s: lines that MLflow has are missing at its end; they are looked up there", path)
            journal._append("gap")
            os.fsync(descriptor)
            progress.forget(run_dir)  # not before: the gap would be forgotten with it
        journal._append("attempt", from_step=from_step, uri=uri)
        return journal

    def go_back(self, step: int) -> None:
        """Begin another attempt, which goes on after `step` with other samples: nothing is compared with before."""
        with self._lock:
            self.attempt += 1
            self._last_time += 1  # a value that differs must be newer than the one it replaces
            self._points.clear()
        self._append("attempt", from_step=step, uri=self._uri, other_samples=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of one step. A step that an earlier attempt executed too is compared with it (see `records`).

        Raises `ValueError` for a name that MLflow would refuse, `TypeError` for a value that is no plain number.
        """
        self._check_names(values)
        checked = records.check_values(values)
        known: dict[str, Point] = {}
        diverged = []
        for name, value in checked.items():
            before = self._points.get((name, step))
            if before is None:
                continue
            if before[0] == value or name.startswith(records.WALL_CLOCK):
                known[name] = before
            else:
                diverged.append(name)
        if diverged:
            checked[records.DIVERGED] = float(len(diverged))
            self._warn_of_divergence(step, diverged[0], checked[diverged[0]])
        self._append("metrics", step=int(step), values=checked, **({"known": known} if known else {}))

    def system(self, values: Mapping[str, float], seconds: float) -> None:
        """Log figures of a machine, seen at the time `seconds`. May be called by another thread than the rest; raises
        `RunDirError` after `close`."""
        self._check_names(values)
        second = max(0, round(seconds - self._began))
        self._append("system", step=second, values=records.check_values(values))

    def params(self, values: Mapping[str, object]) -> None:
        """Log settings. MLflow's parameters cannot change, so one that did since it was first logged becomes the tag
        `attempt_N/NAME`."""
        texts = self._settings(values)
        new = {name: text for name, text in texts.items() if name not in self._params}
        changed = {
            f"attempt_{self.attempt}/{name}": text
            for name, text in texts.items()
            if self._params.get(name, text) != text
        }
        if new:
            self._append("params", values=new)
            self._params |= new
        if changed:
            self._append("tags", values=changed)

    def tags(self, values: Mapping[str, object]) -> None:
        """Set labels of the run; a later value takes the place of an earlier one."""
        self._append("tags", values=self._settings(values))

    def dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Name a data set that the run reads: digest is the manifest's hash, context "training" or "validation"."""
        self._append(
            "dataset",
            name=_clean(name),
            digest=digest,
            source=_clean(source),
            context=context,
        )

    def artifact(self, path: Path) -> None:
        """Have a small file of the run directory kept with the run, as it is when it is delivered.

        Raises `ValueError` for a path outside, a file that is none, or one of more than `MAX_ARTIFACT_BYTES`.
        """
        self._append("artifact", path=str(artifact_file(self._run_dir, path).relative_to(self._run_dir)))

    def sync(self) -> None:
        """Return when all lines are on disk. Called at every checkpoint."""
        os.fsync(self._descriptor)
        self._synced_at = time.monotonic()

    def close(self, status: Status) -> None:
        """Write how the attempt ended, and put the pen down."""
        self._append("status", status=status)
        self.sync()
        with self._lock:
            self._is_closed = True
            os.close(self._descriptor)

    def _check_names(self, values: Mapping[str, object]) -> None:
        for name in values:
            if name not in self._names:
                self._names.add(records.check_name(name))

    def _settings(self, values: Mapping[str, object]) -> dict[str, str]:
        self._check_names(values)
        return {name: _clean_setting(name, value) for name, value in values.items()}

    def _append(self, op: str, **content: object) -> None:
        try:
            with self._lock:
                self._write(op, content)
            if op != "system" and time.monotonic() - self._synced_at > FSYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise RunDirError(
                f"cannot write {journal_path(self._run_dir)}: {error.strerror or error}"
            ) from None

    def _write(self, op: str, content: Mapping[str, object]) -> None:
        if self._is_closed:
            raise RunDirError(f"{journal_path(self._run_dir)} is closed: this attempt is over")
        self._last_time = max(round(self._clock() * 1000), self._last_time)
        record: Record = {"op": op, "attempt": self.attempt, "time": self._last_time, **content}
        line = records.encode(record)
        if op != "system":  # whose step is a second, in a thread of its own
            faults.at("track", record.get("step"))
        written = os.write(self._descriptor, line)
        if written < len(line):  # a full disk took part of it: leave no half line before the next one
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise RunDirError(f"{journal_path(self._run_dir)}: no space left for a line of the journal")

    def _warn_of_divergence(self, step: int, name: str, value: float | None) -> None:
        if not self._warned:
            log.warning(
                "step %d executed again gives %s = %s, before it was %s; counted as %s from here on",
                step,
                name,
                value,
                self._points[name, step][0],
                records.DIVERGED,
            )
            self._warned = True


def artifact_file(run_dir: Path, path: Path | str) -> Path:
    """The real file of an artifact; `ValueError` unless it is a small regular file inside `run_dir`."""
    root = run_dir.resolve()
    real = (root / path).resolve()
    if not real.is_relative_to(root):
        raise ValueError(f"artifact {path} is outside the run directory {run_dir}")
    if not real.is_file():
        raise ValueError(f"artifact {path} is not a file")
    if real.stat().st_size > MAX_ARTIFACT_BYTES:
        raise ValueError(f"artifact {path} has more than {MAX_ARTIFACT_BYTES:,} bytes")
    return real


def label(run_dir: Path, values: Mapping[str, object]) -> None:
    """Set labels of a run whose process has ended; how it ended, and when, stays as it is.

    Raises `RunDirError` where the run lives, or its journal cannot be written.
    """
    path = journal_path(run_dir)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise RunDirError(f"cannot write the journal {path}: {error.strerror or error}") from None
    _lock(descriptor, path)
    try:
        _heal(descriptor, path)
        last = records.last_record(path)
        if last is None:
            raise RunDirError(f"{path} holds no run")
        texts = {records.check_name(name): _clean_setting(name, value) for name, value in values.items()}
        lines = records.encode(
            {"op": "tags", "attempt": last["attempt"], "time": last["time"], "values": texts}
        )
        if last["op"] == "status":  # the last word of a run that has ended
            lines += records.encode(last)
        written = os.write(descriptor, lines)
        if written < len(lines):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise RunDirError(f"{path}: no space left for a line of the journal")
        os.fsync(descriptor)
    except OSError as error:
        raise RunDirError(f"cannot write the journal {path}: {error.strerror or error}") from None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Wait a little: workers of a killed process may hold its files for some seconds."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while not try_lock(descriptor):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise RunDirError(
                f"another process is writing {path}. One run directory has one running job: end the other, or set "
                "run.dir to another directory"
            )
        time.sleep(0.1)


def _adopt(restored: Path, path: Path) -> None:
    """Go on with a journal that was brought back, if there is one and none is here. It ends where it was copied, so MLflow
    may have been given more than it tells of."""
    if path.exists() or not restored.is_file():
        restored.unlink(missing_ok=True)
        return
    with restored.open("r+b") as file:
        _heal(file.fileno(), restored)
        last = records.last_record(restored)
        if last is not None:
            file.seek(0, os.SEEK_END)
            file.write(records.encode({"op": "gap", "attempt": last["attempt"] + 1, "time": last["time"]}))
        file.flush()
        os.fsync(file.fileno())
    restored.replace(path)


def _heal(descriptor: int, path: Path) -> None:
    """Cut off a last line that a killed process left without its end."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        log.warning("%s: dropped an unfinished last line of %d bytes", path, size - end)
        os.ftruncate(descriptor, end)


def _read(path: Path, from_step: int) -> _History:
    """All that matters of earlier attempts. Points of `from_step` itself count: a step may be evaluated after it was
    saved, and again after the restart."""
    history = _History()
    for record in records.read_ops(path):
        history.time = max(history.time, record["time"])
        match record["op"]:
            case "run":
                history.run = record
            case "attempt":
                history.attempt = record["attempt"]
                if record.get("other_samples"):
                    later = [known for known in history.points if known[1] > record["from_step"]]
                    for name_and_step in later:
                        del history.points[name_and_step]
            case "params":
                history.params |= record["values"]
            case "metrics" if record["step"] >= from_step:
                known = record.get("known", {})
                for name, value in record["values"].items():
                    point = known.get(name) or (value, record["time"])
                    history.points[name, record["step"]] = (point[0], point[1])
    history.time += history.attempt > 0  # a value that differs must be newer than the one it replaces
    return history


def _run_uid(run_dir: Path) -> str:
    """The name by which MLflow's run is found again, made with the run directory."""
    path = run_dir / "tracking" / "run_uid"
    found = path.read_text(errors="replace").strip() if path.exists() else ""
    if records.is_uid(found):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text(uuid.uuid4().hex + "\n")
    aside.replace(path)
    return path.read_text().strip()


def _clean(text: str) -> str:
    """Without secrets, and without bytes of a file's name that are no text (half a pair, in Python's way to hold them)."""
    return redact_text(text).encode(errors="replace").decode()


def _clean_setting(name: str, value: object) -> str:
    return redact_setting(name, str(value)).encode(errors="replace").decode()


def _warn_of_changes(run: Record, identity: Mapping[str, str | None]) -> None:
    for key, now in identity.items():
        if run.get(key) != now:
            log.warning("the run stays in MLflow with %s %r: it cannot become %r", key, run.get(key), now)
