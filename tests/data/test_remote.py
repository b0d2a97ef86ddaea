"""Data sets in a store: the samples of the local ones, about one request a block, one download a node."""

import errno
import fcntl
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import store_server as faults
import tiny
import torch
from made import setting
from patience import PATIENCE, wait_until
from ranks import launch
from store_server import StoreServer, serving
from test_resume import config

from launch.preflight import _see_shards
from pretrain.config import DataConfig, dump
from pretrain.config.idle import idle_settings
from pretrain.data import Dataset, open_dataset, store
from pretrain.data.blocks import Blocks
from pretrain.data.cache import NodeCache
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.order import Order
from pretrain.data.read import LocalReader
from pretrain.data.reader import announced, blocks_in_use, open_reader, reading, shares
from pretrain.data.remote import RemoteReader
from pretrain.errors import CacheInUseError, DataError, PeerError

BLOCK = 7
"""Samples of a block in these tests."""


@pytest.fixture
def server(copied) -> Iterator[StoreServer]:
    with serving(copied()) as server:
        yield server


@pytest.fixture
def remote(server) -> Dataset:
    return open_dataset(server.url)


def data_config(**settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"train": {"shards": "unused"}, "read_timeout_seconds": PATIENCE, **settings}
    )


def read(dataset: Dataset, numbers: np.ndarray, **settings: object) -> list[tuple[str, bytes, int]]:
    reader = RemoteReader(dataset, data_config(**settings), BLOCK, blocks_in_use=1000)
    try:
        return plain(reader.read(*dataset.locate(numbers)))
    finally:
        reader.close()


def plain(samples) -> list[tuple[str, bytes, int]]:
    return [(sample.key, bytes(sample.image), sample.label) for sample in samples]


def blocks_of(dataset: Dataset) -> int:
    return sum(-(-shard.samples // BLOCK) for shard in dataset.shards)


@pytest.fixture
def whole(train_set) -> list[tuple[str, bytes, int]]:
    return plain(LocalReader(train_set, BLOCK).read(*train_set.locate(np.arange(len(train_set)))))


def tars(server: StoreServer) -> Counter[tuple[str, str | None]]:
    """Requests for tars, by path and range."""
    return Counter((r.path, r.range) for r in server.requests if r.path.endswith(".tar"))


def test_opening_reads_the_manifest_and_nothing_else(server, remote, train_set):
    assert [request.path for request in server.requests] == ["/manifest.json"]
    assert (remote.digest, len(remote)) == (train_set.digest, len(train_set))
    pattern = open_dataset(f"{server.url}/train-{{000000..000004}}.tar")
    assert (pattern.digest, pattern.paths) == (remote.digest, remote.paths)
    assert open_dataset(f"{server.url}/").paths == remote.paths


@pytest.mark.parametrize("cached", [False, True])
def test_the_samples_are_those_of_the_local_shards_and_each_block_is_one_request(
    server, remote, whole, cached, tmp_path
):
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1.0} if cached else {}
    numbers = np.random.default_rng(0).permutation(len(remote))
    assert read(remote, numbers, **settings) == [whole[n] for n in numbers]
    assert set(tars(server).values()) == {1}
    assert len(tars(server)) == blocks_of(remote)
    assert len(server.requests) == 1 + len(remote.shards) + blocks_of(remote)
    if cached:
        before = len(server.requests)
        assert read(remote, numbers[::-1], **settings) == [whole[n] for n in numbers[::-1]]
        assert len(server.requests) == before


def test_shards_in_a_store_and_on_a_disk_make_one_data_set(server, digits):
    both = open_dataset(f"{server.url}/train-000001.tar::{digits}/train/train-000000.tar")
    local = open_dataset(f"{digits}/train/train-00000{{1,0}}.tar")
    numbers = np.random.default_rng(1).permutation(len(local))
    assert both.digest == local.digest
    assert read(both, numbers) == plain(LocalReader(local, BLOCK).read(*local.locate(numbers)))


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_and_evaluation_see_the_batches_of_the_local_data_set(server, remote, train_set, world_size):
    def batches(dataset: Dataset) -> list[torch.Tensor]:
        made = setting(dataset, world_size, decode_threads=2)
        found = []
        for rank in range(world_size):
            train = TrainLoader(dataset, made.config.data, made.config.model, made.plan, seed=5, rank=rank)
            evaluation = EvalLoader(dataset, made.config.data, made.config.model, made.plan, rank=rank)
            with train, evaluation:
                steps = train.steps(3)
                found += [batch.images.clone() for _ in range(25) for batch in next(steps)]
                found += [batch.images.clone() for batch in evaluation]
        return found

    ours, theirs = batches(remote), batches(train_set)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("lanes", "world_size"), [(2, 1), (4, 2), (12, 12)])
def test_a_rank_asks_for_each_block_of_an_epoch_once_and_twice_where_a_lane_ends(
    server, remote, lanes, world_size
):
    """Held to the memory that the plan states, with all that is announced and read in the order of an epoch."""
    made = setting(remote, world_size, batch=12, lanes=lanes)
    plan = made.plan
    order = Order(
        remote.shard_samples, seed=5, global_batch=12, lanes=lanes,
        block_samples=plan.block_samples, window_blocks=plan.window_blocks,
    )  # fmt: skip
    for rank in range(world_size):
        reader = open_reader(
            remote, made.config.data, plan.block_samples, blocks_in_use(plan, made.config.data)
        )
        steps = (order.rows(step, *plan.slice_of(rank)) for step in range(len(remote) // 12))
        for rows in announced(steps, lambda rows: (rows.shard, rows.sample), reader):
            reader.read(rows.shard, rows.sample)
        reader.close()
    blocks = sum(-(-shard.samples // plan.block_samples) for shard in remote.shards)
    assert blocks - 1 <= sum(tars(server).values()) <= blocks + lanes - 1  # the last step may be cut off


class Counted(RemoteReader):
    """A reader of blocks that are nothing but counted, held to what the plan states."""

    def __init__(self, limit: int, room: int, block_samples: int) -> None:
        self.fetched: list[tuple[int, int]] = []
        self.room, self.block_samples = room, block_samples
        self.blocks = self._blocks = Blocks(self.fetch, lambda key: 1, limit, threads=1)

    def fetch(self, key: tuple[int, int]) -> None:
        self.fetched.append(key)

    def keys(self, shards: np.ndarray, samples: np.ndarray) -> list[tuple[int, int]]:
        return list(
            dict.fromkeys(zip(shards.tolist(), (samples // self.block_samples).tolist(), strict=True))
        )

    def announce(self, *places: np.ndarray) -> None:
        for key in self.keys(*places):
            self.blocks.announce(key)

    def has_room(self, *places: np.ndarray) -> bool:
        return self.blocks.ahead + self.blocks.missing(self.keys(*places)) <= self.room


@pytest.mark.parametrize(
    ("batch", "lanes", "world_size", "repeats"),
    [(96, 16, 4, 1), (256, 64, 8, 1), (1024, 256, 32, 1), (96, 16, 4, 3), (64, 8, 3, 2)],
)
def test_reading_ahead_lets_go_of_no_block_that_is_in_use(batch, lanes, world_size, repeats):
    """All lanes pass to their next window at about the same step: one step may need a window of each."""
    cfg = tiny.config(
        train={"global_batch": batch},
        data={
            "train": {"shards": "unused"},
            "lanes": lanes,
            "block_mib": 0.02,
            "augment": {"repeats": repeats},
        },
    )
    plan = tiny.plan(cfg, world_size, samples=lanes * 1000)
    order = Order(
        np.full(20, lanes * 50), seed=1, global_batch=batch, lanes=lanes, repeats=repeats,
        block_samples=plan.block_samples, window_blocks=plan.window_blocks,
    )  # fmt: skip
    in_use = blocks_in_use(plan, cfg.data)
    reader = Counted(2 * in_use, in_use, plan.block_samples)
    rows = (order.rows(step, *plan.slice_of(1)) for step in range(lanes * 1000 * repeats // batch))
    for step in announced(rows, lambda rows: (rows.shard, rows.sample), reader):
        for key in reader.keys(step.shard, step.sample):
            reader.blocks.get(key)
    reader.blocks.close()
    edges = lanes + 1  # a block that the end of a lane cuts is read for both
    assert len(reader.fetched) <= len(set(reader.fetched)) + edges


def test_blocks_of_coming_steps_are_fetched_before_they_are_due(server, remote):
    reader = RemoteReader(remote, data_config(), BLOCK, blocks_in_use=4)
    requests = iter([remote.locate(np.arange(start, start + 3)) for start in range(0, 60, 3)])
    try:
        first = next(announced(requests, lambda places: places, reader))
        wait_until(lambda: sum(tars(server).values()) >= 3)  # though nothing was read yet
        assert not reader.has_room(*remote.locate(np.arange(60)))
        assert sum(tars(server).values()) < 60 // BLOCK  # bounded in bytes
        reader.read(*first)
    finally:
        reader.close()


def test_a_walk_that_is_left_takes_no_room_from_the_next():
    """A run that goes back begins another one with the same reader."""
    reader = Counted(limit=12, room=6, block_samples=1)
    walks = (((np.zeros(1, int), np.array([first + i])) for i in range(100)) for first in (0, 500))
    for walk in walks:
        requests = announced(walk, lambda places: places, reader)
        next(requests)
        assert reader.blocks.ahead == 6
    reader.blocks.close()


def test_closing_ends_who_waits_for_a_block_that_has_not_begun():
    going = threading.Event()
    blocks: Blocks[int, int] = Blocks(lambda key: going.wait(PATIENCE) and key, lambda key: 1, 10, threads=1)
    blocks.announce(1)
    blocks.announce(2)
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            blocks.get(2)
        except DataError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    blocks.close()
    thread.join(PATIENCE / 2)
    going.set()
    assert not thread.is_alive()
    assert "the reader was closed" in str(failed[0])
    with pytest.raises(DataError, match="the reader was closed"):
        blocks.get(3)


def test_read_ahead_of_nothing_fetches_what_is_due(server, remote, whole):
    assert read(remote, np.arange(30), read_ahead_mib=0.0) == whole[:30]


@pytest.mark.parametrize("of", ["manifest.json", ".tar.idx", ".tar"])
@pytest.mark.parametrize("fault", [faults.unavailable, faults.resets_half_way])
def test_a_passing_failure_of_anything_is_made_good(server, whole, fault, of):
    server.first(2, fault, of)
    dataset = open_dataset(server.url)
    assert read(dataset, np.arange(40)) == whole[:40]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("of", [".tar.idx", ".tar"])
def test_a_flipped_bit_is_fetched_again_and_for_ever_is_fatal(server, remote, whole, of, cached, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1.0} if cached else {}
    server.first(2, faults.flips_a_bit, of)
    assert read(remote, np.arange(20), **settings) == whole[:20]
    server.always(faults.flips_a_bit, of)
    name = (
        r"train-000004\.tar\.idx: "
        if of == ".tar.idx"
        else r"train-000004\.tar, sample \d+: its bytes are not"
    )
    before = len(server.requests)
    with pytest.raises(DataError, match=name):
        read(remote, remote.starts[4] + np.arange(BLOCK), **settings)
    assert len(server.requests) - before <= 4


def test_a_bit_that_flips_in_the_cache_is_fetched_again(server, remote, whole, tmp_path):
    settings = {"cache_dir": str(tmp_path), "cache_gib": 1.0}
    read(remote, np.arange(len(remote)), **settings)
    before = len(server.requests)
    pieces = [path for path in tmp_path.glob("??/*") if path.stat().st_size > 2000]
    for path in pieces[:3]:
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    for path in pieces[3:5]:
        path.write_bytes(path.read_bytes()[:1000])  # as a power cut may leave it
    assert read(remote, np.arange(len(remote)), **settings) == whole
    assert len(server.requests) - before == 5


def test_a_shard_that_is_replaced_is_named(server, remote):
    tar = server.folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(10240))
    with pytest.raises(DataError, match=r"train-000000\.tar: [\d,]+ bytes, but its manifest says"):
        read(remote, np.arange(5))


def test_a_shard_that_changes_in_use_is_named(server, remote):
    reader = RemoteReader(remote, data_config(), BLOCK, blocks_in_use=1)
    reader.read(*remote.locate(np.arange(3)))
    tar = server.folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"train-000000\.tar: it was changed while it was being read"):
        reader.read(*remote.locate(np.arange(BLOCK, 2 * BLOCK)))
    reader.close()


def test_missing_objects_and_a_missing_manifest_say_what_to_do(server, remote):
    (server.folder / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: there is no such object"):
        read(remote, remote.starts[2] + np.arange(3))
    (server.folder / "manifest.json").unlink()
    with pytest.raises(
        DataError,
        match=r"there is no manifest\.json, and an HTTP server cannot be asked(.|\n)*pretrain shards index",
    ):
        open_dataset(server.url)


def test_the_preflight_of_a_job_reads_a_little_of_a_store_and_names_what_it_cannot(
    server, remote, monkeypatch
):
    config = setting(remote).config
    _see_shards(config)
    assert server.requests[-1].range == "bytes=0-511"
    server.always(faults.unavailable, ".tar")
    monkeypatch.setattr(store, "pause_after", lambda *_: 1e9)
    with pytest.raises(DataError, match=r"train-000000\.tar: not read within \d+ seconds"):
        _see_shards(config)


def test_a_dead_store_ends_training_with_an_error_in_time(server, remote):
    made = setting(remote, 1, decode_threads=2, read_timeout_seconds=1.0)
    server.always(faults.stalls_half_way, ".tar")
    began = time.monotonic()
    with (
        TrainLoader(remote, made.config.data, made.config.model, made.plan, seed=5, rank=0) as loader,
        pytest.raises(DataError, match=r"\.tar(\.idx)?: not read within 1 seconds"),
    ):
        next(loader.steps(0))
    assert time.monotonic() - began < PATIENCE / 2


def test_too_little_memory_or_cache_for_the_order_is_refused_before_a_read(server, remote, tmp_path):
    for settings, name in (
        ({"block_memory_mib": 0.01}, "data.block_memory_mib"),
        ({"cache_dir": str(tmp_path), "cache_gib": 1e-5}, "data.cache_gib"),
        ({"read_ahead_mib": 5000.0}, "data.block_memory_mib"),
    ):
        with pytest.raises(DataError, match=name):
            open_reader(remote, data_config(**settings), BLOCK, 1000)
    assert len(server.requests) == 1


def test_settings_of_stores_are_idle_on_local_shards(train_set, remote):
    def idle(dataset: Dataset) -> str:
        return "\n".join(idle_settings(setting(dataset, cache_dir="/c", cache_gib=1.0).config))

    assert "data.cache_dir=/c has no effect: all shards are local files" in idle(train_set)
    assert "cache_dir" not in idle(remote)


def test_what_is_held_and_read_is_told(remote, train_set):
    made = setting(remote, 4, batch=24, lanes=12)
    assert blocks_in_use(made.plan, made.config.data) == 3 * (2 + 2)
    assert "in memory; up to" in reading(remote, made.config.data, made.plan)
    assert "from local files, up to" in reading(train_set, made.config.data, made.plan)


def test_the_bound_of_a_cache_holds_for_training_and_evaluation_of_all_ranks(
    server, remote, whole, tmp_path, monkeypatch
):
    """Two ranks with two readers each hold all that they are allowed to."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    block = remote.num_bytes * BLOCK // len(remote)
    bound = 16 * block
    urls = {"train": {"shards": server.url}, "val": {"shards": server.url}}
    settings = data_config(**urls, cache_dir=str(tmp_path / "cache"), cache_gib=bound / 2**30)
    train, evaluation = shares(settings)
    numbers = np.random.default_rng(3).permutation(len(remote))
    low, high = numbers[numbers < len(remote) // 2], numbers[numbers >= len(remote) // 2]
    with ExitStack() as stack:
        readers = []
        for share, samples, parts in ((train, BLOCK, (low, high)), (evaluation, 2, (high, low))):
            in_use = int(share * bound * 0.95 / 2 / (block / BLOCK * samples))
            for part in parts:
                reader = open_reader(remote, settings, samples, in_use, share)
                stack.callback(reader.close)
                readers.append((reader, part))
        for start in range(0, len(low), 5):
            for reader, part in readers:
                mine = part[start : start + 5]
                assert plain(reader.read(*remote.locate(mine))) == [whole[n] for n in mine]
                assert taken(tmp_path / "cache") <= bound


def test_a_reader_for_which_others_leave_no_room_is_refused_before_it_reads(server, remote, whole, tmp_path):
    """As a second run on the node, or a rank that the launcher did not count."""
    block = remote.num_bytes * BLOCK // len(remote)
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 16 * block / 2**30}
    first = open_reader(remote, data_config(**settings), BLOCK, 8)
    before = len(server.requests)
    with pytest.raises(
        CacheInUseError,
        match=r"1 others may hold [\d,]+ of the [\d,]+ bytes that it has for that, and [\d,]+ are needed here\n  Raise data\.cache_gib",
    ):
        open_reader(remote, data_config(**settings), BLOCK, 8)
    with pytest.raises(
        CacheInUseError, match=r"others use it with a bound of [\d,]+ bytes(.|\n)*the same data\.cache_gib"
    ):
        open_reader(remote, data_config(**settings | {"cache_gib": 1.0}), BLOCK, 1)
    assert len(server.requests) == before
    with (tmp_path / "cache" / "claims" / "torn").open("wb") as torn:  # of one that the disk had no room for
        fcntl.flock(torn, fcntl.LOCK_EX)
        with pytest.raises(CacheInUseError, match="1 others may hold"):
            open_reader(remote, data_config(**settings), BLOCK, 8)
    first.close()
    first.close()
    assert read(remote, np.arange(20), **settings | {"cache_gib": 1.0}) == whole[:20]
    assert list((tmp_path / "cache" / "claims").iterdir()) == []


def test_a_rank_whose_node_has_no_room_left_stops_all_of_them_with_its_reason(
    server, remote, digits, tmp_path
):
    """Somebody else holds a third of the cache: the first of two ranks has room, the second has not."""
    bound = 3 * remote.num_bytes
    cached = {"cache_dir": str(tmp_path / "cache"), "cache_gib": bound / 2**30}
    cfg = config(
        tmp_path / "run", digits, data={"train": {"shards": server.url}, "read_ahead_mib": 0.0} | cached
    )
    (tmp_path / "config.yaml").write_text(dump(cfg))
    other = NodeCache(tmp_path / "cache", round(bound), 1.0, round(1.5 * remote.num_bytes))
    ends = launch(2, tmp_path, str(tmp_path / "config.yaml"))
    other.close()
    assert {code for code, _ in ends} == {CacheInUseError.exit_code, PeerError.exit_code}
    assert "bytes that it has for that, and" in ends[0][1]
    assert "Raise data.cache_gib in all runs that share it" in ends[0][1]
    assert "Traceback" not in ends[0][1]


def test_shares_are_those_of_the_readers_that_are_there(remote):
    url, path = {"shards": remote.source}, {"shards": "/data/val"}
    assert shares(data_config(train=url, val=url)) == (7 / 8, 1 / 8)
    for train, val in ((url, path), (path, url), (url, None)):
        assert shares(data_config(train=train, val=val)) == (1, 1)


PROCESS = """
import sys
import numpy as np
from pretrain.config import DataConfig, dump
from pretrain.config.idle import idle_settings
from pretrain.data import open_dataset
from pretrain.data.remote import RemoteReader
url, cache, seed = sys.argv[1:]
dataset = open_dataset(url)
data = DataConfig(train={"shards": url}, cache_dir=cache, cache_gib=1.0)
reader = RemoteReader(dataset, data, 7, 1000)
print("ready", flush=True)
sys.stdin.readline()
numbers = np.random.default_rng(int(seed)).permutation(len(dataset))
reader.announce(*dataset.locate(numbers))
samples = reader.read(*dataset.locate(numbers))
print(sum(sample.label for sample in samples), reader.requests, flush=True)
reader.close()
"""


def start(server: StoreServer, cache: Path, seed: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, server.url, str(cache), str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_four_processes_on_a_node_download_each_block_and_index_once(server, remote, whole, tmp_path):
    processes = [start(server, tmp_path / "cache", seed) for seed in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        server.requests.clear()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.stdout.readline().split() for process in processes]
    finally:
        for process in processes:
            process.communicate(timeout=PATIENCE)
    assert {int(labels) for labels, _ in told} == {sum(label for _, _, label in whole)}
    assert set(Counter((r.path, r.range) for r in server.requests).values()) == {1}
    assert len(server.requests) == blocks_of(remote) + len(remote.shards)
    assert sum(int(requests) for _, requests in told) == len(server.requests)
    assert list((tmp_path / "cache").glob("??/*.new")) == []


def test_a_process_killed_in_a_download_leaves_nothing_wrong(server, remote, whole, tmp_path):
    server.always(faults.stalls_half_way, ".tar")
    process = start(server, tmp_path / "cache", 0)
    process.stdin.write("go\n")
    process.stdin.flush()
    wait_until(lambda: len(tars(server)) >= 3)
    process.kill()
    process.wait()
    server.fault = lambda request: None
    assert list((tmp_path / "cache").glob("??/*.new"))
    settings = {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1.0}
    assert read(remote, np.arange(len(remote)), **settings) == whole
    assert list((tmp_path / "cache").glob("??/*.new")) == []
    assert used(tmp_path / "cache") == taken(tmp_path / "cache")


def used(folder: Path) -> int:
    """What the cache counts."""
    return int.from_bytes((folder / "usage").read_bytes(), "little")


def taken(folder: Path) -> int:
    """What is there."""
    files: dict[int, int] = {}
    for path in folder.glob("??/*"):
        with suppress(FileNotFoundError):  # renamed since it was listed
            files[path.stat().st_ino] = path.stat().st_size
    return sum(files.values())


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


SHARER = """
import random, sys
from pathlib import Path
from pretrain.data.cache import NodeCache
folder, limit, held, size, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache = NodeCache(folder, limit, 60.0, held)
print("ready", flush=True)
sys.stdin.readline()
draws, holding = random.Random(seed), []
for _ in range(200):
    number = draws.randrange(60)
    piece = cache.piece(f"{number:064x}"[::-1], size, lambda: bytes([number]) * size)
    assert piece.read(0, size) == bytes([number]) * size
    holding = [*holding, piece][-(held // size) :]
print("done", flush=True)
sys.stdin.readline()
"""


def share_cache(folder: Path, limit: int, held: int, seed: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SHARER, str(folder), str(limit), str(held), "1000", str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_four_independent_processes_keep_one_bound_while_each_holds_all_it_claimed(tmp_path):
    """A fifth is refused while they live; killed ones leave their room to others."""
    processes = [share_cache(tmp_path, 40_000, 9000, seed) for seed in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        _, words = share_cache(tmp_path, 40_000, 9000, 4).communicate()
        assert (
            "4 others may hold 36,000 of the 38,000 bytes that it has for that, and 9,000 are needed" in words
        )
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        most, are_done = 0, False
        while not are_done:
            are_done = all(select.select([process.stdout], [], [], 0)[0] for process in processes)
            with (tmp_path / "usage").open() as file:
                fcntl.flock(
                    file, fcntl.LOCK_EX
                )  # whoever adds or evicts waits: what is counted is there at one time
                most = max(most, taken(tmp_path))
            time.sleep(0.005)
        assert [process.stdout.readline() for process in processes] == ["done\n"] * 4
        assert 30_000 < most <= 40_000
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    NodeCache(tmp_path, 40_000, 1.0, 38_000).close()
    with pytest.raises(
        CacheInUseError, match="0 others may hold 0 of the 38,000 bytes"
    ):  # blocks are of unequal size
        NodeCache(tmp_path, 40_000, 1.0, 38_001)


def test_the_cache_stays_under_its_bound_and_keeps_what_was_used_last(tmp_path):
    cache = NodeCache(tmp_path, 10_000, 1.0)
    for number in range(50):
        cache.piece(key(number), 1000, lambda: bytes(1000))
        cache.piece(key(0), 1000, lambda: bytes(1000))  # in use all the time
        time.sleep(0.002)
        assert taken(tmp_path) <= 10_000
        assert used(tmp_path) == taken(tmp_path)
    kept = {path.name for path in tmp_path.glob("??/*")}
    assert key(0) in kept
    assert key(49) in kept
    assert key(1) not in kept


def test_what_is_being_read_is_never_evicted(tmp_path):
    cache = NodeCache(tmp_path, 3000, 1.0)
    held = [cache.piece(key(number), 1000, lambda: b"x" * 1000) for number in range(3)]
    with pytest.raises(DataError, match=r"full of what is being read(.|\n)*Raise data\.cache_gib"):
        cache.piece(key(3), 1000, lambda: bytes(1000))
    assert all(piece.read(0, 1000) == b"x" * 1000 for piece in held)
    held.pop(0)
    cache.piece(key(3), 1000, lambda: bytes(1000))
    assert {path.name for path in tmp_path.glob("??/*")} == {key(1), key(2), key(3)}


def test_a_failed_download_frees_its_room_and_is_tried_again(tmp_path):
    cache = NodeCache(tmp_path, 3000, 1.0)

    def fails() -> bytes:
        raise DataError("no")

    for _ in range(5):
        with pytest.raises(DataError, match="no"):
            cache.piece(key(1), 1000, fails)
    assert used(tmp_path) == taken(tmp_path) == 0

    def full() -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"data\.cache_dir .*: No space left on device\n  Free some room"):
        cache.piece(key(1), 1000, full)
    assert cache.piece(key(1), 1000, lambda: b"y" * 1000).read(10, 12) == b"yy"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir .*file/cache: cannot be written: Not a directory"):
        NodeCache(tmp_path / "file" / "cache", 1000, 1.0)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux's setpriv")
def test_a_piece_that_cannot_be_dropped_is_named(tmp_path):
    """Without capabilities, root too may not remove a file from where nobody may."""
    cache = NodeCache(tmp_path, 1000, 1.0)
    cache.piece(key(1), 10, lambda: bytes(10))
    (tmp_path / key(1)[:2]).chmod(0o555)
    code = (
        "import sys; from pathlib import Path; from pretrain.data.cache import NodeCache; "
        "NodeCache(Path(sys.argv[1]), 1000, 1.0).drop(sys.argv[2])"
    )
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    done = subprocess.run(
        [*drop, sys.executable, "-c", code, str(tmp_path), key(1)], capture_output=True, text=True
    )
    (tmp_path / key(1)[:2]).chmod(0o755)
    assert done.stderr.splitlines()[-1] == (
        f"pretrain.errors.DataError: data.cache_dir {tmp_path}: Permission denied"
    )
