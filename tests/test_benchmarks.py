"""The benchmarks run and print their tables; no test looks at a time."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_step_benchmark_compares_the_same_step_of_all_contenders() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "step.py"), "--case", "demo", "--rounds", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for contender in ("ours", "timm", "engine"):
        assert contender in done.stdout
    assert "share of peak" in done.stdout


def test_the_augmentation_benchmark_runs_every_policy() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "augment.py"), "--size", "32", "--images", "16", "--rounds", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for policy in ("randaugment_timm", "randaugment_bv", "three_augment", "color_jitter", "random_erasing"):
        assert policy in done.stdout


def test_the_benchmark_of_the_shard_tools_prints_all_of_them() -> None:
    arguments = ("--images", "16", "--rounds", "1", "--workers", "1")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "shards.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for command in ("pack", "pack --longest-side 256", "index --verify", "verify", "verify --fast"):
        assert f"│ {command} " in done.stdout


def test_the_order_benchmark_seeks_on_one_rank_and_on_many() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "order.py"), "--shards", "40", "--rounds", "1", "--step", "1000"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "400,000 samples in 40 shards" in done.stdout
    for row in ("one rank of 4,096", "a lone rank, all lanes", "two sources 3 : 1"):
        assert row in done.stdout
