"""`python -m launch.slurm` with Slurm's programs faked: what it writes, what it hands over, what it refuses."""

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from fakes import calls, fake
from patience import PATIENCE

from pretrain.config import Config, dump, load
from pretrain.errors import RunDirError

ROOT = Path(__file__).parents[2]
MINE, OTHER = secrets.token_hex(), secrets.token_hex()


class Desk:
    """A user's folder, with a config, a profile, and Slurm's programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        fake(self.bin, "sbatch", f"env > {self.bin}/env", f"n=$(cat {self.bin}/n 2>/dev/null || echo 100)",
             f"echo $((n + 1)) > {self.bin}/n", "echo $((n + 1))")  # fmt: skip
        fake(self.bin, "scancel")
        self.states("PENDING")
        self.first = self.config("first")
        self.second = self.config("second", "runs/first")
        (folder / "site.yaml").write_text(yaml.safe_dump({"time": 10, "pass_env": ["MY_TOKEN"]}))

    def config(self, name: str, source: str | None = None) -> str:
        init = {"init": {"from": source}} if source else {}
        cfg: Config = tiny.config(run={"dir": f"runs/{name}"}, **init)
        (self.folder / f"{name}.yaml").write_text(dump(cfg))
        return f"{name}.yaml"

    def states(self, state: str) -> None:
        """What Slurm says of every job."""
        known = f"echo 'JobId=1 JobState={state}'"
        fake(self.bin, "scontrol", known if state else "echo 'Invalid job id specified' >&2; exit 1")

    def call(self, *words: str, code: int = 0, site: bool = True) -> str:
        profile = ("--profile", "site.yaml") if site else ()
        done = subprocess.run(
            [sys.executable, "-m", "launch.slurm", *words, *profile],
            cwd=self.folder,
            env=os.environ
            | {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
            | {
                "MY_TOKEN": MINE,
                "OTHER_TOKEN": OTHER,
                "SBATCH_PARTITION": "evil",
                "SLURM_JOB_ID": "7",
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def asked(self, program: str) -> list[list[str]]:
        return [call[1:] for call in calls(self.bin) if call[0] == program]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_a_job_leaves_its_config_its_code_and_its_script(desk: Desk) -> None:
    said = desk.call("submit", desk.first, "optim.lr=0.5")
    assert "job 101: runs-first" in said
    folder = desk.folder / "runs/first/slurm/train"
    assert load(folder / "config.yaml").optim.lr == 0.5
    code = json.loads((folder / "code.json").read_text())
    assert (folder / "code.diff").is_file() == (code.get("git_dirty") == "true")
    assert json.loads((folder / "job.json").read_text())["job_id"] == 101
    assert f"pretrain.train {folder / 'config.yaml'}" in (folder / "stage.sbatch").read_text()
    assert desk.asked("sbatch") == [["--parsable", "--", str(folder / "stage.sbatch")]]


def test_the_job_s_environment_is_what_was_named_and_secrets_are_written_nowhere(desk: Desk) -> None:
    desk.call("submit", desk.first)
    seen = dict(line.partition("=")[::2] for line in (desk.bin / "env").read_text().splitlines())
    assert seen["MY_TOKEN"] == MINE
    assert not {"OTHER_TOKEN", "SBATCH_PARTITION", "SLURM_JOB_ID", "PYTHONPATH"} & seen.keys()
    for path in (desk.folder / "runs").rglob("*"):
        assert path.is_dir() or not {MINE, OTHER} & set(re.findall(r"\w+", path.read_text()))


def test_one_run_has_one_living_job(desk: Desk) -> None:
    desk.call("submit", desk.first)
    for state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUE_HOLD"):
        desk.states(state)
        said = desk.call("submit", desk.first, code=RunDirError.exit_code)
        assert f"has job 101 already, which is {state}" in said
    for number, state in enumerate(("FAILED", "CANCELLED", "")):
        desk.states(state)
        assert f"job {102 + number}:" in desk.call("submit", desk.first)


def test_asking_writes_nothing_and_submits_nothing(desk: Desk) -> None:
    fake(desk.bin, "sbatch", "cat > /dev/null", "echo 'sbatch: Job 7 to start at noon' >&2")
    script = desk.call("render", desk.first)
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=runs-first\n")
    assert desk.call("submit", desk.first, "--dry-run").strip() == script.strip()
    assert desk.call("chain", desk.first, desk.second, "--dry-run").count("#!/bin/bash") == 3
    assert desk.asked("sbatch") == []
    assert "to start at noon" in desk.call("submit", desk.first, "--test-only")
    assert desk.asked("sbatch") == [["--test-only"]]
    assert not (desk.folder / "runs").exists()


def test_a_chain_waits_for_each_stage_before_the_next(desk: Desk) -> None:
    desk.call("chain", desk.first, desk.second, "--format", "timm", "--which", "best")
    first, second, export = desk.asked("sbatch")
    assert first[:-2] == ["--parsable"]
    assert second[1] == "--dependency=afterok:101"
    assert export[1] == "--dependency=afterok:102"
    script = Path(second[-1]).read_text()
    assert f"--needs {desk.folder / 'runs/first'}" in script
    assert "export --which best --format timm" in Path(export[-1]).read_text()
    for run in ("runs/first", "runs/second"):
        shown = desk.call("status", run, site=False)
        assert [line for job in (101, 102, 103) for line in shown.splitlines() if f" {job} " in line]
    assert "cancelled: 103, 102, 101" not in shown
    desk.call("cancel", "runs/second", site=False)
    assert desk.asked("scancel") == [["--", "103", "102", "101"]]


def test_the_status_has_the_loss_the_time_left_and_a_link(desk: Desk) -> None:
    desk.call("submit", desk.first)
    run = desk.folder / "runs/first"
    (run / "tracking").mkdir()
    (run / "status.json").write_text('{"status": "running", "step": 0}')
    (run / "plan.json").write_text('{"total_steps": 3600}')
    (run / "tracking" / "delivered.json").write_text(
        '{"uri": "http://head:5000", "offset": 0, "error": null}'
    )
    (run / "tracking" / "page").write_text("#/experiments/1/runs/abc\n")
    values = {"train/loss": 2.34567, "perf/step_seconds": 2.0, "perf/images_per_second": 1234.5}
    lines = [
        {"op": "metrics", "attempt": 1, "time": 1, "step": step, "values": values} for step in (900, 1800)
    ] + [{"op": "metrics", "attempt": 1, "time": 2, "step": 1800, "values": {"perf/save_seconds": 1.0}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"op": "met')
    shown = desk.call("status", "runs/first", site=False)
    for words in ("running", "PENDING", "1,800 of 3,600", "01:00", "1,234", "2.3457"):
        assert words in shown, shown
    assert f"{run}: http://head:5000/#/experiments/1/runs/abc" in shown


def test_a_chain_that_slurm_takes_only_a_part_of_is_taken_back(desk: Desk) -> None:
    fake(
        desk.bin,
        "sbatch",
        '[ "${*/afterok/}" = "$*" ] || { echo "no such partition" >&2; exit 1; }',
        "echo 101",
    )
    said = desk.call("chain", desk.first, desk.second, code=9)
    assert "no such partition" in said
    assert desk.asked("scancel") == [["--", "101"]]


def test_stages_that_do_not_follow_one_another_are_no_chain(desk: Desk) -> None:
    assert "starts from no other" in desk.call("chain", desk.first, desk.config("third"), code=2)
    other = desk.config("fourth", "runs/elsewhere")
    assert "but the stage before it writes" in desk.call("chain", desk.first, other, code=2)
    assert "same run.dir" in desk.call("chain", desk.first, desk.config("first", "runs/first"), code=2)
    assert desk.asked("sbatch") == []


def test_a_fine_tuning_waits_for_the_run_that_it_starts_from(desk: Desk) -> None:
    assert "starts from no other" in desk.call("submit", desk.first, "--after-init", code=2)
    desk.call("submit", desk.first)
    desk.call("submit", desk.second, "--after-init")
    assert desk.asked("sbatch")[-1][1] == "--dependency=afterok:101"
    desk.states("COMPLETED")
    desk.call("submit", desk.second, "--after-init")
    assert desk.asked("sbatch")[-1][1] == "--"
    assert "--needs" in (desk.folder / "runs/second/slurm/train/stage.sbatch").read_text()


@pytest.mark.parametrize(
    ("wrapper", "words", "scripts"),
    [("pretrain.sh", ["first.yaml"], 1), ("finetune.sh", ["second.yaml"], 1), ("pipeline.sh", ["first.yaml", "second.yaml"], 3)],
)  # fmt: skip
def test_the_wrappers_are_the_same_commands(wrapper: str, words: list[str], scripts: int, desk: Desk) -> None:
    path = ROOT / "launch" / wrapper
    assert subprocess.run(["bash", "-n", str(path)], timeout=PATIENCE).returncode == 0
    done = subprocess.run(
        [str(path), *words, "--profile", "site.yaml", "--dry-run"],
        cwd=desk.folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == scripts


def test_what_is_missing_is_named(desk: Desk) -> None:
    assert "there is no profile 'nowhere'" in desk.call(
        "submit", desk.first, "--profile", "nowhere", code=2, site=False
    )
    assert "was not submitted to Slurm" in desk.call("status", "runs/first", code=5, site=False)
    (desk.bin / "sbatch").unlink()
    said = desk.call("submit", desk.first, code=9)
    assert "there is no sbatch here" in said or "sbatch:" in said
