"""Shard tools over several processes: killed at any moment and started again, a full disk, a worker that dies."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from jobs import bug, die, square
from made import picture, sample_members, write_tar
from patience import PATIENCE, lives, wait_until
from test_sources import hugging_face
from typed import contents, done, image_folder, refused, samples

from pretrain.data import open_dataset, pool
from pretrain.errors import DataError

PROGRAM = (sys.executable, "-m", "pretrain", "shards")
HELD = """
import runpy, sys, time
from pathlib import Path
from pretrain.data import pool

run, left, go = pool.run, int(sys.argv.pop(1)), Path(sys.argv.pop(1))

def held(*given):
    global left
    for outcome in run(*given):
        yield outcome
        left -= 1
        while left == 0 and not go.exists():
            time.sleep(0.01)

pool.run = held
runpy.run_module("pretrain", run_name="__main__", alter_sys=True)
"""
"""`python -m pretrain`, which takes in so many outcomes of its workers, and no more before a file is there."""


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return popen([*PROGRAM, *map(str, arguments)], **options)


def popen(command: list[str], **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_held(outcomes: int, go: Path, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A command with two workers that is not over before it is let: see `HELD`."""
    words = [str(outcomes), str(go), "shards", *map(str, arguments), "--workers", "2"]
    return popen([sys.executable, "-c", HELD, *words], **options)


def start_and_kill(folder: Path, pattern: str, more: int, *arguments: object) -> None:
    """Start two workers, SIGKILL the command once `folder` has some more files; none of its workers outlives it."""
    wanted = count(folder, pattern) + more
    process = start_held(wanted, Path("/nowhere/go"), *arguments)
    wait_for(process, lambda: count(folder, pattern) >= wanted)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(workers) >= 2
    wait_until(lambda: not any(map(lives, workers)))


def wait_for(process: subprocess.Popen[str], holds: Callable[[], object]) -> None:
    """Until something is so, which a process is to bring about."""
    wait_until(lambda: process.poll() is not None or holds())
    assert process.poll() is None, process.communicate()


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def test_a_killed_pack_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path):
    source, out = image_folder(tmp_path / "images", per_class=200), tmp_path / "out"
    command = ("pack", source, out, "--shards", 12, "--val-share", 0.2, "--longest-side", 5)
    work = tmp_path / ".out.partial"
    start_and_kill(work / "notes", "*.json", 6, *command)
    assert not out.exists()
    finished = sorted((work / "shards").glob("*/*.tar"))
    assert 5 < len(finished) < 24
    untouched = finished[0].stat().st_mtime_ns
    damaged = finished[1].read_bytes()
    finished[1].write_bytes(damaged[:600] + b"?" + damaged[601:])
    (work / "shards" / "train" / "train-999999.tar").write_bytes(b"of another attempt")

    start_and_kill(work / "notes", "*.json", 3, *command)
    assert finished[0].stat().st_mtime_ns == untouched
    result = done(*command, "--workers", 2)
    assert (
        "shards were there from an attempt that had ended early; they were checked and kept" in result.output
    )
    done("pack", source, tmp_path / "at_once", *command[3:])
    assert contents(out) == contents(tmp_path / "at_once")
    assert not list(tmp_path.glob(".*"))


def test_an_attempt_with_other_options_keeps_nothing(tmp_path):
    source, out = image_folder(tmp_path / "images", per_class=100), tmp_path / "out"
    start_and_kill(tmp_path / ".out.partial" / "notes", "*.json", 4, "pack", source, out, "--shards", 16)
    (source / "ant" / "0.png").write_bytes(picture(77, 6, 6))
    result = done("pack", source, out, "--shards", 16, "--seed", 1)
    assert "checked and kept" not in result.output
    done("pack", source, tmp_path / "other", "--shards", 16, "--seed", 1)
    assert contents(out) == contents(tmp_path / "other")


def test_a_killed_pack_of_parquet_goes_on(tmp_path):
    folder, out = tmp_path / "hub", tmp_path / "out"
    for i in range(24):
        hugging_face(folder / f"part-{i}.parquet", [j % 3 for j in range(50)], first=50 * i)
    unpacked = tmp_path / ".out.partial" / "unpacked"
    start_and_kill(unpacked, "*.npy", 2, "pack", folder, out)
    kept = {path.name: path.stat().st_mtime_ns for path in unpacked.glob("*.npy")}
    start_and_kill(unpacked, "*.npy", 2, "pack", folder, out)
    assert {name: (unpacked / name).stat().st_mtime_ns for name in kept} == kept
    done("pack", folder, out, "--workers", 2)
    done("pack", folder, tmp_path / "at_once", "--workers", 1)
    assert contents(out) == contents(tmp_path / "at_once")
    assert len(samples(out / "train")) == 1200


def test_a_killed_index_goes_on_and_reads_finished_tars_no_more(tmp_path):
    folder = tmp_path / "tars"
    members = [m for i in range(80) for m in sample_members(f"k{i}", i)]
    write_tar(folder / "000.tar", members)
    for i in range(1, 30):
        shutil.copy(folder / "000.tar", folder / f"{i:03d}.tar")
    time.sleep(0.02)  # an index of the same tick of the clock is not trusted
    start_and_kill(folder, "*.idx", 6, "index", folder)
    assert not (folder / "manifest.json").exists()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.idx")}
    assert 6 <= len(written) < 30
    done("index", folder, "--workers", 2)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(open_dataset(str(folder))) == 30 * 80
    before = contents(folder)
    done("index", folder, "--verify")
    assert {path: path.stat().st_mtime_ns for path in written} != written
    assert contents(folder) == before


def test_a_tar_that_changed_is_read_again(tmp_path):
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    done("index", tmp_path)
    write_tar(tmp_path / "a.tar", sample_members("x", 5))  # the same size
    done("index", tmp_path)
    assert open_dataset(str(tmp_path)).labels == (5, 5)
    write_tar(tmp_path / "b.tar", sample_members("y", 0))
    done("index", tmp_path)
    assert open_dataset(str(tmp_path)).labels == (0, 5)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_tars_are_named_and_the_others_indexed(tmp_path, workers):
    for name in "abcde":
        write_tar(tmp_path / f"{name}.tar", sample_members("x", 1))
    for name in "bd":
        (tmp_path / f"{name}.tar").write_bytes(b"no tar" * 200)
    refused(
        r"2 of 5 tars cannot be indexed\n.*b\.tar: (.|\n)*d\.tar: ", "index", tmp_path, "--workers", workers
    )
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == ["a.tar.idx", "c.tar.idx", "e.tar.idx"]
    assert not (tmp_path / "manifest.json").exists()
    process = start("index", tmp_path)
    _, words = process.communicate()
    assert process.returncode == DataError.exit_code
    assert "Traceback" not in words


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, workers, digits_source, digits):
    done("pack", digits_source, tmp_path / "out", "--val-share", 0.2, "--shards", 5, "--workers", workers)
    assert contents(tmp_path / "out") == contents(digits)


def test_two_packs_to_one_place_do_not_meet(tmp_path):
    source, out = image_folder(tmp_path / "images", per_class=300), tmp_path / "out"
    process = start_held(1, tmp_path / "go", "pack", source, out, "--shards", 40)
    wait_for(process, lambda: count(tmp_path / ".out.partial" / "notes", "*.json"))
    refused("another process is packing", "pack", source, out)
    (tmp_path / "go").touch()
    _, words = process.communicate()
    assert process.returncode == 0, words
    assert len(samples(out / "train")) == 900


def test_ctrl_c_ends_a_pack_at_once_and_keeps_what_is_finished(tmp_path):
    source, out = image_folder(tmp_path / "images", per_class=500), tmp_path / "out"
    notes = tmp_path / ".out.partial" / "notes"
    process = start_held(1, tmp_path / "go", "pack", source, out, "--shards", 100, start_new_session=True)
    wait_for(process, lambda: count(notes, "*.json"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    _, words = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in words
    assert count(notes, "*.json")


# --- a disk that is full or read-only


def limited(number_of_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (number_of_bytes, number_of_bytes))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_error_and_leaves_what_was_there(tmp_path, workers):
    source, out = image_folder(tmp_path / "images", per_class=40), tmp_path / "out"
    done("pack", source, out, "--shards", 1)
    before = contents(out)
    command = ("pack", source, out, "--shards", 2, "--overwrite", "--workers", workers)
    process = start(*command, preexec_fn=limited(20_000))
    _, words = process.communicate()
    assert process.returncode == DataError.exit_code
    assert "packing stopped, nothing was changed: [Errno 27] File too large" in words
    assert "Traceback" not in words
    assert contents(out) == before
    assert not list(tmp_path.rglob("*.tar.partial"))
    done(*command)
    assert len(samples(out / "train")) == 120


def test_a_full_disk_while_indexing_names_the_tar(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [m for i in range(50) for m in sample_members(f"k{i}", i)])
    process = start("index", tmp_path, preexec_fn=limited(100))
    _, words = process.communicate()
    assert process.returncode == DataError.exit_code
    assert f"{tar}: cannot be indexed: [Errno 27] File too large" in words


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_read_only_folder_is_named(tmp_path):
    """Without capabilities, root too may not write where nobody may."""
    source, shelf = image_folder(tmp_path / "images"), tmp_path / "shelf"
    done("pack", source, shelf / "shards")
    (shelf / "shards" / "train" / "train-000000.tar.idx").unlink()
    for folder in (shelf, shelf / "shards" / "train"):
        folder.chmod(0o555)
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    for command, message in (
        (
            ("pack", source, shelf / "new"),
            "packing stopped, nothing was changed: [Errno 13] Permission denied",
        ),
        (("index", shelf / "shards" / "train"), "cannot be indexed: [Errno 13] Permission denied"),
    ):
        result = subprocess.run([*drop, *PROGRAM, *map(str, command)], capture_output=True, text=True)
        assert (result.returncode, message in result.stderr) == (DataError.exit_code, True), result.stderr
        assert "Traceback" not in result.stderr
    shelf.chmod(0o755)
    (shelf / "shards" / "train").chmod(0o755)


# --- the pool


def test_workers_are_started_where_there_is_work_for_them():
    assert [pool.worth_starting(8, images, 0) for images in (0, 900, 1500, 10**6)] == [1, 1, 3, 8]
    assert [pool.worth_starting(8, 10, mib * 2**20) for mib in (10, 70, 10**4)] == [1, 2, 8]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_has_its_outcome_and_its_progress(workers):
    told: list[int] = []
    outcomes = {o.number: o for o in pool.run(square, range(20), workers, told.append)}
    assert sum(told) == sum(range(20))
    assert sorted(outcomes) == list(range(20))
    with pytest.raises(DataError, match="seven is bad"):
        outcomes.pop(7).result()
    assert all(outcome.result() == number**2 for number, outcome in outcomes.items())


def test_a_worker_that_is_killed_is_named_with_its_job():
    with pytest.raises(DataError, match=r"was killed by SIGKILL at job 3 of 8 \(2\)\n.*memory"):
        list(pool.run(die, range(8), 2))


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError) as raised:
        list(pool.run(bug, range(4), 2))
    assert "in a worker process:\nTraceback" in raised.value.__notes__[0]
    assert "in bug" in raised.value.__notes__[0]


def test_the_first_process_is_deaf_from_birth_too(monkeypatch):
    """With the first one multiprocessing starts its tracker, which takes the hold on SIGINT and SIGTERM away."""
    tracker = resource_tracker._resource_tracker
    monkeypatch.setattr(tracker, "_fd", None)  # as where none was started yet
    monkeypatch.setattr(tracker, "_pid", None)
    with pool.held_back(signal.SIGINT, signal.SIGTERM):
        resource_tracker.ensure_running()  # what the start of a process begins with
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGINT, signal.SIGTERM}
    os.close(tracker._fd)
    os.waitpid(tracker._pid, 0)


def test_workers_end_when_nobody_listens_any_more():
    others = multiprocessing.active_children()
    outcomes = pool.run(square, range(1000), 2)
    next(outcomes)
    workers = [worker for worker in multiprocessing.active_children() if worker not in others]
    assert len(workers) == 2
    outcomes.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_of_the_tools_import_nothing_heavy():
    program = (
        "import sys, json; import pretrain.data.pack.write, pretrain.data.verify, pretrain.data.repair, "
        "pretrain.data.stats, pretrain.data.scan; "
        "print(json.dumps([m for m in ('torch', 'webdataset', 'pyarrow', 'matplotlib') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
