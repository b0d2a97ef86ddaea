"""Journal to MLflow, into a real embedded store."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import Stored
from patience import PATIENCE, wait_until

from pretrain.config import RunConfig, TrackingConfig
from pretrain.tracking import Journal, Tracker, progress
from pretrain.tracking.deliver import Drainer, deliver
from pretrain.tracking.journal import MAX_ARTIFACT_BYTES


def drain(run_dir: Path, database: Path, **options) -> Stored:
    assert deliver(Drainer(run_dir, f"sqlite:///{database}", **options), lambda: True, PATIENCE)
    return Stored(database, run_dir)


def sync(run_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain", "track", "sync", str(run_dir), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_every_point_arrives_once_and_again_changes_nothing(write, database):
    run_dir = write(range(1, 2501), lambda step: 1 / step)
    stored = drain(run_dir, database)
    expected = [(step, 1 / step) for step in range(1, 2501)]
    assert stored.points("train/loss") == expected
    assert stored.status == "FINISHED"
    assert progress.count_unsent(run_dir) == 0
    assert drain(run_dir, database, from_start=True).points("train/loss") == expected
    assert len(stored.run_ids) == 1
    assert (progress.read_page(run_dir) or "").endswith(f"/runs/{stored.run_ids[0]}")


def test_a_lost_note_of_progress_doubles_nothing(write, database):
    run_dir = write(range(1, 50), lambda step: float("nan") if step % 2 else step)
    before = drain(run_dir, database).points("train/loss")
    (run_dir / "tracking" / "delivered.json").write_text("{")
    assert drain(run_dir, database).points("train/loss") == before
    assert len(before) == 49


def test_steps_executed_again_with_equal_values_are_one_point_each(write, database):
    write(range(1, 11), status=None, perf=100.0)
    drain(
        write(range(6, 8), from_step=5, status=None, perf=50.0), database
    )  # delivered in between, and killed again
    stored = drain(write(range(6, 16), from_step=5, perf=70.0), database)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 16)]
    speed = stored.points("perf/images_per_second")
    assert [step for step, _ in speed] == list(range(1, 16))
    assert dict(speed)[6] == 100.0
    assert dict(speed)[15] == 70.0
    assert stored.points("resume/diverged") == []


def test_values_of_a_later_attempt_replace_those_not_delivered_yet(write, database):
    write(range(1, 11), status=None)
    run_dir = write(range(6, 9), lambda step: -step, from_step=5)
    stored = drain(run_dir, database)
    assert stored.points("train/loss") == [(step, step if step < 6 else -step) for step in range(1, 9)]
    assert [step for step, _ in stored.points("resume/diverged")] == [6, 7, 8]


def test_an_attempt_that_begins_during_an_outage_is_known_before_what_it_replaces_is_delivered(
    write, database
):
    run_dir = write(range(1, 6), status=None)
    drainer = Drainer(run_dir, f"sqlite:///{database}")
    assert deliver(drainer, lambda: True, PATIENCE)
    write(range(6, 11), from_step=5, status=None)  # none of it arrives before the next attempt begins
    write(range(8, 12), lambda step: -step, from_step=7)
    assert deliver(drainer, lambda: True, PATIENCE)
    points = Stored(database, run_dir).points("train/loss")
    assert points == [(step, step if step < 8 else -step) for step in range(1, 12)]


def test_values_of_a_later_attempt_are_the_newest_where_others_were_delivered(write, database):
    run_dir = write(range(1, 11), status=None)
    drain(run_dir, database)
    stored = drain(write(range(6, 11), lambda step: -step, from_step=5), database)
    newest = dict(stored.points("train/loss"))  # by time within a step: the last one stands
    assert newest == {step: step if step < 6 else -step for step in range(1, 11)}
    client = MlflowClient(f"sqlite:///{database}")
    assert client.get_run(stored.run_id).data.metrics["train/loss"] == -10.0


def test_a_run_that_ended_without_a_word_is_killed_and_running_again_when_it_goes_on(write, database):
    stored = drain(write(range(3), status=None), database)
    assert stored.status == "KILLED"
    run_dir = write(range(3, 5), from_step=3, status=None)
    living = Journal.open(run_dir, experiment="pretrain", name="run", from_step=5)
    assert drain(run_dir, database).status == "RUNNING"
    living.close("FAILED")
    assert drain(run_dir, database).status == "FAILED"


@pytest.mark.parametrize(
    ("said", "deserved"), [("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
)
def test_a_kill_after_the_run_had_said_how_it_ended_does_not_change_that(write, database, said, deserved):
    run_dir = write(range(3), status=None)
    (run_dir / "status.json").write_text(json.dumps({"status": said, "step": 2, "attempt": 1}))
    assert drain(run_dir, database).status == deserved
    write(range(3, 5), from_step=2, status=None)  # another attempt, of which nothing is said
    assert drain(run_dir, database).status == "KILLED"


def test_a_report_that_is_too_large_stays_where_it_is_and_the_run_goes_on(tmp_path, caplog):
    tracker = Tracker.start(tmp_path, TrackingConfig(uri=None), RunConfig(dir="x"), params={}, tags={})
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(MAX_ARTIFACT_BYTES + 1)
    with caplog.at_level("WARNING", "pretrain"):
        tracker.artifact(Path("large.jsonl"))
        tracker.artifact(Path("missing.json"))
    tracker.finish("FINISHED")
    assert "large.jsonl has more than" in caplog.text
    assert "missing.json is not a file" in caplog.text
    assert '"op":"artifact"' not in (tmp_path / "metrics.jsonl").read_text()


def test_a_poisoned_line_is_set_aside_alone(write, database):
    run_dir = write(range(1, 100), status=None)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"op":"metrics","attempt":1,"time":1,"step":100,"values":{"good":1.0,"bad$name":1.0}}\n')
        file.write('{"op":"params","attempt":1,"time":1,"values":{"lr":"0.1","bad\\nname":"x"}}\n')
        file.write("\x00 damaged by a disk\n")
        file.write('{"op":"artifact","attempt":1,"time":1,"path":"../../etc/passwd"}\n')
    stored = drain(write(range(101, 200), from_step=100), database)
    assert [step for step, _ in stored.points("train/loss")] == [*range(1, 100), *range(101, 200)]
    assert stored.points("good") == [(100, 1.0)]
    assert stored.params() == {"lr": "0.1"}
    letters = [
        json.loads(line) for line in (run_dir / "tracking" / "dead_letter.jsonl").read_text().splitlines()
    ]
    culprits = [letter.get("key") or letter.get("path") or letter["line"] for letter in letters]
    assert sorted(culprits) == ["\x00 damaged by a disk\n", "../../etc/passwd", "bad\nname", "bad$name"]


def test_a_store_that_went_back_in_time_gets_everything_again(write, template, database):
    run_dir = write(range(1, 20), status=None)
    drainer = Drainer(run_dir, f"sqlite:///{database}")
    assert deliver(drainer, lambda: True, PATIENCE)
    with sqlite3.connect(database) as connection:
        for table in ("metrics", "latest_metrics", "tags", "params", "runs"):
            connection.execute(f"DELETE FROM {table}")
    write(range(20, 30), from_step=19)
    assert deliver(drainer, lambda: True, PATIENCE)
    assert Stored(database, run_dir).points("train/loss") == [(step, step) for step in range(1, 30)]


def test_a_run_deleted_in_mlflow_waits_until_it_is_restored(write, database):
    run_dir = write(range(1, 5), status=None)
    run_id = drain(run_dir, database).run_id
    client = MlflowClient(f"sqlite:///{database}")
    drainer = Drainer(run_dir, f"sqlite:///{database}")
    drainer._open()
    client.delete_run(run_id)
    write(range(5, 9), from_step=4)
    assert not deliver(drainer, lambda: True, 0.5)
    assert "restore it" in (progress.read(run_dir) or progress.Delivered("")).error
    client.restore_run(run_id)
    assert deliver(drainer, lambda: True, PATIENCE)
    assert [step for step, _ in Stored(database, run_dir).points("train/loss")] == list(range(1, 9))
    assert not (run_dir / "tracking" / "dead_letter.jsonl").exists()


def test_stages_of_a_campaign_lie_below_one_parent_whatever_its_name(tmp_path, database):
    parents = set()
    for name in ("pretrain", "finetune"):
        run_dir = tmp_path / name
        campaign = """it's "the" \\ `one`; DROP TABLE runs"""
        journal = Journal.open(run_dir, experiment="it's ours", name=name, campaign=campaign)
        journal.close("FINISHED")
        stored = drain(run_dir, database)
        parents.add(stored.tags()["mlflow.parentRunId"])
    (parent,) = parents
    run = MlflowClient(f"sqlite:///{database}").get_run(parent)
    assert run.info.run_name == campaign
    assert run.info.status == "FINISHED"


def test_a_new_embedded_store_lies_where_the_config_says_and_nowhere_else(tmp_path, monkeypatch, patient):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "vit" / "stage"
    config = RunConfig(dir="runs/vit/stage", campaign="vit")
    tracker = Tracker.start(
        run_dir, TrackingConfig(), config, params={"lr": 1e-3}, tags={"stage": "pretrain"}
    )
    (run_dir / "summary.json").write_text("{}")
    tracker.artifact(Path("summary.json"))
    tracker.dataset("train", "ab" * 32, "data/train", "training")
    for step in range(1, 11):
        tracker.metrics(step, {"train/loss": step})
    tracker.finish("FINISHED")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    expected = {"vit", "mlflow.db", "mlflow.db.lock", "mlartifacts"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == expected
    stored = Stored(tmp_path / "runs" / "mlflow.db", run_dir)
    assert stored.points("train/loss") == [(step, step) for step in range(1, 11)]
    assert stored.status == "FINISHED"
    assert stored.params() == {"lr": "0.001"}
    assert (
        stored.tags().items() >= {"stage": "pretrain", "attempt": "1", "mlflow.runName": "vit/stage"}.items()
    )
    assert stored.tags()["dataset_digest_training"] == "ab" * 32
    assert stored.datasets() == [("train", "ab" * 18)]
    assert [path.name for path in (tmp_path / "runs" / "mlartifacts").rglob("*.json")] == ["summary.json"]


def test_a_delivering_process_that_was_killed_is_started_again(tmp_path, database, patient, caplog):
    config = TrackingConfig(uri=f"sqlite:///{database}")
    tracker = Tracker.start(tmp_path / "run", config, RunConfig(dir="run"), params={"lr": 1.0}, tags={})
    with caplog.at_level("WARNING", "pretrain"):
        for step in (1, 2):
            assert tracker._drainer is not None
            tracker._drainer.kill()
            tracker._drainer.wait()
            tracker.metrics(step, {"train/loss": step})
            if step == 1:
                tracker.sync()  # at the next checkpoint
                wait_until(lambda: Stored(database, tmp_path / "run").run_ids)
        tracker.finish("FINISHED")  # and at the end
    stored = Stored(database, tmp_path / "run")
    assert stored.points("train/loss") == [(1, 1), (2, 2)]
    assert stored.status == "FINISHED"
    assert caplog.text.count("it is started again") == 2


def test_planted_secrets_are_nowhere(tmp_path, database):
    run_dir = tmp_path / "run"
    canary = "hunter2"
    tracker = Tracker.start(
        run_dir,
        TrackingConfig(uri=None, experiment=f"https://u:{canary}a@h", run_name=f"token={canary}b"),
        RunConfig(dir="run", campaign=f"password={canary}c"),
        params={
            "hf_token": f"{canary}d",
            "data.shards": f"https://u:{canary}e@host/x.tar",
            "f": f"AKIA{'HUNTER2' * 2}AA",
        },
        tags={
            "api_key": f"{canary}g",
            "init_from": f"s3://{canary}h@bucket/x?X-Amz-Signature=1&token={canary}i",
        },
    )
    tracker.dataset("train", "ab" * 32, f"https://user:{canary}j@host/train?sig={canary}k", "training")
    (run_dir / "config.yaml").write_text(f"shards: https://u:{canary}l@host/x.tar\nhf_token: {canary}m\n")
    tracker.artifact(Path("config.yaml"))
    tracker.finish("FINISHED")
    drain(run_dir, database)

    written = [run_dir / "metrics.jsonl", *(run_dir / "tracking").iterdir(), database]
    written += [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in written)
    for path in written:
        assert canary.encode() not in path.read_bytes().lower(), path


def test_sync_from_the_start_delivers_all_of_a_run_and_doubles_nothing(write, database):
    run_dir = write(range(1, 30), uri=f"sqlite:///{database}", status=None)
    drain(run_dir, database)
    write(range(30, 40), from_step=29, uri=f"sqlite:///{database}")
    done = sync(run_dir, "--from-start")
    assert done.returncode == 0, done.stderr
    assert "everything is in MLflow" in done.stdout
    assert [step for step, _ in Stored(database, run_dir).points("train/loss")] == list(range(1, 40))


def test_sync_says_what_is_wrong(write, tmp_path):
    run_dir = write(range(1, 5))
    for arguments, complaint in (
        ((tmp_path / "nowhere",), "is no run directory"),
        ((run_dir,), "without tracking.uri"),
        ((run_dir, "--uri", "http://user:hunter2@host"), "MLFLOW_TRACKING_USERNAME"),
        ((run_dir, "--uri", "http://127.0.0.1:9", "--timeout", "1"), "7 records of"),
    ):
        done = sync(*map(str, arguments))
        assert done.returncode not in (0, 1)
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr


def test_a_disk_that_is_full_for_a_while_holds_delivery_up_and_no_more(write, database, monkeypatch):
    run_dir = write(range(1, 30))
    save, refusals = progress.Delivered.save, [2]

    def refuse(note, folder):
        if refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        save(note, folder)

    monkeypatch.setattr(progress.Delivered, "save", refuse)
    assert drain(run_dir, database).points("train/loss") == [(step, step) for step in range(1, 30)]
    assert refusals == [0]


def test_one_run_has_one_drainer(write, database):
    run_dir = write(range(1, 5), uri=f"sqlite:///{database}")
    lock = progress.drain_lock(run_dir)
    assert lock.acquire()
    done = sync(run_dir, "--timeout", "0.5")
    lock.release()
    assert done.returncode == 7
    assert "another process is delivering" in done.stderr


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = "import sys, pretrain.track; sys.exit(any(name in sys.modules for name in ('mlflow', 'torch', 'tqdm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_drainer_may_be_killed_at_any_time(write, database):
    run_dir = write(range(1, 4001), lambda step: 1 / step, uri=f"sqlite:///{database}")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pretrain", "track", "sync", str(run_dir)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if progress.read(run_dir) is not None:  # the first request went through
            process.kill()
            process.wait()
    stored = drain(run_dir, database)
    assert stored.points("train/loss") == [(step, 1 / step) for step in range(1, 4001)]
