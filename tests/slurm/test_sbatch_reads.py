"""What a real Slurm makes of a script: the folder of the job and the path of its log as they were written, its ranks."""

import os
import re
from dataclasses import replace
from pathlib import Path

from cluster import Cluster
from fakes import fake
from patience import wait_until
from test_render import HOSTILE, acceptable, job, profile

from launch.render import render
from pretrain.errors import ConfigError
from pretrain.hardware import share_of_cores

NAMES = [name for name in HOSTILE if acceptable(name)]


def test_a_job_starts_where_it_should_and_its_log_is_where_it_should(
    cluster: Cluster, tmp_path: Path
) -> None:
    logs: dict[Path, Path] = {}
    for number, name in enumerate([*NAMES, "hetjob", "a packjob b", " ends with a blank "]):
        run, cwd = tmp_path / f"run{number}" / name, tmp_path / f"cwd{number}" / name
        one = replace(job(), run_dir=run, cwd=cwd)
        try:
            script = render(one, profile(partition="main"))
        except ConfigError:
            assert {"%", "\\"} & set(name), name
            continue  # Slurm takes these for its own: `test_render` has them refused
        one.folder.mkdir(parents=True)
        cwd.mkdir(parents=True)
        directives = script[: script.index("\n#\n")]
        (one.folder / "stage.sbatch").write_text(f"{directives}\npwd\n")
        submitted = cluster.run("sbatch", "--parsable", "--", str(one.folder / "stage.sbatch")).strip()
        logs[one.folder / f"log-{submitted}.txt"] = cwd
    assert len(logs) > 18

    def missing() -> dict[Path, Path]:
        return {log: cwd for log, cwd in logs.items() if not log.is_file() or log.read_text() != f"{cwd}\n"}

    def jobs_left() -> str:
        return cluster.run("squeue", "--noheader", "--format=%j|%T", "--name=one")

    wait_until(lambda: not jobs_left().strip(), "all jobs have ended")
    assert not missing()


def test_each_rank_is_a_task_with_its_own_share_of_the_cores(cluster: Cluster, tmp_path: Path) -> None:
    judge = fake(tmp_path, "judge", 'case "${@: -2}" in *begin) echo go ;; *) echo finished ;; esac')
    site = profile(
        partition="main", nodes="1-2", ranks_per_node=2, cpus_per_rank=3, exclusive=True, python=str(judge)
    )
    one = job(str(tmp_path / "run"), cwd=tmp_path, commands=(("env",),), preflight=("env",))
    one.folder.mkdir(parents=True)
    (one.folder / "stage.sbatch").write_text(render(one, site))
    number = cluster.run("sbatch", "--parsable", "--", str(one.folder / "stage.sbatch")).strip()
    wait_until(lambda: cluster.job(int(number))["JobState"] == "COMPLETED", "the job has ended")
    seen: dict[str, list[dict[str, str]]] = {}
    for line in (one.folder / f"log-{number}.txt").read_text().splitlines():
        if found := re.match(r"(\d+): (\w+)=(.*)", line):
            rank, name, value = found.groups()
            steps = seen.setdefault(rank, [{}])
            if name in steps[-1]:  # the step before it was the pre-flight
                steps.append({})
            steps[-1][name] = value
    assert sorted(seen) == ["0", "1", "2", "3"]
    for rank, (look, work) in seen.items():
        for step in (look, work):
            assert step["SLURM_PROCID"] == rank
            assert step["SLURM_STEP_NUM_TASKS"] == "4"
            assert step["SLURM_LOCALID"] == str(int(rank) % 2)
            assert step["MASTER_ADDR"] == "node0"
            assert step["PRETRAIN_NODES"].split()[int(rank) // 2] == step["SLURMD_NODENAME"]
            assert step["SRUN_CPUS_PER_TASK"] == "3"
            assert share_of_cores(os.cpu_count() or 1, step) == min(3, os.cpu_count() or 1)
            assert share_of_cores(16, step) == 3
