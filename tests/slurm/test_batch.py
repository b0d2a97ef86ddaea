"""What the batch script makes of how an attempt ended: the script and its judge as they are, Slurm's programs faked."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import calls, fake, run_script

from launch.job import Job
from launch.profile import Profile
from launch.render import render
from launch.verdict import DAY_SECONDS, ENDED_BY_SLURM, Attempt, Failure, Limits, bad_nodes, judge
from pretrain import run_dir
from pretrain.errors import CacheInUseError, ConfigError, DataError

LIMITS = Limits(without_progress=2, failures_per_day=4)
BUG = Failure(1, "node1", "ValueError: step 17 is odd, at 0x7f1c", retry=True, exit_code=1)


def attempt(
    start: int, end: int, status: str | None, code: int = 0, *failures: Failure, ended: float = 0
) -> Attempt:
    return Attempt(ended, start, end, status, code, failures)


def ruled(*attempts: Attempt, state: str = "RUNNING") -> tuple[str, int]:
    verdict = judge(attempts[-1], attempts[:-1], state, LIMITS)
    return verdict.action, verdict.exit_code


def test_finished_is_finished_whatever_else_happened() -> None:
    assert ruled(attempt(0, 9, "finished")) == ("finished", 0)
    assert ruled(attempt(0, 9, "finished", 137), state="CANCELLED") == ("finished", 0)


def test_interrupted_goes_on_as_often_as_it_likes_while_it_gets_somewhere() -> None:
    limits = [attempt(step, step + 1, "interrupted") for step in range(50)]
    assert ruled(*limits) == ("requeue", 0)


def test_slurm_s_own_decisions_stand() -> None:
    for state in ("CANCELLED", "COMPLETING", "REQUEUED", "PENDING", "UNKNOWN"):
        assert ruled(attempt(0, 4, "interrupted"), state=state) == ("stop", ENDED_BY_SLURM)


def test_what_a_user_has_to_mend_is_not_tried_again() -> None:
    missing = replace(BUG, words="no such shard", retry=False, exit_code=DataError.exit_code)
    assert ruled(attempt(0, 4, "failed", 143, missing)) == ("stop", DataError.exit_code)
    assert ruled(attempt(0, 0, None, 2)) == ("stop", 2)


def test_the_same_failure_at_the_same_step_is_a_bug_and_stops() -> None:
    first = attempt(0, 8, "failed", 143, BUG)
    again = replace(BUG, words="ValueError: step 18 is odd, at 0x7f33", rank=0)
    assert ruled(first) == ("requeue", 0)
    assert ruled(first, attempt(8, 8, "failed", 143, again)) == ("stop", 1)
    assert ruled(first, attempt(8, 9, "failed", 143, again)) == ("requeue", 0)  # it came further
    assert ruled(first, attempt(8, 8, "failed", 143, replace(BUG, words="OSError: ..."))) == ("requeue", 0)


def test_a_death_without_words_is_tried_again_a_few_times() -> None:
    deaths = [attempt(8, 8, "running", 137)] * 4
    assert ruled(*deaths[:2]) == ("requeue", 0)
    assert ruled(*deaths[:3]) == ("stop", 137)
    assert ruled(*deaths[:2], attempt(8, 9, "running", 137)) == ("requeue", 0)


def test_a_crash_loop_ends_although_each_turn_makes_progress() -> None:
    turns = [attempt(step, step + 1, "failed", 1, ended=step * 60.0) for step in range(6)]
    assert ruled(*turns[:4]) == ("requeue", 0)
    assert ruled(*turns[:5]) == ("stop", 1)
    later = replace(turns[5], ended=turns[5].ended + DAY_SECONDS)
    assert ruled(*turns[:5], later) == ("requeue", 0)


def test_nodes_are_bad_by_their_own_words_only() -> None:
    broken = replace(BUG, node="node7", words="RuntimeError: CUDA error: uncorrectable ECC error encountered")
    assert bad_nodes([attempt(0, 1, "failed", 1, BUG), attempt(1, 1, "failed", 1, broken)]) == ["node7"]


@pytest.fixture(autouse=True)
def in_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has a rank say is said by a rank of the job that `run_script` runs."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")


class Stage:
    """A rendered training job in a folder, with `srun` doing what a test says."""

    def __init__(self, folder: Path, srun: Sequence[str], **values: Any) -> None:
        self.run, self.programs = folder / "run", folder / "bin"
        for made in (self.programs, self.run / "logs", self.run / "slurm" / "train"):
            made.mkdir(parents=True)
        facts: dict[str, Any] = {
            "name": "a", "kind": "train", "run_dir": self.run, "cwd": folder, "commands": (("train",),)
        }  # fmt: skip
        site = Profile.model_validate(
            {
                "time": 10,
                "preflight_minutes": 0,
                "python": sys.executable,
                "ranks_per_node": 2,
                "exclude": ("node9",),
            }
        )
        self.script = folder / "stage.sbatch"
        self.script.write_text(render(Job(**(facts | values)), site))
        fake(self.programs, "srun", *srun)
        self.slurm()

    def slurm(self, state: str = "RUNNING", present: Sequence[str] = ("node0", "node1", "node2")) -> None:
        fake(
            self.programs,
            "scontrol",
            f"case $* in *'show job'*) echo 'JobId=4711 JobState={state}' ;; *hostnames?node9) echo node9 ;; *hostnames*) echo node0 ;; esac",
        )
        fake(self.programs, "sinfo", f"printf '%s\\n' {' '.join(present)}")

    def starts(self, restart: int = 0) -> int:
        self.said = run_script(self.script, self.programs, SLURM_RESTART_COUNT=str(restart))
        return self.said.returncode

    def checkpoint(self, step: int) -> str:
        """A line of bash that commits a checkpoint."""
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        return f"mkdir -p {folder} && touch {folder}/manifest.json"

    def says(self, status: str, step: int = 0) -> str:
        return f"echo '{json.dumps({'status': status, 'step': step})}' > {self.run}/status.json"

    def asked_of_slurm(self) -> list[str]:
        return [" ".join(call) for call in calls(self.programs) if call[:2] != ["scontrol", "-o"]]


REQUEUE = "scontrol requeue 4711"


def test_job_exit_0_means_finished(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    fake(stage.programs, "srun", stage.says("finished", 9))
    assert stage.starts() == 0, stage.said.stderr
    assert REQUEUE not in stage.asked_of_slurm()
    for trained, asked, sruns in (
        ("9 steps", "9 steps", 1),
        ("9 steps", "10 steps", 2),
        ("10 steps", "10 steps", 2),
    ):
        (stage.run / "config.yaml").write_text(trained)
        (stage.run / "slurm" / "train" / "config.yaml").write_text(asked)
        assert stage.starts() == 0  # and again: there is nothing left to do, unless more is asked for
        assert sum(call.startswith("srun") for call in stage.asked_of_slurm()) == sruns


def test_a_longer_training_that_fails_is_not_finished_because_the_shorter_one_was(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["exit 4"])
    said = {"status": "finished", "step": 9, "attempt": 2}
    (stage.run / "status.json").write_text(json.dumps(said))
    (stage.run / "config.yaml").write_text("total_steps: 9")
    assert stage.starts() == 4
    fake(
        stage.programs,
        "srun",
        f"echo '{json.dumps(said | {'step': 10, 'attempt': 3})}' > {stage.run}/status.json",
    )
    assert stage.starts() == 0


def test_ranks_come_from_the_allocation(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["env > $PWD/env"])
    stage.starts()
    (srun,) = [call for call in stage.asked_of_slurm() if call.startswith("srun")]
    assert "--nodes=2 --ntasks=4 --ntasks-per-node=2" in srun
    seen = dict(line.partition("=")[::2] for line in (stage.programs / "env").read_text().splitlines())
    assert seen["MASTER_ADDR"] == "node0"
    assert seen["MASTER_PORT"] == str(10000 + 4711)
    assert "SRUN_CPUS_PER_TASK" not in seen
    stage.starts(restart=1)  # somebody may have the first one's port
    assert f"MASTER_PORT={10000 + 4711 + 1009}\n" in (stage.programs / "env").read_text()
    run_script(stage.script, stage.programs, SLURM_CPUS_PER_TASK="7")
    assert "SRUN_CPUS_PER_TASK=7" in (stage.programs / "env").read_text()


def test_interrupted_is_requeued(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    fake(stage.programs, "srun", stage.checkpoint(4), stage.says("interrupted", 4))
    assert stage.starts() == 85  # for a job that Slurm has put back already this means nothing
    assert REQUEUE in stage.asked_of_slurm()


def test_a_controller_that_answers_late_is_asked_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    fake(stage.programs, "srun", stage.checkpoint(4), stage.says("interrupted", 4))
    fake(stage.programs, "sleep")
    late = f"[ $(wc -l < {stage.programs}/asked) -gt 2 ]"
    note = f"echo >> {stage.programs}/asked"
    answer = (
        f"case $* in *hostnames*) echo node0 ;; *requeue*) {note}; {late} ;; *) echo JobState=RUNNING ;; esac"
    )
    fake(stage.programs, "scontrol", answer)
    assert stage.starts() == 85
    asked = [call for call in stage.asked_of_slurm() if call == REQUEUE]
    assert len(asked) == 3


def test_a_job_that_is_cancelled_while_the_controller_is_away_is_not_requeued(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    fake(stage.programs, "srun", stage.checkpoint(4), stage.says("interrupted", 4))
    fake(stage.programs, "sleep", f"touch {stage.programs}/slept")
    state = f"if [ -e {stage.programs}/slept ]; then echo JobState=CANCELLED; else echo JobState=RUNNING; fi"
    fake(
        stage.programs,
        "scontrol",
        f"case $* in *hostnames*) echo node0 ;; *requeue*) exit 1 ;; *) {state} ;; esac",
    )
    assert stage.starts() == 85
    assert stage.asked_of_slurm().count(REQUEUE) == 1


def test_cancelled_is_not_requeued(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    fake(stage.programs, "srun", stage.checkpoint(4), stage.says("interrupted", 4))
    stage.slurm(state="CANCELLED")
    assert stage.starts() == ENDED_BY_SLURM
    assert REQUEUE not in stage.asked_of_slurm()


def test_the_stage_before_has_to_be_finished(tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    stage = Stage(tmp_path, [], needs=before)
    fake(stage.programs, "srun", stage.says("finished"))
    for text in (None, "", '{"status": "interrupted"}', '{"status": "running"}', "[]", '"finished"'):
        if text is not None:
            (before / "status.json").write_text(text)
        assert stage.starts() == 78
        assert b"is not finished" in stage.said.stderr
    (before / "status.json").write_text('{"status": "finished"}')
    assert stage.starts() == 0


def test_deaths_are_counted_over_restarts_and_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["kill -KILL $$"])
    assert [stage.starts(restart) for restart in range(4)] == [85, 85, 85, 137]
    assert stage.asked_of_slurm().count(REQUEUE) == 3
    assert b"4 attempts in a row without progress" in stage.said.stderr
    lines = (stage.run / "slurm" / "train" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["requeue"] * 3 + ["stop"]
    assert [json.loads(line)["restart"] for line in lines] == [0, 1, 2, 3]


def test_what_slurm_ended_is_not_held_against_the_run(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["kill -KILL $$"])
    stage.slurm(state="COMPLETING")
    assert [stage.starts(restart) for restart in range(5)] == [ENDED_BY_SLURM] * 5
    stage.slurm()
    assert stage.starts(5) == 85
    assert REQUEUE in stage.asked_of_slurm()


def test_a_user_s_mistake_ends_the_job_with_its_own_code(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    words = "a shard is missing: $(touch canary) 'x'"
    run_dir.record_failure(stage.run, 3, DataError(words), words)
    kept = (stage.run / "logs" / "rank_3.failure").rename(tmp_path / "failure")
    fake(stage.programs, "srun", f"cp {kept} {stage.run}/logs/rank_3.failure", "exit 143")
    assert stage.starts() == DataError.exit_code
    assert words.encode() in stage.said.stderr
    assert not list(tmp_path.rglob("canary"))


def test_what_a_rank_says_counts_for_more_than_its_exit_code(tmp_path: Path) -> None:
    """A full disk or a mount that is gone, of one rank's job, ends it with the code of a mistake."""
    stage = Stage(tmp_path, [])
    run_dir.record_failure(stage.run, 0, OSError(28, "No space left"), "No space left")
    kept = (stage.run / "logs" / "rank_0.failure").rename(tmp_path / "failure")
    fake(stage.programs, "srun", f"cp {kept} {stage.run}/logs/rank_0.failure", "exit 2")
    assert stage.starts() == 85
    assert REQUEUE in stage.asked_of_slurm()


@pytest.mark.parametrize("theirs", [None, "4712"])
def test_whoever_starts_a_living_run_by_hand_and_is_refused_does_not_end_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str | None
) -> None:
    stage = Stage(tmp_path, [])
    monkeypatch.delenv("SLURM_JOB_ID") if theirs is None else monkeypatch.setenv("SLURM_JOB_ID", theirs)
    run_dir.record_failure(stage.run, 0, ConfigError("other settings"), "other settings")
    assert run_dir.read_failure(stage.run, 0) == "other settings"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert run_dir.read_failure(stage.run, 0) is None
    kept = (stage.run / "logs" / "rank_0.failure").rename(tmp_path / "failure")
    beside = f"cp {kept} {stage.run}/logs/rank_0.failure"
    fake(stage.programs, "srun", beside, stage.checkpoint(4), stage.says("interrupted", 4))
    assert stage.starts() == 85
    assert REQUEUE in stage.asked_of_slurm()


def test_a_cache_that_others_fill_at_the_moment_is_a_reason_to_try_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [])
    run_dir.record_failure(stage.run, 3, CacheInUseError("no room"), "no room")
    kept = (stage.run / "logs" / "rank_3.failure").rename(tmp_path / "failure")
    fake(
        stage.programs,
        "srun",
        f"cp {kept} {stage.run}/logs/rank_3.failure",
        f"exit {CacheInUseError.exit_code}",
    )
    assert stage.starts() == 85
    assert REQUEUE in stage.asked_of_slurm()


def test_words_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["exit 77"])
    run_dir.record_failure(stage.run, 7, DataError("old"), "old")
    assert stage.starts() == 85
    assert not list((stage.run / "logs").glob("*.failure"))


@pytest.mark.parametrize(
    ("present", "excluded"),
    [(("node0", "node1"), "node9,node1"), (("node1",), None), (("node1", "node9"), None)],
)
def test_a_bad_node_is_left_out_where_another_is_there(
    present: Sequence[str], excluded: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, [])
    stage.slurm(present=present)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    run_dir.record_failure(stage.run, 1, RuntimeError(), "RuntimeError: CUDA error: uncorrectable ECC error")
    kept = (stage.run / "logs" / "rank_1.failure").rename(tmp_path / "failure")
    fake(stage.programs, "srun", f"cp {kept} {stage.run}/logs/rank_1.failure", "exit 1")
    assert stage.starts() == 85
    updates = [call for call in stage.asked_of_slurm() if "update" in call]
    assert updates == ([f"scontrol update JobId=4711 ExcNodeList={excluded}"] if excluded else [])


def test_an_export_is_finished_when_its_commands_are(tmp_path: Path) -> None:
    commands = (("evaluate",), ("export", "a"), ("export", "b"))
    stage = Stage(tmp_path, ['[ "${@: -1}" != a ] || exit 8'], kind="export", commands=commands)
    (stage.run / "slurm" / "export").mkdir()
    assert stage.starts() == 8
    assert [call.split()[-1] for call in stage.asked_of_slurm() if call.startswith("srun")] == [
        "evaluate",
        "a",
    ]
    fake(stage.programs, "srun")
    assert stage.starts() == 0


def test_a_broken_record_does_not_stop_the_judge(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["exit 77"])
    (stage.run / "slurm" / "train" / "attempts.jsonl").write_text(
        '{"job": "4711", "fai\n[]\n{"failures": 3}\n'
    )
    (stage.run / "status.json").write_text("{")
    fake(stage.programs, "srun", f"echo '[' > {stage.run}/logs/rank_0.failure", "exit 77")
    assert stage.starts() == 85
    assert b"cannot be read" in stage.said.stderr
