"""A sweep is one array, each of whose tasks is a stage like any other, and its best member is marked."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import yaml
from cluster import Cluster
from fakes import fake, run_script
from patience import wait_until
from test_cluster import LONGEST_SECONDS, Site
from test_submit import Desk

from launch import sweep
from launch.attempt import _job
from launch.best import Result, SweepError, choose
from pretrain.config import dump
from pretrain.config.load import parse
from pretrain.errors import ConfigError, DivergedError, RunDirError


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def path(desk: Desk) -> str:
    cfg = tiny.config(run={"dir": "runs/s"}, data={"val": {"shards": "v"}}, init={"from": "runs/first"})
    (desk.folder / "s.yaml").write_text(dump(cfg))
    return "s.yaml"


def test_a_sweep_is_one_array_of_stages_and_a_job_after_them(desk: Desk, path: str) -> None:
    said = desk.call(
        "sweep", path, "--over", "optim.lr=0.003,0.01", "--over", "run.seed=1,2", "--at-once", "3"
    )
    array, last = desk.asked("sbatch")
    place = desk.folder / "runs/s"
    assert array == ["--parsable", "--", str(place / "slurm/sweep/array.sbatch")]
    assert last == ["--parsable", "--dependency=afterany:101", "--", str(place / "slurm/sweep/stage.sbatch")]
    assert "#SBATCH --array=0-3%3\n" in Path(array[-1]).read_text()
    names = ["lr-0.003_seed-1", "lr-0.003_seed-2", "lr-0.01_seed-1", "lr-0.01_seed-2"]
    assert [name for name, _ in sweep.read(place)] == names
    for task, name in enumerate(names):
        folder = place / name / "slurm" / "train"
        assert f"job 101_{task}:" in said
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        assert settings["run"]["dir"] == f"runs/s/{name}"
        assert settings["run"]["campaign"] == "runs/s"
        assert f"lr-{settings['optim']['lr']}_seed-{settings['run']['seed']}" == name
    shown = desk.call("status", "runs/s", site=False)
    assert re.findall(r" (10[12](?:_\d)?) ", shown) == ["101_0", "101_1", "101_2", "101_3", "102"]
    assert "has job 101_0 already" in desk.call("sweep", path, "--over", "optim.lr=0.003,0.01",
                                                "--over", "run.seed=1,2", code=5)  # fmt: skip
    desk.call("cancel", "runs/s/lr-0.01_seed-1", site=False)
    assert desk.asked("scancel") == [["--", "102", "101_3", "101_2", "101_1", "101_0"]]


def test_a_sweep_that_slurm_takes_only_a_part_of_is_taken_back(desk: Desk, path: str) -> None:
    fake(desk.bin, "sbatch", '[ "${*/after/}" = "$*" ] || { echo no >&2; exit 1; }', "echo 101")
    desk.call("sweep", path, "--over", "optim.lr=0.003,0.01", code=9)
    assert desk.asked("scancel") == [["--", "101"]]


def test_asking_about_a_sweep_writes_nothing(desk: Desk, path: str) -> None:
    shown = desk.call("sweep", path, "--over", "optim.lr=0.003,0.01", "--dry-run")
    assert shown.count("#!/bin/bash") == 4
    desk.call("sweep", path, "--over", "optim.lr=0.003,0.01", "--test-only")
    assert desk.asked("sbatch") == [["--test-only"]] * 2
    assert not (desk.folder / "runs").exists()


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["optim.lr=0.1"], "2 to 1000 members"),
        (["optim.lr=0.1,"], "write it as"),
        (["optim.lr"], "write it as"),
        (["optim.lr=0.1,0.10"], "are the same"),
        (["optim.lr=0.1", "optim.lr=0.2"], "names a key twice"),
        (["run.dir=a,b"], "sets it for each"),
        (["optim.lrr=1,2"], "unknown key"),
        (["optim.lr=1,-2"], "greater than 0"),
        (["data.val=null,{shards: v}"], "not every member has"),
        (["data.val={shards: v},null"], "not every member has"),
        (["checkpoint.mirror=a/b,a/c"], "sets it for each"),
    ],
)
def test_what_is_no_sweep_is_refused_with_a_reason(
    over: list[str], words: str, desk: Desk, path: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        sweep.members_of(desk.folder / path, (), over)


@pytest.mark.parametrize("value", ["../../x", "$(touch x)", 'a"b', "ü #1", "a b/c"])
def test_no_value_leads_out_of_the_sweep(value: str, desk: Desk, path: str) -> None:
    over = [f"tracking.experiment='{value}',other"]
    for member in sweep.members_of(desk.folder / path, (), over):
        assert re.fullmatch(r"experiment-[A-Za-z0-9_.+-]+", member.name)
        assert Path(member.config.run.dir).parent == Path("runs/s")


def test_each_member_has_a_mirror_of_its_own(desk: Desk, path: str) -> None:
    """In one of them all, a member that has not saved yet would go on with the checkpoint of another."""
    for mirror in ("s3://bucket/runs/s", "/far/s/"):
        members = sweep.members_of(
            desk.folder / path, [f"checkpoint.mirror={mirror}"], ["optim.lr=0.003,0.01"]
        )
        mirrors = [f"{mirror.rstrip('/')}/lr-{lr}" for lr in ("0.003", "0.01")]
        assert [member.config.checkpoint.mirror for member in members] == mirrors
        for member in members:
            assert parse(dump(member.config), "its snapshot") == member.config


def test_a_sweep_waits_for_all_the_runs_that_its_members_start_from(desk: Desk, path: str) -> None:
    desk.call("submit", desk.first)
    desk.call("submit", desk.config("other"))
    desk.call("sweep", path, "--over", "init.from=runs/first,runs/other,runs/elsewhere", "--after-init")
    assert (
        desk.asked("sbatch")[2][1] == "--dependency=afterany:101:102"
    )  # one that fails stops only those that need it
    scripts = (desk.folder / "runs/s").glob("from-*/slurm/train/stage.sbatch")
    assert all("--needs" in script.read_text() for script in scripts)


def test_a_list_is_one_value(desk: Desk, path: str) -> None:
    members = sweep.members_of(desk.folder / path, (), ["optim.betas=[0.9,0.95],[0.9,0.99]"])
    assert [member.config.optim.betas[1] for member in members] == [0.95, 0.99]


def test_a_run_cannot_hold_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(RunDirError, match="is a run by itself"):
        sweep.check_place(tmp_path)


def test_the_best_is_the_highest_of_those_that_are_finished() -> None:
    low, high, same = (Result(n, {}, "finished", s, 9) for n, s in (("a", 0.1), ("b", 0.5), ("c", 0.5)))
    assert choose([Result("d", {}, "failed"), low, high, same]) is high
    with pytest.raises(SweepError, match="d: failed"):
        choose([Result("d", {}, "failed")])


def test_a_task_of_an_array_asks_about_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert _job() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert _job() == "7_3"


def test_each_task_runs_the_script_of_its_member(desk: Desk, path: str) -> None:
    desk.call("sweep", path, "--over", "optim.lr=0.003,0.01")
    place = desk.folder / "runs/s"
    for name in ("lr-0.003", "lr-0.01"):
        (place / name / "slurm/train/stage.sbatch").write_text(f"echo {name}; exit 3\n")
    done = run_script(
        place / "slurm/sweep/array.sbatch", desk.bin, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="1"
    )
    assert done.returncode == 3
    assert (place / "lr-0.01/slurm/train/log-9_1.txt").read_text() == "lr-0.01\n"


@pytest.mark.timeout(LONGEST_SECONDS)
def test_a_sweep_of_which_members_are_requeued_and_one_diverges_ends_with_its_best_marked(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    site = Site(cluster, tmp_path, digits)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cfg = site.config("sweep", tracking={"uri": uri, "system_seconds": None})
    profile = site.profile("sweep", {"HOLD_RESTARTS": 1, "HOLD_STEP": 5}, nodes=1)
    jobs = re.findall(
        r"^job (\S+):", site.call("sweep", site.write(cfg), "run.campaign=mine", "--over", "optim.lr=0.0001,0.01,0.02,1e38", "--profile", profile), re.M
    )  # fmt: skip
    names = ["lr-0.0001", "lr-0.01", "lr-0.02"]
    array, last, diverging = jobs[0].partition("_")[0], int(jobs[-1]), "lr-1e38"

    def requeue(task: int) -> None:
        site.reaches(f"sweep/{names[task]}", 4)
        cluster.run("scontrol", "requeue", f"{array}_{task}") if task else cluster.run(
            "scancel", "--signal=USR1", f"{array}_{task}"
        )

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(requeue, range(3)))
    wait_until((tmp_path / "sweep" / diverging / "status.json").is_file, "the other one has begun, too")
    cluster.run("scancel", "--signal=USR1", f"{array}_3")
    site.ends(last)
    place = tmp_path / "sweep"
    for task, name in enumerate(names):
        assert site.status(f"sweep/{name}")["status"] == "finished"
        assert [a["job"] for a in site.attempts(f"sweep/{name}")][-1] == f"{array}_{task}"
    assert site.status(f"sweep/{diverging}")["status"] == "failed"
    last_attempt = site.attempts(f"sweep/{diverging}")[-1]
    assert last_attempt["action"] == "stop"
    assert last_attempt["failures"][0]["exit_code"] == DivergedError.exit_code
    best = json.loads((place / "best.json").read_text())
    tops = {name: site.status(f"sweep/{name}")["best"]["val/top1"] for name in names}
    assert [(m["run"], m["status"]) for m in best["members"]][-1] == (diverging, "failed")
    assert best["top1"] == max(tops.values()) == tops[best["run"]]
    client = MlflowClient(uri)
    (experiment,) = [
        e.experiment_id for e in client.search_experiments() if e.name == cfg.tracking.experiment
    ]
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "mine/sweep"
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert set(children) == {f"sweep/{name}" for name in [*names, diverging]}
    for name, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if name == f"sweep/{diverging}" else "FINISHED")
        assert run.data.tags.get("best") == ("true" if name == f"sweep/{best['run']}" else None)
    assert f"best: {place / best['run']}" in site.call("status", str(place))
