"""A real server that is not there yet, dies, hangs or comes back, and a trainer that dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow_server import Server, Stored
from patience import PATIENCE, wait_until
from ports import free_port

from pretrain.config import RunConfig, TrackingConfig
from pretrain.errors import ConfigError
from pretrain.tracking import Tracker, progress
from pretrain.tracking.tracker import SERVER_GRACE_SECONDS, WAIT_SECONDS

SOON = 60
"""Seconds, also on a busy machine, and fewer than whoever waits for a server that does not answer: a request takes up to
120 s by itself, and is sent again."""


def start(run_dir: Path, uri: str, **options) -> Tracker:
    config = RunConfig(dir=str(run_dir))
    return Tracker.start(run_dir, TrackingConfig(uri=uri), config, params={"lr": 0.1}, tags={}, **options)


def log_steps(tracker: Tracker, steps: range) -> None:
    """Not one call waits for a server."""
    for step in steps:
        began = time.monotonic()
        tracker.metrics(step, {"train/loss": 1 / step, "train/lr": 0.1})
        assert time.monotonic() - began < SOON


def has_trouble(run_dir: Path) -> bool:
    note = progress.read(run_dir)
    return note is not None and note.error is not None


def whole(first: int, last: int) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in range(first, last + 1)]


def test_a_server_that_comes_late_dies_in_the_middle_and_returns_has_every_point_once(
    server: Server, tmp_path, patient
):
    server.kill()
    run_dir = tmp_path / "run"
    tracker = start(run_dir, server.uri)
    log_steps(tracker, range(1, 401))
    wait_until(lambda: has_trouble(run_dir))
    server.start()
    stored = Stored(server.database, run_dir)
    wait_until(lambda: stored.run_ids and stored.points("train/loss"))

    # killed while the drainer is delivering
    log_steps(tracker, range(401, 3001))
    wait_until(lambda: len(stored.points("train/loss")) > 400)
    server.kill()
    log_steps(tracker, range(3001, 5001))
    wait_until(lambda: has_trouble(run_dir))
    server.start()
    wait_until(lambda: len(stored.points("train/loss")) == 5000)
    tracker.finish("FINISHED")

    assert stored.points("train/loss") == whole(1, 5000)
    assert stored.points("train/lr") == [(step, 0.1) for step in range(1, 5001)]
    assert stored.status == "FINISHED"
    assert progress.count_unsent(run_dir) == 0


def run_attempt(run_dir: Path, uri: str, *arguments: object) -> "subprocess.Popen[str]":
    script = Path(__file__).with_name("attempt.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(run_dir), uri, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    return process


def test_a_killed_trainer_that_resumes_from_an_earlier_step_is_one_run_with_the_newest_values(
    server: Server, tmp_path
):
    server.start()
    run_dir = tmp_path / "run"
    first = run_attempt(run_dir, server.uri, 0, 170, 1)
    stored = Stored(server.database, run_dir)
    wait_until(lambda: stored.run_ids and len(stored.points("train/loss")) == 170)
    first.kill()
    first.wait()
    wait_until(lambda: stored.status == "KILLED")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"op":"metrics","attempt":1,"step":171,"val')

    second = run_attempt(run_dir, server.uri, 140, 200, 1)  # bit for bit the same
    second.communicate("")
    assert second.returncode == 0
    assert stored.points("train/loss") == [(step, float(step)) for step in range(1, 201)]
    assert [step for step, _ in stored.points("perf/images_per_second")] == list(range(1, 201))
    assert stored.points("resume/diverged") == []

    third = run_attempt(run_dir, server.uri, 190, 210, -1)  # every other value differs
    third.communicate("")
    points = stored.points("train/loss")
    assert dict(points) == {step: -step if step > 190 and step % 2 == 0 else step for step in range(1, 211)}
    assert len(points) == 210 + 5  # 192 to 200: the old value, then the new one
    assert stored.points("resume/diverged") == [(step, 1.0) for step in range(192, 201, 2)]
    assert len(stored.run_ids) == 1
    assert stored.tags()["attempt"] == "3"
    assert stored.status == "FINISHED"


def test_the_drainer_outlives_a_ctrl_c_of_the_trainer_but_not_the_trainer_for_long(server: Server, tmp_path):
    server.start()
    run_dir = tmp_path / "run"
    trainer = run_attempt(run_dir, server.uri, 0, 10, 1)
    (drainer,) = psutil.Process(trainer.pid).children()
    stored = Stored(server.database, run_dir)
    wait_until(lambda: stored.run_ids and len(stored.points("train/loss")) == 10)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(drainer.pid, number)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: stored.status == "KILLED")
    drainer.wait(PATIENCE)


def test_a_dead_server_holds_the_end_up_for_seconds_only_and_nothing_is_lost(
    server: Server, tmp_path, caplog, monkeypatch
):
    assert SERVER_GRACE_SECONDS < WAIT_SECONDS < 30  # when launchers kill
    monkeypatch.setattr("pretrain.tracking.tracker.SERVER_GRACE_SECONDS", 2.0)
    run_dir = tmp_path / "run"
    tracker = start(run_dir, f"http://127.0.0.1:{free_port()}")
    log_steps(tracker, range(1, 101))
    wait_until(lambda: has_trouble(run_dir))
    began = time.monotonic()
    with caplog.at_level("WARNING", "pretrain"):
        tracker.sync()
        tracker.finish("FINISHED")
    assert time.monotonic() - began < SOON
    assert "they are kept and delivered later" in caplog.text
    assert f"pretrain track sync {run_dir}" in caplog.text
    assert progress.count_unsent(run_dir) == 105

    server.start()
    command = [sys.executable, "-m", "pretrain", "track", "sync", str(run_dir), "--uri", server.uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    stored = Stored(server.database, run_dir)
    assert stored.points("train/loss") == whole(1, 100)
    assert stored.status == "FINISHED"


def test_a_server_that_accepts_and_never_answers_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.tracking.tracker.SERVER_GRACE_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run_dir = tmp_path / "run"
        tracker = start(run_dir, f"http://127.0.0.1:{silent.getsockname()[1]}")
        log_steps(tracker, range(1, 101))
        silent.settimeout(PATIENCE)
        asked, _ = silent.accept()
        with asked:  # a request is waiting for its answer
            began = time.monotonic()
            tracker.finish("KILLED")
            assert time.monotonic() - began < SOON
    assert progress.count_unsent(run_dir) == 105


def test_credentials_in_the_uri_end_the_start_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        start(tmp_path / "run", "http://user:hunter2@127.0.0.1:5000")
    assert not (tmp_path / "run").exists()
