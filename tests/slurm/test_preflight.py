"""Before training every rank looks at what it needs, and the one that lacks it is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from ports import free_port
from test_resume import config

from pretrain.config import dump

CULPRIT = "node7"


def start(ranks: dict[int, str], folder: Path, *options: str) -> list[tuple[int, str]]:
    """Run preflight as rank -> config of a world of two: (exit code, words) of each that was started."""
    port = str(free_port())
    processes = []
    for rank, path in ranks.items():
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "SLURMD_NODENAME": f"node{7 * rank}", "SLURM_JOB_ID": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "launch.preflight", path, *options]
        processes.append(subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True))
    words = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, words, strict=True)]


def write(path: Path, run: Path, shards: Path, **sections: Any) -> str:
    path.write_text(dump(config(run, shards, **sections)))
    return str(path)


def failure(run: Path, rank: int) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "logs" / f"rank_{rank}.failure").read_text())
    return loaded


def test_ranks_that_have_everything_pass_and_leave_nothing(digits: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", tmp_path / "run", digits)
    for code, words in start({0: path, 1: path}, tmp_path, "--seconds", str(PATIENCE)):
        assert code == 0, words
    assert not list((tmp_path / "run" / "logs").iterdir())


def test_a_rank_that_sees_no_shards_is_named_with_its_node(digits: Path, tmp_path: Path) -> None:
    """It fails at once; `srun --kill-on-bad-exit` ends those that wait for it."""
    path = write(tmp_path / "c.yaml", tmp_path / "run", tmp_path / "not-mounted")
    ((code, words),) = start({1: path}, tmp_path, "--seconds", "10000")
    assert code == 10
    assert f"rank 1 on {CULPRIT} sees no shards" in words
    assert "Traceback" not in words
    left = failure(tmp_path / "run", 1)
    assert (left["node"], left["retry"]) == (CULPRIT, False)


def test_a_rank_that_never_comes_is_named_in_time(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "c.yaml", tmp_path / "run", digits)
    ((code, words),) = start({0: path}, tmp_path, "--seconds", "3")
    assert code == 10
    assert "waited 3 s for rank 1 of 2" in words
    monkeypatch.setenv("PRETRAIN_NODES", f"elsewhere {CULPRIT} ")  # as the batch script has it
    ((code, words),) = start({0: path}, tmp_path, "--seconds", "3")
    assert code == 10
    assert f"waited 3 s for rank 1 on {CULPRIT} of 2" in words
    assert not list((tmp_path / "run" / "logs").glob("*.failure"))  # it is not this rank's own fault


def test_a_node_without_its_gpus_is_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = write(tmp_path / "c.yaml", tmp_path / "run", digits)
    ((code, _),) = start({1: path}, tmp_path)
    assert code == 10
    assert "CUDA sees no device" in failure(tmp_path / "run", 1)["words"]
    assert failure(tmp_path / "run", 1)["retry"]  # elsewhere, without this node


def test_a_run_directory_that_cannot_be_written_is_named(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "c.yaml", tmp_path / "file" / "run", digits)
    ((code, words),) = start({1: path}, tmp_path)
    assert code == 10
    assert f"rank 1 on {CULPRIT} sees no run directory" in words
