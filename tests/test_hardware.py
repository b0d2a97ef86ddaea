"""How many cores a rank may use: those that its job was given, never the machine's."""

import os

import pytest

from pretrain import hardware
from pretrain.hardware import cores_given, quotas, share_of_cores


@pytest.mark.parametrize(
    ("usable", "env", "expected"),
    [
        (16, {}, 16),  # plain python
        (16, {"LOCAL_WORLD_SIZE": "4"}, 4),  # torchrun, accelerate launch
        (2, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (6, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (8, {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, 8),  # srun binds tasks
        (64, {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, 8),  # srun does not
        (64, {"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 16),
        (16, {"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 16),
        (64, {"SLURM_CPUS_PER_TASK": "32", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, 8),
        (4, {"SLURM_CPUS_PER_TASK": "", "LOCAL_WORLD_SIZE": "x"}, 4),
    ],
)
def test_a_rank_takes_its_share_of_the_cores_that_the_job_was_given(usable, env, expected):
    assert share_of_cores(usable, env) == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),  # a container without a limit
        ("0::/\n", {"cpu.max": "400000 100000\n"}, [4]),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, [1]),
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "200000 100000"}, [2]),
        ("0::/job\n", {"job/cpu.max": "300000 100000", "cpu.max": "200000 100000"}, [3, 2]),
        ("0::/../elsewhere\n", {"cpu.max": "200000 100000"}, [2]),  # outside of what the container sees
        (
            "3:memory:/job\n2:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "250000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            [2],
        ),
        (
            "2:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            [],
        ),
        ("", {"cpu.max": "400000 100000\n"}, []),
        ("0::/\n", {"cpu.max": "no limit"}, []),
    ],
)
def test_limits_of_control_groups_count(tmp_path, own, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quotas(own, tmp_path) == expected


def test_a_container_with_half_the_cores_gives_half_of_them(tmp_path, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "own")
    assert cores_given() == 1


def test_affinity_counts_and_not_the_machine(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores_given() == 1
    finally:
        os.sched_setaffinity(0, before)
