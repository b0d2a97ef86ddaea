"""A journal that lost its end, by a power cut or with its disk: the run goes on in the same MLflow run, no point twice."""

import math
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import Server, Stored
from patience import PATIENCE

from pretrain.tracking import Journal, journal, progress, records
from pretrain.tracking.deliver import Drainer, deliver
from pretrain.tracking.journal import journal_path, restored_path


def drain(run_dir: Path, uri: str, **options: bool) -> None:
    assert deliver(Drainer(run_dir, uri, **options), lambda: True, PATIENCE)


def attempt(
    run_dir: Path,
    steps: range,
    value: Callable[[int], float] = float,
    *,
    from_step: int,
    perf: float,
    clock: float | None = None,
    status: str | None = "FINISHED",
) -> None:
    clocks = {} if clock is None else {"clock": lambda: clock}
    pen = Journal.open(run_dir, experiment="pretrain", name="run", from_step=from_step, **clocks)
    for step in steps:
        pen.metrics(step, {"train/loss": value(step), "train/nan": math.nan, "perf/speed": perf})
    if status is None:
        os.close(pen._descriptor)  # all that the kernel does for a killed process
    else:
        pen.close(status)


def cut(run_dir: Path, step: int) -> None:
    """Let the journal end before the line of this step, as after a power cut."""
    path = journal_path(run_dir)
    content = path.read_bytes()
    os.truncate(path, content.rindex(b"\n", 0, content.index(b'"step":%d,' % step)) + 1)


def delivered_and_cut(database: Path, tmp_path: Path, step: int) -> tuple[Path, str]:
    """Ten steps that MLflow has; the journal has lost those from `step` on. Returns the run and MLflow's address."""
    run, uri = tmp_path / "run", f"sqlite:///{database}"
    attempt(run, range(1, 11), from_step=0, perf=100.0, status=None)
    drain(run, uri)
    cut(run, step)
    return run, uri


def test_points_of_lines_that_a_power_cut_took_are_not_doubled(database: Path, tmp_path: Path) -> None:
    run, uri = delivered_and_cut(database, tmp_path, 8)
    attempt(run, range(6, 13), from_step=5, perf=50.0)
    drain(run, uri)
    stored = Stored(database, run)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 13)]
    assert [step for step, _ in stored.points("train/nan")] == list(range(1, 13))
    assert [speed for _, speed in stored.points("perf/speed")] == [100.0] * 10 + [50.0] * 2
    assert len(stored.run_ids) == 1
    drain(run, uri, from_start=True)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 13)]


@pytest.mark.parametrize(("usual", "of_a_history"), [("5", "60"), ("90", "90")])
def test_a_long_history_is_given_more_time_than_a_point(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: str, of_a_history: str
) -> None:
    run, uri = delivered_and_cut(database, tmp_path, 8)
    seen = []

    def history(*_: object) -> list[object]:
        seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        return []

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", usual)
    monkeypatch.setattr(MlflowClient, "get_metric_history", history)
    attempt(run, range(6, 13), from_step=5, perf=50.0)
    drain(run, uri)
    assert set(seen) == {of_a_history}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == usual


def test_a_kill_while_a_cut_journal_is_opened_does_not_hide_the_cut(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, uri = delivered_and_cut(database, tmp_path, 8)
    child = os.fork()
    if not child:
        monkeypatch.setattr(journal, "_read", killed)
        attempt(run, range(6, 7), from_step=5, perf=50.0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    attempt(run, range(6, 13), from_step=5, perf=50.0)
    drain(run, uri)
    assert Stored(database, run).points("train/loss") == [(step, step) for step in range(1, 13)]


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_stands_where_lost_lines_stood_is_delivered(database: Path, tmp_path: Path) -> None:
    """The old note of progress points into the middle of new lines."""
    run, uri = delivered_and_cut(database, tmp_path, 3)
    attempt(run, range(3, 60), from_step=2, perf=100.0)
    drain(run, uri)
    assert Stored(database, run).points("train/loss") == [(step, step) for step in range(1, 60)]
    assert not (run / "tracking" / "dead_letter.jsonl").exists()


def test_who_delivered_before_the_cut_learns_of_what_came_after_it(database: Path, tmp_path: Path) -> None:
    """A watcher keeps what it knows of a run for as long as it goes round."""
    run, watcher = tmp_path / "run", Drainer(tmp_path / "run", f"sqlite:///{database}")
    attempt(run, range(1, 11), from_step=0, perf=100.0, status=None)
    assert deliver(watcher, lambda: True, PATIENCE)
    cut(run, 8)
    attempt(run, range(6, 12), from_step=5, perf=50.0, status=None)
    attempt(run, range(9, 13), from_step=8, perf=50.0)
    assert deliver(watcher, lambda: True, PATIENCE)
    stored = Stored(database, run)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 13)]
    assert [speed for _, speed in stored.points("perf/speed")] == [100.0] * 10 + [50.0] * 2


def test_a_journal_brought_back_with_the_checkpoints_goes_on_in_the_same_run(
    server: Server, tmp_path: Path
) -> None:
    """Through a server, from another machine whose clock is behind, with another last digit at every third step."""
    server.start()
    run = tmp_path / "run"
    attempt(run, range(1, 7), from_step=0, perf=100.0, status=None)
    shutil.copy(journal_path(run), tmp_path / "copy")
    attempt(run, range(7, 11), from_step=6, perf=90.0, status=None)
    drain(run, server.uri)
    uid = (run / "tracking" / "run_uid").read_text()
    shutil.rmtree(run)
    run.mkdir()
    shutil.copy(tmp_path / "copy", restored_path(run))
    with restored_path(run).open("ab") as file:
        file.write(b'{"op":"metrics","att')  # it was growing when it was copied
    attempt(
        run, range(6, 13), lambda step: step + (step % 3 == 0) / 1000, from_step=5, perf=50.0, clock=1e9,
    )  # fmt: skip
    assert not restored_path(run).exists()
    drain(run, server.uri)
    (run / "tracking" / "run_uid").write_text(uid)  # for the eyes of this test
    stored = Stored(server.database, run)
    assert len(stored.run_ids) == 1
    points = stored.points("train/loss")
    assert len(points) == 12 + 2  # both values of steps 6 and 9
    assert dict(points) == {step: step + (step % 3 == 0) / 1000 * (step > 5) for step in range(1, 13)}
    assert [step for step, _ in stored.points("perf/speed")] == list(range(1, 13))
    assert stored.status == "FINISHED"
    with sqlite3.connect(server.database) as connection:
        query = "SELECT value FROM latest_metrics WHERE run_uuid = ? AND key = 'train/loss'"
        assert connection.execute(query, (stored.run_id,)).fetchall() == [(12.001,)]


def test_a_journal_that_is_there_is_not_replaced_by_a_copy(tmp_path: Path) -> None:
    attempt(tmp_path, range(1, 4), from_step=0, perf=1.0)
    restored_path(tmp_path).write_text("{}\n")
    attempt(tmp_path, range(4, 6), from_step=3, perf=1.0)
    assert [record["step"] for record in records.read_ops(journal_path(tmp_path), "metrics")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert not list(records.read_ops(journal_path(tmp_path), "gap"))
    assert not restored_path(tmp_path).exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"no journal\n"])
def test_a_copy_that_holds_no_run_is_the_beginning_of_one(tmp_path: Path, content: bytes) -> None:
    restored_path(tmp_path).write_bytes(content)
    attempt(tmp_path, range(1, 4), from_step=0, perf=1.0)
    assert [record["attempt"] for record in records.read_ops(journal_path(tmp_path), "attempt")] == [1]
    assert len(list(records.read_ops(journal_path(tmp_path), "run"))) == 1
    assert progress.count_unsent(tmp_path) == 6 + (content == b"no journal\n")


def test_a_run_that_is_gone_from_mlflow_is_delivered_anew_also_where_only_its_end_was_left_to_say(
    database: Path, tmp_path: Path
) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{database}"
    attempt(run, range(1, 4), from_step=0, perf=1.0, status=None)
    drainer = Drainer(run, uri)
    with drainer.turn():
        while drainer.advance():
            pass
    with sqlite3.connect(database) as connection:
        for table in ("metrics", "latest_metrics", "tags", "params", "runs"):
            connection.execute(f"DELETE FROM {table}")
    assert deliver(drainer, lambda: True, PATIENCE)
    stored = Stored(database, run)
    assert [step for step, _ in stored.points("train/loss")] == [1, 2, 3]
    assert stored.status == "KILLED"
