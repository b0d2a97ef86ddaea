"""Stages as jobs of a real Slurm that does to them whatever a cluster does: each ends as if nothing had happened.

All scenarios run at the same time, since they mostly wait; each test asks for the end of its own.
"""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cluster import Cluster
from patience import PATIENCE, wait_until
from ranks import on_ranks
from test_resume import TOTAL, config, final, journal, train

from pretrain.checkpoint import checkpoints
from pretrain.config import Config, dump

ROOT = Path(__file__).parents[2]
HELD = Path(__file__).with_name("held.py")
SAVED = {
    "checkpoint": {"every_steps": 2, "keep": 50, "background": False}
}  # ranks are held at a step that is saved
LONGEST_SECONDS = 900
SECRET = secrets.token_hex()


class Site:
    """Submits jobs to the cluster as a user does, each scenario from a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path) -> None:
        self.cluster, self.folder, self.shards = cluster, folder, shards
        self.python = folder / "python"
        self.python.write_text(f"#!{sys.executable}\n{HELD.read_text()}")
        self.python.chmod(0o755)

    def config(self, run: str, **sections: dict[str, Any]) -> Config:
        return config(self.folder / run, self.shards, **(SAVED | sections))

    def write(self, cfg: Config) -> str:
        path = Path(cfg.run.dir).parent / f"{Path(cfg.run.dir).name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(cfg))
        return str(path)

    def profile(self, name: str, env: dict[str, str | int] | None = None, **settings: Any) -> str:
        path = self.folder / f"{name}.profile.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "partition": "main",
                    "nodes": 2,
                    "time": 10,
                    "signal_seconds": 60,
                    "preflight_minutes": 0,
                    "python": str(self.python),
                    "env": {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
                    | (env or {}),
                    **settings,
                }
            )
        )
        return str(path)

    def call(self, *arguments: str, code: int = 0) -> str:
        """`python -m launch.slurm ...`; returns all that it said."""
        done = subprocess.run(
            [sys.executable, "-m", "launch.slurm", *arguments],
            cwd=self.folder,
            env=self.cluster.env | {"PYTHONPATH": str(ROOT), "COLUMNS": "300", "SECRET_OF_MINE": SECRET},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def submit(self, *arguments: str) -> list[int]:
        """The numbers of the jobs that a command submitted."""
        return [int(number) for number in re.findall(r"^job (\d+):", self.call(*arguments), re.MULTILINE)]

    def ends(self, job: int, state: str = "COMPLETED") -> dict[str, str]:
        """Wait for a job to end in a state."""
        final_states = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        wait_until(
            lambda: self.cluster.job(job)["JobState"] in final_states, f"job {job} ended", LONGEST_SECONDS
        )
        facts = self.cluster.job(job)
        assert facts["JobState"] == state, (facts, self.logs())
        return facts

    def reaches(self, run: str, step: int) -> None:
        folder = self.folder / run
        wait_until(
            lambda: any(path.name >= f"step_{step:08d}" for path in checkpoints(folder)),
            f"{run} has saved step {step}",
            LONGEST_SECONDS,
        )

    def logs(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.folder.rglob("slurm/*/log-*.txt"))

    def attempts(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run / "slurm" / "train" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def status(self, run: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / run / "status.json").read_text())
        return loaded


def chain_ok(site: Site) -> None:
    first = site.config('it\'s "a" $(touch x) ü #1/pretrain')
    second = site.config(
        'it\'s "a" $(touch x) ü #1/finetune',
        init={"from": first.run.dir},
        train={"total_steps": 2, "eval_every_steps": 2},
    )
    jobs = site.submit(
        "chain",
        site.write(first),
        site.write(second),
        "--profile",
        site.profile("chain", preflight_minutes=10),
    )
    for job in jobs:
        assert site.ends(job)["Restarts"] == "0"
    assert site.cluster.job(jobs[1])["Dependency"] == "(null)"
    asked = (
        Path(first.run.dir) / "slurm" / "train" / "config.yaml"
    )  # by this a finished run is known as finished
    assert asked.read_bytes() == (Path(first.run.dir) / "config.yaml").read_bytes()
    export = Path(second.run.dir) / "export" / "safetensors"
    assert (export / "config.json").is_file()
    shown = site.call("status", first.run.dir)
    assert shown.count("COMPLETED") == 3, shown
    assert f"{TOTAL} of {TOTAL}" in shown


def chain_with_a_failing_first_stage(site: Site) -> None:
    first = site.config("fails/pretrain", data={"train": {"shards": "nowhere"}})
    second = site.config("fails/finetune", init={"from": first.run.dir})
    jobs = site.submit(
        "chain", site.write(first), site.write(second), "--profile", site.profile("fails"), "--nodes", "1"
    )
    assert site.ends(jobs[0], "FAILED")["Restarts"] == "0"  # nothing that a second try would mend
    for job in jobs[1:]:
        site.ends(job, "CANCELLED")
    (attempt,) = site.attempts("fails/pretrain")
    assert attempt["action"] == "stop"
    assert "nowhere" in attempt["reason"]
    assert not (site.folder / "fails/finetune/status.json").exists()


def operator_requeue(site: Site) -> None:
    profile = site.profile("requeue", {"HOLD_RESTARTS": 1, "HOLD_STEP": 5})
    (job,) = site.submit("submit", site.write(site.config("requeue")), "--profile", profile)
    site.reaches("requeue", 4)
    site.cluster.run("scontrol", "requeue", str(job))
    assert site.ends(job)["Restarts"] == "1"


def preemption(site: Site) -> None:
    profile = site.profile("preempted", {"HOLD_RESTARTS": 1, "HOLD_STEP": 5}, partition="low")
    (job,) = site.submit("submit", site.write(site.config("preempted")), "--profile", profile)
    site.reaches("preempted", 4)
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    site.cluster.run("sbatch", "--parsable", *urgent)
    assert site.ends(job)["Restarts"] == "1"


def time_limit_twice(site: Site) -> None:
    """The signal comes 40 s after the start, and the limit much later: a busy machine needs long to begin."""
    profile = site.profile("limit", {"HOLD_RESTARTS": 2, "HOLD_STEP": 3}, time=5, signal_seconds=260)
    (job,) = site.submit("submit", site.write(site.config("limit")), "--profile", profile)
    wait_until(lambda: int(site.cluster.job(job)["Restarts"]) >= 2, "it went on twice", LONGEST_SECONDS)
    site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # enough for the rest
    restarts = int(site.ends(job)["Restarts"])
    assert restarts >= 2  # more where that came too late
    assert [a["action"] for a in site.attempts("limit")] == ["requeue"] * restarts + ["finished"]


def lost_node(site: Site) -> None:
    profile = site.profile("lost", {"HOLD_RESTARTS": 1, "PACE_SECONDS": "1"}, partition="loss", nodes="1-2")
    (job,) = site.submit("submit", site.write(site.config("lost")), "--profile", profile)
    site.reaches("lost", 4)
    assert site.cluster.job(job)["NumNodes"] == "2"
    site.cluster.lose("node3")
    facts = site.ends(job)
    assert facts["Restarts"] == "1"
    assert facts["NodeList"] == "node2"


def broken_node(site: Site) -> None:
    env: dict[str, str | int] = {"HOLD_RESTARTS": 1, "HOLD_STEP": 5, "BROKEN_NODE": "node7"}
    profile = site.profile("broken", env, partition="broken", nodes="1-2")
    (job,) = site.submit("submit", site.write(site.config("broken")), "--profile", profile)
    facts = site.ends(job)
    assert (facts["Restarts"], facts["NodeList"], facts["ExcNodeList"]) == ("1", "node6", "node7")
    assert "uncorrectable ECC error" in site.attempts("broken")[0]["reason"]


def cancelled_and_submitted_again(site: Site) -> None:
    path = site.write(site.config("cancelled"))
    profile = site.profile("cancelled", {"HOLD_RESTARTS": 1, "HOLD_STEP": 5})
    (job,) = site.submit("submit", path, "--profile", profile)
    site.reaches("cancelled", 4)
    assert f"job {job} already, which is RUNNING" in site.call("submit", path, "--profile", profile, code=5)
    assert f"cancelled: {job}" in site.call("cancel", str(site.folder / "cancelled"))
    site.ends(job, "CANCELLED")
    wait_until(lambda: site.status("cancelled")["status"] == "interrupted", "the run has saved")
    (again,) = site.submit("submit", path, "--profile", site.profile("again"))
    site.ends(again)


SCENARIOS: list[Callable[[Site], None]] = [
    time_limit_twice,
    lost_node,
    broken_node,
    preemption,
    chain_ok,
    cancelled_and_submitted_again,
    operator_requeue,
    chain_with_a_failing_first_stage,
]


@pytest.fixture(scope="module")
def site(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"), digits)


@pytest.fixture(scope="module")
def ended(site: Site) -> Iterator[dict[str, Future[None]]]:
    with ThreadPoolExecutor(len(SCENARIOS)) as threads:
        yield {scenario.__name__: threads.submit(scenario, site) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def golden(site: Site, ended: dict[str, Future[None]]) -> Path:
    """The run that nobody disturbed, by the same two ranks without Slurm."""
    cfg = site.config("golden")
    on_ranks(2, train, cfg)
    return Path(cfg.run.dir)


def assert_same_weights(run: Path, golden: Path) -> None:
    expected, got = final(golden), final(run)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert journal(run) == journal(golden)


@pytest.mark.timeout(LONGEST_SECONDS)
def test_a_chain_ends_with_an_export(ended: dict[str, Future[None]], site: Site, golden: Path) -> None:
    ended["chain_ok"].result()
    assert_same_weights(site.folder / 'it\'s "a" $(touch x) ü #1/pretrain', golden)
    assert not list(site.folder.rglob("x"))


@pytest.mark.timeout(LONGEST_SECONDS)
def test_a_chain_whose_first_stage_fails_is_cancelled(ended: dict[str, Future[None]]) -> None:
    ended["chain_with_a_failing_first_stage"].result()


@pytest.mark.timeout(LONGEST_SECONDS)
@pytest.mark.parametrize(
    ("scenario", "run"),
    [
        ("operator_requeue", "requeue"),
        ("preemption", "preempted"),
        ("time_limit_twice", "limit"),
        ("cancelled_and_submitted_again", "cancelled"),
    ],
)
def test_a_disturbed_run_ends_as_the_undisturbed_one(
    scenario: str, run: str, ended: dict[str, Future[None]], site: Site, golden: Path
) -> None:
    ended[scenario].result()
    assert_same_weights(site.folder / run, golden)


@pytest.mark.timeout(LONGEST_SECONDS)
@pytest.mark.parametrize(("scenario", "run"), [("lost_node", "lost"), ("broken_node", "broken")])
def test_a_run_that_lost_a_node_goes_on_with_the_rest(
    scenario: str, run: str, ended: dict[str, Future[None]], site: Site, golden: Path
) -> None:
    ended[scenario].result()
    expected, got = journal(golden), journal(site.folder / run)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.timeout(LONGEST_SECONDS)
def test_what_the_profile_does_not_name_stays_out_of_the_job(
    ended: dict[str, Future[None]], site: Site
) -> None:
    for future in ended.values():
        future.exception()
    for path in site.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(LONGEST_SECONDS)
def test_how_long_it_is_from_a_requeue_to_the_first_step(site: Site) -> None:
    """With `pytest -m slow -s tests/slurm/test_cluster.py` it is printed."""
    profile = site.profile("timed", {"HOLD_RESTARTS": 1, "HOLD_STEP": 5})
    cfg = site.config("timed", train={"log_every_steps": 1})
    (job,) = site.submit("submit", site.write(cfg), "--profile", profile)
    site.reaches("timed", 4)
    site.cluster.run("scancel", "--signal=USR1", str(job))  # as before a time limit
    assert site.ends(job)["Restarts"] == "1"
    stopped, again = site.attempts("timed")
    lines = map(json.loads, (site.folder / "timed" / "metrics.jsonl").read_text().splitlines())
    ours = [line for line in lines if line["attempt"] == 2]
    opened = next(line["time"] / 1000 for line in ours if line["op"] == "attempt")
    stepped = next(line["time"] / 1000 for line in ours if line["op"] == "metrics")
    print(
        f"\nfrom the request to the first step {stepped - stopped['ended']:.1f} s: {again['began'] - stopped['ended']:.1f} s "
        f"until Slurm started the job, {opened - again['began']:.1f} s until the ranks had met and found their checkpoint, "
        f"{stepped - opened:.1f} s until the first step"
    )
