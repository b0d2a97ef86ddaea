"""Every way in which a server can fail a run, and what MLflow holds afterwards: each point once, in one run.

The short version delivers from threads of this process, all outages at once; the long one (`-m slow`) goes through
them one by one with the processes that a training has, and prints a table (`-s` shows it).
"""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow_server import Server, Stored
from patience import PATIENCE, wait_until
from proxy import Proxy

from pretrain.config import RunConfig, TrackingConfig
from pretrain.tracking import Tracker, progress
from pretrain.tracking.journal import journal_path
from pretrain.tracking.records import read_ops

STEPS = 200
MODES = ("drop", "reset", "stall", "500", "503", "slow", "lost")
KINDS = (*MODES, "flapping")


class Outcome(NamedTuple):
    """What MLflow holds of a run compared with its journal."""

    missing: int
    doubled: int
    wrong: int
    runs: int
    status: str
    unsent: int


WHOLE = Outcome(missing=0, doubled=0, wrong=0, runs=1, status="FINISHED", unsent=0)


def compare(run_dir: Path, server: Server) -> Outcome:
    stored = Stored(server.database, run_dir)
    if len(stored.run_ids) != 1:
        return Outcome(-1, -1, -1, len(stored.run_ids), "?", progress.count_unsent(run_dir))
    expected: dict[tuple[str, int], float] = {}
    for record in read_ops(journal_path(run_dir), "metrics"):
        for name, value in record["values"].items():
            known = record.get("known", {}).get(name)
            expected[name, record["step"]] = known[0] if known else value
    points = [((name, step), v) for name in {n for n, _ in expected} for step, v in stored.points(name)]
    got = dict(points)
    return Outcome(
        missing=len(expected.keys() - got.keys()),
        doubled=len(points) - len(got),
        wrong=sum(got[key] != value for key, value in expected.items() if key in got),
        runs=1,
        status=stored.status,
        unsent=progress.count_unsent(run_dir),
    )


class Pen:
    """Logs steps and keeps how long each call took."""

    def __init__(self, run_dir: Path, uri: str | None) -> None:
        self.seconds: list[float] = []
        config = RunConfig(dir=str(run_dir))
        self.tracker = Tracker.start(run_dir, TrackingConfig(uri=uri), config, params={"lr": 0.1}, tags={})

    def write(self, steps: range) -> None:
        for step in steps:
            began = time.perf_counter()
            self.tracker.metrics(step, {"train/loss": 1 / step, "train/lr": 0.1, "perf/speed": float(step)})
            self.seconds.append(time.perf_counter() - began)


def go_through(kind: str, pen: Pen, proxy: Proxy, arrived: Callable[[int], bool]) -> None:
    """A run whose middle falls into an outage that is over before its end."""
    pen.write(range(1, 61))
    wait_until(lambda: arrived(60))
    for mode in ("reset", "500", "stall", "lost") if kind == "flapping" else (kind,):
        before = proxy.seen.get(mode, 0)
        proxy.mode = mode  # type: ignore[assignment]
        first = len(pen.seconds) + 1
        pen.write(range(first, first + (20 if kind == "flapping" else 80)))
        wait_until(lambda mode=mode, before=before: proxy.seen.get(mode, 0) > before)
    proxy.mode = "pass"
    pen.write(range(len(pen.seconds) + 1, STEPS + 1))


@contextlib.contextmanager
def proxied(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def in_threads(kind: str, run_dir: Path, server: Server) -> None:
    from pretrain.tracking.deliver import Drainer, deliver

    ended = threading.Event()
    with proxied(server) as proxy:
        pen = Pen(run_dir, None)
        drainer = Drainer(run_dir, proxy.uri)
        thread = threading.Thread(target=deliver, args=(drainer, ended.is_set, PATIENCE), daemon=True)
        thread.start()
        stored = Stored(server.database, run_dir)
        go_through(
            kind, pen, proxy, lambda step: bool(stored.run_ids) and len(stored.points("train/loss")) >= step
        )
        pen.tracker.finish("FINISHED")
        ended.set()
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def outcomes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    server.start()
    folder = tmp_path_factory.mktemp("outages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        threads = [
            threading.Thread(target=in_threads, args=(kind, folder / kind, server), daemon=True)
            for kind in KINDS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    return {kind: compare(folder / kind, server) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_outage_mlflow_has_every_point_once(kind: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[kind] == WHOLE


def test_two_drainers_of_one_run_at_once_deliver_every_point_once(server: Server, tmp_path, monkeypatch):
    """Also where the file system's locks show neither to the other."""
    from pretrain.tracking import deliver as module
    from pretrain.tracking.locks import LockFile

    server.start()
    monkeypatch.setattr(LockFile, "acquire", lambda self: True)
    pen = Pen(tmp_path / "run", None)
    pen.write(range(1, STEPS + 1))
    drainers = [module.Drainer(tmp_path / "run", server.uri) for _ in range(2)]
    with drainers[0].turn():
        drainers[0].advance()  # the run is there; from now on nothing keeps them apart
    for drainer in drainers:
        drainer._batch = 20
    threads = [
        threading.Thread(target=module.deliver, args=(drainer, lambda: True, PATIENCE), daemon=True)
        for drainer in drainers
    ]
    pen.tracker.finish("FINISHED")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert compare(tmp_path / "run", server) == WHOLE


# --- the long version ---


class Row(NamedTuple):
    kind: str
    outcome: Outcome
    longest_call: float
    usual_call: float
    exit_seconds: float
    sync: str


def finish(kind: str, pen: Pen, run_dir: Path, server: Server, late: bool = False) -> Row:
    """End the run, deliver what is left as a user would, and compare."""
    began = time.perf_counter()
    pen.tracker.finish("FINISHED")
    seconds = time.perf_counter() - began
    left = progress.count_unsent(run_dir)
    if left:
        if late:
            server.start()
        command = [sys.executable, "-m", "pretrain", "track", "sync", str(run_dir), "--uri", server.uri]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
    times = [1000 * second for second in pen.seconds]
    return Row(
        kind,
        compare(run_dir, server),
        max(times),
        statistics.median(times),
        seconds,
        f"{left} by sync" if left else "",
    )


def in_processes(kind: str, run_dir: Path, server: Server) -> Row:
    server.start()
    with proxied(server) as proxy:
        pen = Pen(run_dir, proxy.uri)
        stored = Stored(server.database, run_dir)
        go_through(
            kind, pen, proxy, lambda step: bool(stored.run_ids) and len(stored.points("train/loss")) >= step
        )
        return finish(kind, pen, run_dir, server)


def has_trouble(run_dir: Path) -> bool:
    note = progress.read(run_dir)
    return note is not None and note.error is not None


def server_goes(kind: str, run_dir: Path, server: Server) -> Row:
    """started down | killed and restarted | never there"""
    if kind == "killed, back":
        server.start()
    else:
        server.kill()
    pen = Pen(run_dir, server.uri)
    pen.write(range(1, 101))
    if kind == "killed, back":
        stored = Stored(server.database, run_dir)
        wait_until(lambda: stored.run_ids and stored.points("train/loss"))
        server.kill()
    pen.write(range(101, 151))
    wait_until(lambda: has_trouble(run_dir))
    if kind != "never there":
        server.start()
    pen.write(range(151, STEPS + 1))
    return finish(kind, pen, run_dir, server, late=kind == "never there")


def trainer_dies(run_dir: Path, server: Server) -> Row:
    """SIGKILL during an outage, a line cut short, and a second attempt from an earlier step."""
    server.start()
    script = Path(__file__).with_name("attempt.py")
    with proxied(server) as proxy:
        proxy.mode = "reset"
        command = [sys.executable, str(script), str(run_dir), proxy.uri]
        first = subprocess.Popen([*command, "0", "170", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert first.stdout is not None
        first.stdout.readline()
        first.kill()
        first.wait()
        with journal_path(run_dir).open("ab") as file:
            file.write(b'{"op":"metrics","attempt":1,"step":171,"val')
        proxy.mode = "pass"
        began = time.perf_counter()
        subprocess.run([*command, "140", str(STEPS), "1"], input=b"", timeout=PATIENCE, check=True)
        seconds = time.perf_counter() - began
    outcome = compare(run_dir, server)
    return Row("trainer killed", outcome, float("nan"), float("nan"), seconds, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_outages_one_by_one_with_the_processes_of_a_training(server: Server, tmp_path: Path) -> None:
    rows = [in_processes(kind, tmp_path / kind, server) for kind in KINDS]
    for kind in ("started down", "killed, back", "never there"):
        rows.append(server_goes(kind, tmp_path / kind.replace(" ", "_"), server))
    rows.append(trainer_dies(tmp_path / "dies", server))
    print(
        f"\n{os.cpu_count()} cores, {STEPS} steps x 3 metrics; calls in ms, exit in s (the last with its training)"
    )
    print("| outage | missing | doubled | wrong | runs | status | call median | longest | exit | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = (
            *row.outcome[:5],
            f"{row.usual_call:.2f}",
            f"{row.longest_call:.1f}",
            f"{row.exit_seconds:.1f}",
        )
        print("|", " | ".join(map(str, (row.kind, *cells, row.sync))), "|")
    assert {row.kind: row.outcome for row in rows} == {row.kind: WHOLE for row in rows}
