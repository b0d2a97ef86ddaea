"""Rank facts from the environment, and the launchers that leave them there, started for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE

from pretrain.distributed import device_of, shared
from pretrain.errors import ConfigError
from pretrain.world import EXPECTED_WORLD, World, from_environment

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

SHOW_WORLD = """
import os
from pretrain.world import from_environment
world = from_environment(os.environ)
print(f"rank {world.rank} of {world.size}, local {world.local_rank}, by {world.launcher}\\n", end="", flush=True)
"""

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "4711"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "node-0"}


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"), [(0, 3, "cpu"), (1, 3, "cuda:0"), (4, 3, "cuda:3"), (2, 3, "cuda:1")]
)
def test_a_rank_takes_the_gpu_of_its_number_or_one_that_is_found_to_be_shared(
    gpus: int, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(device_of(World(local_rank, 4, local_rank, "127.0.0.1", 0, "test"))) == expected


def test_plain_python_is_a_world_of_one() -> None:
    world = from_environment({})
    assert (world.rank, world.size, world.local_rank, world.launcher) == (0, 1, 0, "python")
    assert world.is_main


def test_torchrun_and_accelerate_are_read() -> None:
    assert from_environment(TORCHRUN) == World(3, 4, 1, "node-0", 4711, "launcher")


def test_a_slurm_step_is_read() -> None:
    assert from_environment(SRUN) == World(3, 4, 1, "node-0", 29500, "srun")


def test_a_batch_shell_of_slurm_is_not_a_rank() -> None:
    batch_shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert from_environment(batch_shell).size == 1


def test_a_slurm_step_on_several_nodes_says_where_its_ranks_meet() -> None:
    nodes = {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"} | {
        "SLURM_STEP_NUM_NODES": "2"
    }
    with pytest.raises(ConfigError, match="export MASTER_PORT=29500 MASTER_ADDR="):
        from_environment(nodes)
    assert from_environment(nodes | {"MASTER_ADDR": "node-0"}).size == 4
    assert from_environment(nodes | {"SLURM_STEP_NUM_NODES": "1"}).master_addr == "127.0.0.1"


def test_ranks_on_one_gpu_are_noticed_and_cpus_are_shared() -> None:
    assert shared(["a", "b", "a", "c", "b"]) == [[0, 2], [1, 4]]
    assert shared(["a", "b"]) == []
    assert shared([None, None]) == []


def test_a_launcher_inside_a_slurm_step_wins() -> None:
    assert from_environment(SRUN | TORCHRUN | {"RANK": "2"}).rank == 2


def test_export_is_read_back_the_same() -> None:
    env: dict[str, str] = {}
    world = from_environment(SRUN)
    world.export(env)
    assert from_environment(env) == World(3, 4, 1, "node-0", 29500, "launcher")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "one"}, "RANK='one'"),
        ({"RANK": "4"}, "ranks count from 0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({EXPECTED_WORLD: "8"}, "meant to start 8 processes"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_environment(TORCHRUN | change)


def test_one_process_of_accelerate_without_a_rank_is_refused_unless_it_was_meant() -> None:
    silent = {"ACCELERATE_USE_CPU": "true"}
    with pytest.raises(ConfigError, match=r"launch/single_node\.yaml"):
        from_environment(silent)
    assert from_environment(silent | {EXPECTED_WORLD: "1"}).size == 1


def test_the_world_that_was_meant_is_checked_for_plain_python_too() -> None:
    with pytest.raises(ConfigError, match="meant to start 2 processes"):
        from_environment({EXPECTED_WORLD: "2"})


def launch(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with `show_world` as the module that it starts."""
    (folder / "show_world.py").write_text(SHOW_WORLD)
    env = {name: value for name, value in os.environ.items() if name not in (*TORCHRUN, *SRUN)}
    return subprocess.run(
        [str(BIN / command[0]), *command[1:], "-m", "show_world"],
        cwd=folder,
        env=env | {"PYTHONPATH": str(folder), "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


TWO_RANKS = ["rank 0 of 2, local 0, by launcher", "rank 1 of 2, local 1, by launcher"]


def test_accelerate_launch_starts_two_ranks_without_a_gpu(tmp_path: Path) -> None:
    config = ROOT / "launch" / "single_node.yaml"
    done = launch(tmp_path, "accelerate", "launch", "--config_file", str(config), "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == TWO_RANKS


def test_torchrun_starts_two_ranks(tmp_path: Path) -> None:
    done = launch(tmp_path, "torchrun", "--standalone", "--nproc_per_node", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == TWO_RANKS


def test_accelerates_silent_single_process_is_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, "accelerate", "launch", "--cpu", "--num_processes", "2")
    assert done.returncode != 0
    assert "started a single process without a rank" in done.stderr
    assert done.stdout == ""
