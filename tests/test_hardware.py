"""How many cores a rank may use: those that its job was given, never the machine's."""

import os

import pytest

from pretrain.hardware import cores_given, share_of_cores


@pytest.mark.parametrize(
    ("usable", "env", "limit", "expected"),
    [
        (16, {}, "", 16),  # plain python
        (16, {"LOCAL_WORLD_SIZE": "4"}, "", 4),  # torchrun, accelerate launch
        (2, {"LOCAL_WORLD_SIZE": "4"}, "", 1),
        (6, {"LOCAL_WORLD_SIZE": "4"}, "", 1),
        (8, {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, "", 8),  # srun binds tasks
        (64, {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_TASKS_PER_NODE": "4"}, "", 8),  # srun does not
        (64, {"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "", 16),
        (16, {"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "", 16),
        (64, {"SLURM_CPUS_PER_TASK": "32", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_WORLD_SIZE": "4"}, "", 8),
        (64, {}, "max 100000\n", 64),  # a container without a limit
        (64, {}, "400000 100000\n", 4),
        (64, {"LOCAL_WORLD_SIZE": "2"}, "400000 100000\n", 2),
        (64, {}, "50000 100000\n", 1),
        (4, {"SLURM_CPUS_PER_TASK": "", "LOCAL_WORLD_SIZE": "x"}, "not a limit", 4),
    ],
)
def test_a_rank_takes_its_share_of_the_cores_that_the_job_was_given(usable, env, limit, expected):
    assert share_of_cores(usable, env, limit) == expected


def test_affinity_counts_and_not_the_machine(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores_given() == 1
    finally:
        os.sched_setaffinity(0, before)
