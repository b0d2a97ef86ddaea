"""A process of its own for the decode threads: the same batches, and it ends as it should, whoever dies."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import store_server as faults
import torch
from made import picture, sample_members, setting, write_tar
from patience import PATIENCE, wait_until
from store_server import StoreServer, serving

from pretrain.batch import Batch
from pretrain.data import Dataset, open_dataset, store
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.processes import shared_out
from pretrain.data.scan import index_folder
from pretrain.data.skipped import NOTHING
from pretrain.errors import DataError


def train_loader(dataset: Dataset, rank: int = 0, world_size: int = 1, **options: object) -> TrainLoader:
    made = setting(dataset, world_size, **({"workers": "processes", "decode_threads": 2} | options))
    return TrainLoader(dataset, made.config.data, made.config.model, made.plan, seed=5, rank=rank)


def assert_same(ours: Batch, theirs: Batch) -> None:
    for name in ("images", "labels", "weights", "positions"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("world_size", [1, 5])
def test_a_process_gives_the_batches_that_threads_give(train_set, world_size):
    """40 rows a rank: jobs of 16 and a rest; with 5 ranks, padding too; a policy of augmentation travels along."""
    augment = {"randaugment_timm": {}, "random_erasing": {"prob": 0.5}} if world_size == 1 else {}
    options = {"batch": 41 * world_size - 1, "micro_batch": 21, "in_chans": 3, "augment": augment}
    rank = world_size - 1
    with (
        train_loader(train_set, rank, world_size, **options) as ours,
        train_loader(train_set, rank, world_size, **options, workers="threads") as theirs,
    ):
        for mine, expected in islice(zip(ours.steps(3), theirs.steps(3), strict=True), 8):
            for pair in zip(mine, expected, strict=True):
                assert_same(*pair)
        assert ours.wait_seconds > 0


def test_evaluation_may_run_in_a_process_again_and_again(val_set):
    made = setting(val_set, workers="processes", decode_threads=2, micro_batch=5)
    with EvalLoader(val_set, made.config.data, made.config.model, made.plan, rank=0) as loader:
        first, second = list(loader), list(loader)
    for pair in zip(first, second, strict=True):
        assert_same(*pair)
    assert sum(float(batch.weights.sum()) for batch in first) == len(val_set)


def two_samples(folder: Path, second: bytes) -> Dataset:
    write_tar(folder / "a.tar", sample_members("x", 0) + sample_members("y", 1, second))
    index_folder(folder)
    return open_dataset(str(folder))


def test_bytes_that_changed_come_back_as_the_error_that_threads_would_raise(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[600] ^= 1
        tar.write_bytes(content)
    with (
        train_loader(dataset) as loader,
        pytest.raises(DataError, match=r"sample 0: its bytes are not those"),
    ):
        list(islice(loader.steps(0), 30))
    assert not multiprocessing.active_children()


def test_a_bug_comes_back_with_its_traceback(train_set):
    made = setting(train_set, workers="processes", decode_threads=1, img_size=(16, 16))
    broken = made.config.data.model_copy(update={"interpolation": "no such kernel"})
    with (
        EvalLoader(train_set, broken, made.config.model, made.plan, rank=0) as loader,
        pytest.raises(RuntimeError, match=r"in a process that decodes:\n(.*\n)+KeyError: 'no such kernel'"),
    ):
        next(iter(loader))


def test_one_killed_process_of_several_is_an_error_that_says_so_and_nobody_hangs(train_set):
    with train_loader(train_set, augment={"random_erasing": {}}) as loader:
        steps = loader.steps(0)
        next(steps)
        first, _ = multiprocessing.active_children()
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="ended with code -9"):
            list(islice(steps, 200))
        with pytest.raises(DataError, match="ended with code -9"):
            next(loader.steps(0))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("threads", "most", "shares"),
    [(1, 8, [1]), (8, 8, [8]), (9, 8, [5, 4]), (3, 1, [1, 1, 1]), (20, 8, [7, 7, 6])],
)
def test_threads_are_shared_out_evenly(threads, most, shares):
    assert shared_out(threads, most) == shares


def block_requests(server: StoreServer) -> Counter[tuple[str, str | None]]:
    return Counter((r.path, r.range) for r in server.requests if r.path.endswith(".tar"))


def test_processes_read_a_store_once_and_ahead_and_hear_of_its_failures(copied, train_set, monkeypatch):
    """One reader for all of them: no block is fetched twice, and those of coming steps before they are due."""
    folder = copied()
    options = {"augment": {"random_erasing": {}}, "batch": 4, "prefetch_steps": 1}
    with serving(folder) as server:
        remote = open_dataset(server.url)
        with (
            train_loader(remote, **options) as ours,
            train_loader(train_set, **options, workers="threads") as theirs,
        ):
            steps, expected = ours.steps(0), theirs.steps(0)
            assert_same(next(steps)[0], next(expected)[0])
            # two steps are under way, of four samples each
            wait_until(lambda: len(block_requests(server)) > 8)
            for mine, other in islice(zip(steps, expected, strict=True), 20):
                assert_same(mine[0], other[0])
            assert set(block_requests(server).values()) == {1}
            assert len(multiprocessing.active_children()) == 2
            server.always(faults.unavailable, ".tar")
            monkeypatch.setattr(store, "pause_after", lambda *_: 1e9)
            with pytest.raises(DataError, match=r"\.tar: not read within \d+ seconds"):
                list(islice(steps, 100))
    assert not multiprocessing.active_children()


def test_closing_ends_processes_that_wait_for_a_store(copied):
    with serving(copied()) as server:
        remote = open_dataset(server.url)
        server.always(faults.unavailable, ".tar")
        loader = train_loader(remote, read_timeout_seconds=10 * PATIENCE)
        jobs = loader._start(*next(loader._requests(0, NOTHING))[0])
        wait_until(lambda: block_requests(server))
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < PATIENCE
        assert all(isinstance(job.exception(), DataError) for job in jobs.jobs)


def test_processes_that_wait_for_a_store_and_die_are_an_error_and_the_parent_goes_on(copied):
    """One of two is killed while its parent reads for it; then the pipe of the reader breaks for the only one there is."""
    with serving(copied()) as server:
        remote = open_dataset(server.url)
        server.always(faults.unavailable, ".tar")
        for end, code in (("killed", -9), ("cut off", 1)):
            augment = {"random_erasing": {}} if end == "killed" else {}
            loader = train_loader(remote, augment=augment, read_timeout_seconds=10 * PATIENCE)
            jobs = loader._start(*next(loader._requests(0, NOTHING))[0])
            server.requests.clear()
            wait_until(lambda: block_requests(server))
            child, *others = loader._workers._children
            assert len(others) == (end == "killed")
            if end == "killed":
                child.process.kill()
            else:
                with socket.socket(fileno=os.dup(child.asks.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)
            for job in jobs.jobs:
                assert f"a process that decodes ended with code {code}" in str(job.exception(PATIENCE))
            loader.close()
            assert not multiprocessing.active_children()


def test_signals_that_reach_the_whole_group_are_left_to_the_parent(train_set):
    with train_loader(train_set) as loader:
        steps = loader.steps(0)
        next(steps)
        [child] = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(child.pid, number)
        time.sleep(0.2)
        assert len(list(islice(steps, 10))) == 10
    assert not multiprocessing.active_children()


SCRIPT = """
import multiprocessing, sys, time
from pretrain.config import Config, resolve
from pretrain.config.plan import Hardware
from pretrain.data import facts, open_dataset
from pretrain.data.loader import TrainLoader

if __name__ == "__main__":
    dataset = open_dataset(sys.argv[1])
    config = Config.model_validate({
        "run": {"dir": "unused"},
        "data": {"train": {"shards": sys.argv[1]}, "workers": "processes", "decode_threads": 2, "augment": {"random_erasing": {}}},
        "model": {"size": "Ti", "img_size": (8, 8), "patch_size": (4, 4), "num_classes": 10, "in_chans": 1},
        "optim": {"lr": 1e-3}, "train": {"global_batch": 12, "total_steps": 100},
    })
    plan = resolve(config, 1, facts(dataset, None), Hardware("cpu", "test", False))
    loader = TrainLoader(dataset, config.data, config.model, plan, seed=0, rank=0)
    next(loader.steps(0))
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
"""


@pytest.mark.parametrize("end", ["killed", "returns"])
def test_the_processes_are_gone_when_its_parent_is(tmp_path, train_set, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(script), train_set.source, "wait" if end == "killed" else "return"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        children = list(map(int, parent.stdout.readline().split()))
        if end == "killed":
            parent.kill()
        assert parent.wait(PATIENCE) == (-signal.SIGKILL if end == "killed" else 0)
    assert len(children) == 2
    wait_until(lambda: all(map(gone, children)))


def gone(pid: int) -> bool:
    """A zombie that nobody has waited for is gone too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_picture_that_cannot_be_read_names_shard_and_key(tmp_path):
    dataset = two_samples(tmp_path, picture(0)[:50])
    with (
        train_loader(dataset, batch=4, max_bad_share=0.0) as loader,
        pytest.raises(DataError, match=r"a\.tar, sample 1 \(y\): not decodable"),
    ):
        list(islice(loader.steps(0), 3))
