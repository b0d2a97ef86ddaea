"""`pretrain track sync --watch`: one process with a route to MLflow delivers for those without."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow_server import Stored
from patience import PATIENCE, wait_until

from pretrain.config import RunConfig, TrackingConfig
from pretrain.errors import UserError
from pretrain.tracking import Journal, Tracker, progress
from pretrain.tracking.watch import Watch, find_runs


def journal(run_dir: Path) -> Journal:
    return Journal.open(run_dir, experiment="pretrain", name=run_dir.name)


def kill(pen: Journal) -> None:
    """All that the kernel does for a killed process."""
    os.close(pen._descriptor)


def steps(stored: Stored) -> list[int]:
    return [step for step, _ in stored.points("train/loss")] if stored.run_ids else []


def test_runs_below_a_folder_are_found_and_what_lies_in_them_is_not_searched(tmp_path):
    for name in ("b/one", "a/two", "a/two/checkpoints/step_1", "c"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name in ("b/one", "a/two", "a/two/checkpoints/step_1"):
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a/two", "b/one"]
    assert list(find_runs(tmp_path / "b" / "one")) == [tmp_path / "b" / "one"]


def test_a_watcher_delivers_beside_a_run_whose_own_process_has_no_route(tmp_path, database, monkeypatch):
    """Both look at the same run directory: the run's own drainer fails, the watcher does not."""
    monkeypatch.setattr("pretrain.tracking.tracker.SERVER_GRACE_SECONDS", 1.0)  # it will have no success
    runs = tmp_path / "runs"
    config = TrackingConfig(uri="http://127.0.0.1:9")  # nobody listens there
    tracker = Tracker.start(runs / "living", config, RunConfig(dir="x"), params={"lr": 0.1}, tags={})
    tracker.metrics(1, {"train/loss": 1.0})
    wait_until(lambda: (note := progress.read(runs / "living")) is not None and note.error is not None)

    command = [sys.executable, "-m", "pretrain", "track", "sync", "--watch", str(runs), "--every", "0.2"]
    watcher = subprocess.Popen(
        [*command, "--uri", f"sqlite:///{database}"], stderr=subprocess.PIPE, text=True
    )
    with contextlib.closing(watcher.stderr):
        living = Stored(database, runs / "living")
        wait_until(lambda: steps(living) == [1])
        tracker.metrics(2, {"train/loss": 0.5})
        pen = journal(runs / "later")  # a run that begins while the watcher goes round
        pen.metrics(1, {"train/loss": 1.0})
        pen.close("FINISHED")
        later = Stored(database, runs / "later")
        wait_until(lambda: steps(living) == [1, 2] and steps(later) == [1] and later.status == "FINISHED")
        assert living.status == "RUNNING"
        tracker.finish("FINISHED")
        wait_until(lambda: living.status == "FINISHED")
        watcher.send_signal(signal.SIGTERM)
        words = watcher.stderr.read()
    assert watcher.wait(PATIENCE) == 0
    assert f"{runs / 'living'}: everything is in MLflow, and it has ended: FINISHED" in words
    assert "stopped" in words
    assert "Traceback" not in words
    assert len(living.run_ids) == len(later.run_ids) == 1


def test_a_run_that_is_silent_is_not_called_dead_before_its_time_and_may_come_back(tmp_path, database):
    pen = journal(tmp_path / "run")
    pen.metrics(1, {"train/loss": 1.0})
    kill(pen)  # or alive on another node, by a file system that does not show its locks
    watch = Watch([tmp_path / "run"], lambda run: f"sqlite:///{database}")
    assert watch.round() == 0
    stored = Stored(database, tmp_path / "run")
    assert stored.status == "RUNNING"
    past = time.time() - 3600
    os.utime(tmp_path / "run" / "metrics.jsonl", (past, past))
    watch.round()
    assert stored.status == "KILLED"
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # it was alive after all
        file.write('{"op":"metrics","attempt":1,"time":2,"step":2,"values":{"train/loss":0.5}}\n')
    watch.round()
    assert stored.status == "RUNNING"
    assert steps(stored) == [1, 2]


def test_a_run_that_cannot_be_delivered_does_not_hold_up_the_others(tmp_path, database, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("a", "b", "c", "d"):
        pen = journal(tmp_path / name)
        pen.metrics(1, {"train/loss": 1.0})
        pen.close("FINISHED")
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")  # no journal of ours
    dead = "http://127.0.0.1:9"
    (tmp_path / "d" / "tracking" / "run_uid").unlink()

    def uri_of(run: Path) -> str:
        if run.name == "d":
            raise UserError("run d was run without tracking.uri")
        return dead if run.name == "b" else f"sqlite:///{database}"

    with caplog.at_level("INFO", "pretrain"):
        assert Watch([tmp_path], uri_of).round() == 4  # those of b
    assert steps(Stored(database, tmp_path / "c")) == [1]
    assert "does not begin with the description of its run" in caplog.text
    assert f"waits for {dead}" in caplog.text
    assert "without tracking.uri" in caplog.text


def test_a_run_that_has_ended_is_looked_into_again_when_it_goes_on(tmp_path, database):
    asked = []

    def uri_of(run: Path) -> str:
        asked.append(run)
        return f"sqlite:///{database}"

    watch = Watch([tmp_path], uri_of)
    for step, looks in ((1, 1), (2, 2)):
        pen = journal(tmp_path / "run")
        pen.metrics(step, {"train/loss": 1.0})
        pen.close("FINISHED")
        assert [watch.round() for _ in range(3)] == [0, 0, 0]
        assert len(asked) == looks
    assert steps(Stored(database, tmp_path / "run")) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["nowhere", "--watch"], "is no folder"), ([".", "--watch", "--from-start"], "leave --watch away")],
)
def test_a_watch_that_cannot_be_kept_is_refused(tmp_path, arguments, complaint):
    command = [sys.executable, "-m", "pretrain", "track", "sync", *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 7
    assert complaint in done.stderr
