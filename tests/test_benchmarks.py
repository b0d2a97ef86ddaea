"""The benchmarks run and print their tables; no test looks at a time."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_the_step_benchmark_compares_the_same_step_of_all_contenders() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "step.py"), "--case", "demo", "--rounds", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for contender in ("ours", "timm", "transformers", "engine"):
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


def test_the_checkpoint_benchmark_saves_and_loads() -> None:
    arguments = ("--size", "Ti", "--worlds", "2", "--stages", "3")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "checkpoint.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ 2 +│ 3 +│ \d", done.stdout), done.stdout


def tiny_shard(folder: Path) -> None:
    """128 samples of one small picture."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number in range(128):
            for suffix, data in (("png", content), ("cls", b"1")):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_the_benchmark_of_workers_measures_threads_and_processes(tmp_path: Path) -> None:
    tiny_shard(tmp_path)
    arguments = (str(tmp_path), "--rounds", "1", "--steps", "1", "--size", "32", "--threads", "1")
    done = subprocess.run(
        [sys.executable, str(FOLDER / "workers.py"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"│ (threads|processes) +│ 1 ", done.stdout) == ["threads", "processes"]


def test_the_benchmark_of_stores_reads_each_byte_once(tmp_path: Path) -> None:
    tiny_shard(tmp_path)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "stores.py"), str(tmp_path), "--rounds", "1", "--block-mib", "0.02"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cache, filled +[\d,]+ +[\d.]+ +0\.00000 +0\.000$", done.stdout, re.MULTILINE), (
        done.stdout
    )
