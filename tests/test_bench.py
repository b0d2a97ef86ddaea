"""`pretrain bench data` runs on real shards and prints its tables; no test looks at a time."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from patience import PATIENCE, lives, wait_until
from PIL import Image
from sklearn.datasets import load_sample_image

from pretrain.bench import contenders
from pretrain.bench.contenders import (
    CONTENDERS,
    LOCK,
    OURS,
    OURS_FLOAT,
    PACED,
    STAGES,
    TWICE,
    Setting,
    chosen,
)
from pretrain.bench.guard import Guard
from pretrain.bench.report import show
from pretrain.bench.rounds import Measured, _Process, interleaved
from pretrain.data.decode import decoder
from pretrain.data.pack import ShardSize, open_source, pack
from pretrain.errors import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """48 crops of a photograph as JPEG, in two shards."""
    folder = tmp_path_factory.mktemp("photos")
    photo, generator = load_sample_image("flower.jpg"), np.random.default_rng(0)
    for number in range(48):
        top, left = generator.integers(0, 300), generator.integers(0, 500)
        path = folder / "images" / str(number % 3) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with io.BytesIO() as file:
            Image.fromarray(photo[top : top + 120, left : left + 140]).save(file, "JPEG", quality=90)
            path.write_bytes(file.getvalue())
    pack(open_source(folder / "images"), folder / "shards", val_share=0, size=ShardSize(2, 0), seed=0)
    return folder / "shards" / "train"


def bench(shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain", "bench", "data", str(shards), "--size", "32", "--batch", "16", *arguments],
        capture_output=True,
        text=True,
    )  # fmt: skip


def test_the_pipeline_its_stages_and_its_cores_are_printed(shards):
    done = bench(shards, "--rounds", "1", "--images", "32", "--rate", "1e6", "--only", OURS, "--only", STAGES)
    assert done.returncode == 0, done.stderr
    for words in ("uint8, 32 px", "where it goes", "read", "decode", "augment", "JPEG decode alone"):
        assert words in done.stdout
    assert re.search(r"1,000,000 images/s need [\d.]+ cores", done.stdout)


@pytest.mark.slow
def test_everybody_who_is_installed_takes_part(shards):
    done = bench(shards, "--rounds", "1", "--images", "32")
    assert done.returncode == 0, done.stderr
    assert "did not run" not in done.stderr
    for name in chosen(True, (), 1, len(os.sched_getaffinity(0))):
        assert name in (STAGES, LOCK, TWICE, PACED) or name in done.stdout


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    """There is no such data set: the pipeline cannot start, in its own process."""
    setting = Setting((), str(tmp_path / "gone"), 32, 16, 1, 16, str(tmp_path))
    assert interleaved([STAGES], setting, 1) == {}
    assert "stages did not run: " in capsys.readouterr().err


def test_a_contender_that_does_not_answer_is_named_and_the_benchmark_ends(tmp_path, capsys):
    setting = Setting((), str(tmp_path / "gone"), 32, 16, 1, 16, str(tmp_path))
    assert interleaved([OURS], setting, 1, seconds=1e-3) == {}
    assert "ours did not run: no answer within 0.001 s" in capsys.readouterr().err


def test_a_contender_that_is_killed_is_told_from_one_that_failed(tmp_path):
    setting = Setting((), str(tmp_path / "gone"), 32, 16, 1, 16, str(tmp_path))
    with Guard() as guard, _Process(OURS, setting, guard) as process:
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises((OSError, ValueError)) as failed:
            process.take_turn(PATIENCE)
        assert "killed by SIGKILL" in process.what_ended(failed.value)


def is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def test_no_contender_outlives_a_benchmark_that_is_killed(shards):
    """One of them has a process of its own, and both are stopped but for their turns."""
    command = [
        "bench",
        "data",
        str(shards),
        "--size",
        "32",
        "--batch",
        "16",
        "--rounds",
        "100000",
        "--images",
        "16",
    ]
    only = ["--only", OURS, "--only", "ours, processes"]
    with subprocess.Popen(
        [sys.executable, "-m", "pretrain", *command, *only], stderr=subprocess.PIPE
    ) as running:
        here = psutil.Process(running.pid)
        while running.poll() is None:
            below = here.children(recursive=True)
            if len(below) >= 4 and any(map(is_stopped, below)):
                break  # the guard, two contenders, and what one of them has started
            time.sleep(0.05)
        running.kill()
    assert len(below) >= 4
    wait_until(lambda: not any(map(lives, below)))


def test_wrong_use_is_refused_before_anything_starts(shards):
    assert "there is no such contender" in bench(shards, "--only", "pytorch").stderr
    assert "use at most that many" in bench(shards, "--cores", "4096").stderr
    with pytest.raises(ConfigError):
        chosen(True, ("nobody",), 1, 1)


def test_who_needs_more_cores_than_there_are_or_what_is_not_installed_stays_out(monkeypatch):
    assert TWICE not in chosen(True, (), 1, 1)
    assert TWICE in chosen(True, (), 1, 2)
    assert PACED not in chosen(True, (), 1, 2)
    assert PACED in chosen(True, (), 1, 2, paced=True)
    assert not [name for name in chosen(False, (), 1, 2) if CONTENDERS[name].target.startswith("peers:")]
    monkeypatch.setitem(CONTENDERS, OURS, CONTENDERS[OURS]._replace(needs=("no_such_package.inside",)))
    assert OURS not in chosen(True, (), 1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((True, (PACED,), 1, 2, False), "--only 'paced' cannot take part: it needs --pace"),
        ((True, (OURS,), 1, 2, True), "--pace measures the contender 'paced', which --only leaves out: add --only paced"),
        ((True, (), 2, 3, True), "--pace needs 4 cores, 2 for data and as many for the step loop; there are 3"),
        ((True, (OURS, TWICE), 2, 3, False), f"--only '{TWICE}' cannot take part: it needs 4 cores of the 3 that there are"),
        ((False, ("timm's reader",), 1, 1, False), "cannot take part: it needs --peers"),
        ((True, ("DALI",), 1, 1, False), "--only 'DALI' cannot take part: it needs nvidia.dali installed"),
    ],
)  # fmt: skip
def test_who_was_asked_for_and_cannot_take_part_is_told_what_is_missing(monkeypatch, arguments, words):
    monkeypatch.setattr(contenders, "_is_installed", lambda package: package != "nvidia.dali")
    *given, paced = arguments
    with pytest.raises(ConfigError) as refused:
        chosen(*given, paced=paced)
    assert words in str(refused.value)


def test_a_pace_without_room_for_its_loop_ends_with_an_error_and_no_traceback(shards):
    done = bench(shards, "--pace", "100", "--cores", str(len(os.sched_getaffinity(0))))
    assert done.returncode == ConfigError.exit_code
    assert "choose fewer --cores" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tables_pair_rounds_and_say_how_many_cores_feed_a_rate(capsys):
    """Made-up rounds: ours 1 and 2 ms, the others twice that in their own round."""
    parts = {"order": 0.0, "read": 0.1, "decode": 0.5, "augment": 0.2, "limit": 0.4, "kernel": 0.5}
    measured = {
        OURS: [Measured(1000, 1.0, 1.0, {}), Measured(1000, 2.0, 2.0, {})],
        OURS_FLOAT: [Measured(1000, 1.5, 1.5, {}), Measured(1000, 3.0, 3.0, {})],
        TWICE: [Measured(1000, 1.0, 0.5, {}), Measured(1000, 2.0, 1.0, {})],
        STAGES: [Measured(1000, 1.0, 1.0, parts)] * 2,
        PACED: [Measured(1000, 1.0, 1.0, {"waiting": waiting, "all": 2.0}) for waiting in (0.01, 0.03)],
        LOCK: [Measured(1000, 1.0, 1.0, {"threads": 0.05, "processes": 0.01})] * 2,
        "DALI": [Measured(1000, 2.0, 1.0, {}), Measured(1000, 4.0, 2.0, {})],
        "DALI, normalised": [Measured(1000, 3.0, 1.0, {}), Measured(1000, 6.0, 2.0, {})],
    }
    show(measured, Setting((), "x", 224, 64, 1, 1000, "", pace=500), rate=2000)
    printed = capsys.readouterr().out
    assert re.search(r"DALI +│ 3\.000 +│ [\d,]+ +│ 2\.00 \(2\.00 \.\. 2\.00\)", printed)
    assert re.search(r"DALI, normalised .* 2\.00 \(2\.00 \.\. 2\.00\) +│ 3\.00 \(3\.00 \.\. 3\.00\)", printed)
    assert "twice the cores: 2.00x" in printed
    assert "held for at most 0.300 ms" in printed
    assert "data.workers=threads: a loop in Python waits 0.050 ms" in printed
    assert "10.0 % of its time at 2,000 images/s" in printed
    assert "2,000 images/s need 3.0 cores for data: 3" in printed
    assert "a step loop at 500 images/s, with 1 core(s) for data beside its own" in printed
    assert "1.00 % of its time (0.50 .. 1.50)" in printed
    assert decoder() in printed
