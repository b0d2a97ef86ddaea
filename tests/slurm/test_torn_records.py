"""What the launch side reads was written by processes that were killed, or by nobody of ours: it is passed over or named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakes import fake
from patience import PATIENCE
from test_batch import REQUEUE, Stage
from test_submit import Desk

from launch import attempt, snapshot, sweep
from launch.best import SweepError
from launch.best import best as best_command
from launch.render import CODE
from launch.slurm import slurm
from pretrain.errors import RunDirError

NO_OBJECT: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "objects within objects": b'{"a":' * 100_000,
    "no text": b'\xff\xfe\x00{"status": "finished"}',
    "half of it": b'{"status": "finis',
    "nothing": b"",
    "a list": b'["finished"]',
    "a word": b'"finished"',
    "no number": b"NaN",
    "digits": b"9" * 10_000,
    "a huge line": b'{"status": "finished", "x": "' + b"x" * 2**21 + b'"}',
}


@pytest.mark.parametrize("case", NO_OBJECT)
def test_what_is_no_record_counts_as_none(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = NO_OBJECT[case]
    (tmp_path / "logs").mkdir()
    for name in ("status.json", "attempt.json", "logs/rank_0.failure", "job.json", "sweep.json", "best.json"):
        (tmp_path / name).write_bytes(content)
    assert attempt._status(tmp_path) is None
    assert attempt._failures(tmp_path) == ()
    assert attempt._began(tmp_path / "attempt.json", None)["from_step"] == 0
    with pytest.raises(RunDirError, match="cannot be read"):
        snapshot.read(tmp_path)
    with pytest.raises(RunDirError, match="is not the directory of a sweep"):
        sweep.read(tmp_path)
    assert sweep.read_best(tmp_path) is None


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    os.mkfifo(tmp_path / "attempts.jsonl")
    assert attempt._status(tmp_path) is None
    assert attempt._attempts(tmp_path / "attempts.jsonl") == []


LINE: dict[str, Any] = {
    "job": "7", "ended": 1.0, "from_step": 0, "to_step": 0, "status": "failed", "exit_code": 1, "action": "requeue",
    "failures": [{"rank": 0, "node": "n", "words": "w", "retry": True, "exit_code": 1}],
}  # fmt: skip
WRONG: dict[str, Any] = {
    "ended": [float("nan"), float("inf"), "1", None, True, 10**400],
    "from_step": ["0", None, [], 1.5],
    "to_step": ["0", None, {}],
    "status": [1, [], {}],
    "exit_code": ["x", None],
    "failures": [None, {}, 1, [1], [[]], [{}], [LINE["failures"][0] | {"words": 1}], [LINE["failures"][0] | {"retry": 1}]],
}  # fmt: skip


def test_of_a_record_of_attempts_the_whole_lines_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path = tmp_path / "attempts.jsonl"
    whole = json.dumps(LINE).encode()
    wrong = [json.dumps(LINE | {key: value}).encode() for key, values in WRONG.items() for value in values]
    missing = [json.dumps({k: v for k, v in LINE.items() if k != key}).encode() for key in WRONG]
    path.write_bytes(b"\n".join([whole, *wrong, *missing, *NO_OBJECT.values(), whole, whole[:40]]))
    assert len(attempt._attempts(path)) == 2
    path.write_bytes(b"\n".join([whole, *wrong, *missing, whole, whole[:40]]))
    assert len(attempt._attempts(path)) == 2
    attempt._append(path, LINE)
    assert len(attempt._attempts(path)) == 3, "a torn line took the next one with it"
    attempt._append(path, LINE)
    assert path.read_bytes().count(b"\n\n") == 0


def test_attempts_of_which_thousands_of_ranks_failed_all_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job whose every node is broken would go on for ever."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "logs").mkdir()
    words = "node sees no device: " + "\N{SNOWMAN}" * 4000
    for rank in range(4096):
        facts = {
            "rank": rank,
            "node": f"n{rank}",
            "words": words,
            "retry": rank != 3000,
            "exit_code": 1,
            "job": "7",
        }
        (tmp_path / "logs" / f"rank_{rank}.failure").write_text(json.dumps(facts))
    failures = attempt._failures(tmp_path)
    assert [failure.rank for failure in failures] == [
        *range(15),
        3000,
    ]  # what no other try can help is among them
    path = tmp_path / "attempts.jsonl"
    for _ in range(200):
        attempt._append(path, LINE | {"failures": [vars(failure) for failure in failures]})
    assert len(attempt._attempts(path)) == 200


@pytest.mark.parametrize("code", [0, 256, "x"])
def test_no_word_of_a_rank_makes_a_failed_job_end_with_0(tmp_path: Path, code: object) -> None:
    stage = Stage(tmp_path, [])
    kept = tmp_path / "failure"
    words = "bad \x1b[2J shard"
    facts = {"rank": 0, "node": "n", "words": words, "retry": False, "exit_code": code, "job": "4711"}
    kept.write_text(json.dumps(facts))
    fake(stage.programs, "srun", f"cp {kept} {stage.run}/logs/rank_0.failure", "exit 3")
    assert stage.starts() in (1, 3)
    assert b"Traceback" not in stage.said.stderr
    assert b"\x1b" not in stage.said.stderr


@pytest.mark.parametrize("case", ["nested"])
def test_an_attempt_whose_records_are_torn_is_tried_again_and_counted(tmp_path: Path, case: str) -> None:
    content = tmp_path / "content"
    content.write_bytes(NO_OBJECT[case])
    stage = Stage(tmp_path, [])
    (stage.run / "slurm" / "train" / "attempts.jsonl").write_bytes(NO_OBJECT[case])
    torn = ("status.json", "logs/rank_0.failure", "slurm/train/attempt.json")
    fake(stage.programs, "srun", *(f"cp {content} {stage.run}/{name}" for name in torn), "exit 77")
    assert [stage.starts(restart) for restart in range(4)] == [85, 85, 85, 77]
    assert stage.asked_of_slurm().count(REQUEUE) == 3
    assert b"cannot be read" in stage.said.stderr
    assert b"Traceback" not in stage.said.stderr


def test_the_judge_needs_nothing_but_python(tmp_path: Path) -> None:
    """It runs on the host, where the packages that train may not be."""
    code = f"import sys; sys.path.insert(0, {str(CODE)!r}); import launch.attempt"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path)
    monkeypatch.setenv("PATH", f"{desk.bin}:/usr/bin:/bin")
    monkeypatch.setenv("COLUMNS", "200")
    return desk


def asked(desk: Desk, command: str) -> Result:
    """`python -m launch.slurm COMMAND runs/first`, in this process."""
    return CliRunner().invoke(slurm, [command, str(desk.folder / "runs/first")])


STATUSES = [
    b"[" * 100_000,
    b"\xff\xfe",
    b'{"status": "running"',
    b"[]",
    b'{"status": "[/red]", "step": 1}',
    b'{"status": "running", "step": NaN}',
    b'{"status": "running", "step": "9"}',
    b'{"status": "running", "step": 1e999}',
]
OTHERS = [
    b'{"total_steps": Infinity, "time": NaN}',
    b'{"total_steps": [], "time": {}}',
    b"[" * 100_000,
    b"[1]",
]


def test_the_status_of_a_run_with_damaged_files_says_so(desk: Desk) -> None:
    desk.call("submit", desk.first)
    run = desk.folder / "runs/first"
    values = {"train/loss": "x", "perf/step_seconds": 1e308, "perf/images_per_second": None}
    line = {"op": "metrics", "attempt": 1, "time": 1, "step": 10**30, "values": values}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"op": "metr')
    for number, content in enumerate(STATUSES):
        (run / "status.json").write_bytes(content)
        for name in ("plan.json", "heartbeat.json"):
            (run / name).write_bytes(OTHERS[number % len(OTHERS)])
        assert "unreadable" in asked(desk, "status").output
    (run / "status.json").write_text('{"status": "running", "step": 0}')
    (run / "plan.json").write_text('{"total_steps": 9007199254740000}')
    assert "running" in asked(desk, "status").output


JOBS: list[Callable[[dict[str, Any]], Any]] = [
    lambda facts: facts | {"job_id": "1; scancel"},
    lambda facts: facts | {"job_id": float("inf")},
    lambda facts: facts | {"job_id": -1},
    lambda facts: facts | {"chain": ["x"]},
    lambda facts: facts | {"chain": [1]},
    lambda facts: facts | {"chain": [*facts["chain"], "/a/slurm/[/red]"]},
    lambda facts: facts | {"chain": "/a/slurm/train"},
    lambda facts: facts | {"task": "0"},
    lambda facts: [facts],
]


def test_a_record_of_a_job_that_is_none_is_named_and_cancels_nothing(desk: Desk) -> None:
    desk.call("submit", desk.first)
    path = desk.folder / "runs/first/slurm/train/job.json"
    facts = json.loads(path.read_text())
    for damage in JOBS:
        path.write_text(json.dumps(damage(facts)))
        for command in ("status", "cancel"):
            said = asked(desk, command).exception
            assert isinstance(said, RunDirError), said
            assert f"{path} cannot be read" in str(said)
    assert desk.asked("scancel") == []
    path.write_text(json.dumps(facts))
    asked(desk, "cancel")
    assert desk.asked("scancel") == [["--", "101"]]


def test_a_run_that_was_copied_or_moved_has_no_job_of_its_own(desk: Desk) -> None:
    desk.call("submit", desk.first)
    desk.states("RUNNING")
    runs = desk.folder / "runs"
    shutil.copytree(runs / "first", runs / "second")
    (desk.folder / "link").symlink_to(runs)
    for run, known in (
        (runs / "first", True),
        (desk.folder / "link" / "first", True),
        (runs / "second", False),
    ):
        found = snapshot.read(run / "slurm" / "train")
        assert (found is not None and found.job_id == 101) == known
        said = CliRunner().invoke(slurm, ["cancel", str(run)])
        assert (said.exit_code == 0) == known
    assert len(desk.asked("scancel")) == 2
    assert "job 102" in desk.call("submit", desk.config("second"))


MEMBERS: list[Any] = [
    [],
    "lr-1",
    [{"run": "../other", "values": {}}],
    [{"run": "/etc", "values": {}}],
    [{"run": "..", "values": {}}],
    [{"run": "lr-1/../../x", "values": {}}],
    [{"run": "lr-1", "values": []}],
    [{"values": {}}],
    [1],
]


@pytest.mark.parametrize("members", MEMBERS, ids=str)
def test_the_members_of_a_sweep_are_folders_in_it(members: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members}))
    with pytest.raises(RunDirError, match="is not the directory of a sweep"):
        sweep.read(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        {"run": "../other", "top1": 0.5, "step": 1},
        {"run": "lr-1", "top1": "0.5", "step": 1},
        {"run": "lr-1", "top1": float("nan"), "step": 1},
        {"run": "lr-1", "top1": 0.5, "step": None},
        {"top1": 0.5},
    ],
    ids=str,
)
def test_what_is_no_best_member_is_none(facts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(json.dumps(facts))
    assert sweep.read_best(tmp_path) is None


def test_members_whose_status_is_damaged_are_not_the_best(tmp_path: Path) -> None:
    members = [
        {"run": f"lr-{number}", "values": {"optim.lr": str(number)}} for number in range(len(STATUSES))
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members}))
    for member, content in zip(members, STATUSES, strict=True):
        (tmp_path / str(member["run"])).mkdir()
        (tmp_path / str(member["run"]) / "status.json").write_bytes(content)
    result = CliRunner().invoke(best_command, [str(tmp_path)])
    assert isinstance(result.exception, SweepError), result.exception
    assert "lr-0: unreadable" in str(result.exception)
