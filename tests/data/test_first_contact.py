"""Plain tars in a store: indexed when first met, once, in the order of local ones; many of them by a command."""

import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import store_server as faults
from buckets import s3_server
from made import Member, picture, sample_members, write_tar
from obstore.store import S3Store
from patience import PATIENCE
from store_server import StoreServer, serving
from test_remote import plain, read
from typed import contents, done, refused, run

from pretrain.config import TrainSourceConfig
from pretrain.data import contact, object_tar, open_dataset, open_training
from pretrain.data.object_tar import ObjectTar
from pretrain.data.read import LocalReader
from pretrain.data.scan import index_folder
from pretrain.data.store import Stores
from pretrain.data.walk import scan, scan_tar
from pretrain.errors import DataError

PATTERN = "train-{000000..000004}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def strip(folder: Path) -> Path:
    """Leave only the tars."""
    for file in folder.iterdir():
        if file.suffix != ".tar":
            file.unlink()
    return folder


@pytest.fixture
def server(copied) -> Iterator[StoreServer]:
    with serving(strip(copied())) as server:
        yield server


def tar_bytes(server: StoreServer) -> int:
    """Bytes of tars that were asked for, but for the first byte of each."""
    asked = 0
    for request in server.requests:
        if request.path.endswith(".tar") and request.range != "bytes=0-0":
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            asked += last + 1 - first
    return asked


def test_plain_tars_are_the_data_set_that_they_are_on_a_disk(server, train_set):
    found = open_dataset(f"{server.url}/{PATTERN}")
    assert (found.digest, found.shards, found.labels) == (train_set.digest, train_set.shards, (0, 9))
    assert tar_bytes(server) == found.num_bytes  # each byte once
    numbers = np.random.default_rng(0).permutation(len(found))
    assert read(found, numbers) == plain(LocalReader(train_set, 7).read(*train_set.locate(numbers)))
    assert not [request.path for request in server.requests if request.path.endswith(".idx")]


def test_a_second_contact_reads_no_tar(server):
    first = open_dataset(f"{server.url}/{PATTERN}")
    server.requests.clear()
    assert open_dataset(f"{server.url}/{PATTERN}") == first
    assert tar_bytes(server) == 0


def test_tars_that_changed_are_indexed_anew(server):
    first = open_dataset(f"{server.url}/{PATTERN}")
    write_tar(server.folder / "train-000003.tar", sample_members("x", 3))
    second = open_dataset(f"{server.url}/{PATTERN}")
    assert second.digest != first.digest
    assert second.shards[3].samples == 1


def test_many_at_once_index_once(server, train_set):
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_dataset(f"{server.url}/{PATTERN}").digest))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [train_set.digest] * 4
    assert tar_bytes(server) == train_set.num_bytes


def test_a_mixture_of_a_plain_store_and_an_indexed_folder_knows_both_places(server, digits, tmp_path):
    own = strip_copy(digits / "val", tmp_path / "own")
    index_folder(own)
    mix = (
        {"name": "web", "shards": f"{server.url}/{PATTERN}", "weight": 1},
        {"name": "own", "shards": str(own), "weight": 1},
    )
    both = open_training(TrainSourceConfig.model_validate({"mix": mix}))
    assert len(both.indexes) == len(both.paths) == 10
    assert len(read(both, np.arange(len(both)))) == len(both)


@pytest.mark.parametrize("fault", [faults.unavailable, faults.resets_half_way])
def test_passing_failures_are_made_good(server, train_set, fault):
    server.first(2, fault, "train-000001.tar")
    assert open_dataset(f"{server.url}/{PATTERN}", timeout_seconds=PATIENCE).digest == train_set.digest


def test_what_is_indexed_stays_so_when_another_tar_stops_it(server, train_set):
    whole = (server.folder / "train-000004.tar").read_bytes()
    (server.folder / "train-000004.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"http://.*train-000004\.tar: cut short"):
        open_dataset(f"{server.url}/{PATTERN}")
    server.requests.clear()
    with pytest.raises(DataError, match="train-000004"):
        open_dataset(f"{server.url}/{PATTERN}")
    assert tar_bytes(server) <= len(whole)


def test_without_a_home_the_folder_of_indexes_has_to_be_named(server, monkeypatch):
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(DataError, match=r"no home to make its index in\n  Set XDG_CACHE_HOME"):
        open_dataset(f"{server.url}/{PATTERN}")


def test_a_folder_that_cannot_be_locked_is_named_with_what_to_do(copied):
    folder = strip(copied())
    (folder / ".index.lock").mkdir()
    with pytest.raises(
        DataError, match=r"train: cannot be locked while its index is made: Is a directory\n.*XDG_CACHE_HOME"
    ):
        open_dataset(str(folder))
    assert not list(folder.glob("*.idx"))


def test_too_many_bytes_name_the_command_and_the_command_indexes_them(
    server, train_set, monkeypatch, tmp_path, digits
):
    monkeypatch.setattr(contact, "MAX_BYTES", 1000)
    pattern = f"{server.url}/{PATTERN}"
    with pytest.raises(
        DataError, match=r"beside 5 tars of (.|\n)*`pretrain shards index 'http.* --out FOLDER`"
    ):
        open_dataset(pattern)
    result = done("index", pattern, "--workers", 2, "--out", tmp_path / "out")
    assert f"copy the files of {tmp_path / 'out'} to {server.url}" in result.output
    assert open_dataset(pattern).digest == train_set.digest
    local = strip_copy(digits / "train", tmp_path / "local")
    index_folder(local)
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(local).items() if not name.endswith(".tar")
    }
    for file in (tmp_path / "out").iterdir():
        (server.folder / file.name).write_bytes(file.read_bytes())
    server.requests.clear()
    assert open_dataset(server.url).digest == train_set.digest
    assert [request.path for request in server.requests] == ["/manifest.json"]


def strip_copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for tar in folder.glob("*.tar"):
        (to / tar.name).write_bytes(tar.read_bytes())
    return to


def test_the_command_goes_on_where_it_was_stopped(server):
    pattern = f"{server.url}/{PATTERN}"
    server.always(faults.redirects_to("/nowhere"), "train-000002.tar")
    refused("train-000002", "index", pattern)
    server.fault = lambda request: None
    server.requests.clear()
    done("index", pattern)
    assert {r.path for r in server.requests if r.range != "bytes=0-0"} == {
        f"/train-00000{i}.tar" for i in range(5)
    }


def test_options_that_do_not_go_with_the_source_are_refused(server, digits, tmp_path):
    assert "--verify is about tars in a folder" in run("index", server.url, "--verify").output
    assert "--out is about tars in a store" in run("index", digits / "train", "--out", tmp_path / "x").output
    refused("tars of several folders", "index", f"{server.url}/a.tar::{server.url}/b/a.tar")


def test_an_index_that_a_node_does_not_see_says_what_to_do(server, cache):
    found = open_dataset(f"{server.url}/{PATTERN}")
    for file in cache.rglob("*.idx"):
        file.unlink()
    with pytest.raises(
        DataError, match=r"cannot be read(.|\n)*when http.* was first met(.|\n)*XDG_CACHE_HOME"
    ):
        read(found, np.arange(3))
    assert len(read(open_dataset(f"{server.url}/{PATTERN}"), np.arange(3))) == 3  # made anew


def test_a_server_that_ignores_ranges_is_refused_before_a_tar_is_read(server):
    server.always(faults.ignores_ranges, ".tar")
    with pytest.raises(DataError, match="the server ignores ranges"):
        open_dataset(f"{server.url}/{PATTERN}")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    with s3_server(monkeypatch):
        yield S3Store("bucket", client_options={"allow_http": True})


def test_a_bucket_is_listed_and_its_folder_is_the_data_set(s3, digits, train_set):
    for tar in sorted((digits / "train").glob("*.tar"), reverse=True):
        obstore.put(s3, f"sets/mine/{tar.name}", tar.read_bytes())
    obstore.put(s3, "sets/mine/deeper/other.tar", b"not of this folder")
    obstore.put(s3, "sets/mine/README", b"no tar")
    found = open_dataset("s3://bucket/sets/mine/")
    assert (found.digest, found.paths[0]) == (train_set.digest, "s3://bucket/sets/mine/train-000000.tar")
    assert open_dataset("s3://bucket/sets/mine") == found or found.source.endswith("/")
    assert read(found, np.arange(9)) == plain(LocalReader(train_set, 7).read(*train_set.locate(np.arange(9))))
    with pytest.raises(DataError, match=r"s3://bucket/sets/other: neither a manifest\.json nor a \.tar"):
        open_dataset("s3://bucket/sets/other")


# --- one pass over the bytes


def odd_members(seed: int) -> list[Member | tarfile.TarInfo]:
    """Samples of all sizes, with links and members of no sample between them and inside."""
    random = np.random.default_rng(seed)
    members: list[Member | tarfile.TarInfo] = []
    for i in range(12):
        key = "k" * int(random.integers(1, 150)) + f"/{i}"
        label, image = sample_members(key, i, picture(i, *random.integers(1, 80, 2).tolist()))
        junk = [("README", b"x" * int(random.integers(0, 5000)))] * int(random.integers(0, 3))
        members += [label, *junk, image] if random.random() < 0.3 else [label, image, *junk]
        if random.random() < 0.2:
            link = tarfile.TarInfo(f"link-{i}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            members.append(link)
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("chunk", [3000, 20_000])
def test_a_tar_read_once_from_front_to_back_has_the_index_of_the_file(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(object_tar, "CHUNK", chunk)
    for seed in range(2):
        if form == tarfile.USTAR_FORMAT:  # it has no names beyond 255
            members = [m for i in range(20) for m in sample_members(f"{seed}-{i}", i, picture(i, 40, 30))]
        else:
            members = odd_members(seed)
        tar = write_tar(tmp_path / f"{seed}.tar", members, form)
        with (
            serving(tmp_path) as server,
            ObjectTar(Stores(), f"{server.url}/{tar.name}", tar.stat().st_size) as opened,
        ):
            assert scan_tar(opened).to_bytes() == scan(tar).to_bytes()
            assert tar_bytes(server) == tar.stat().st_size


def test_a_tar_whose_walk_failed_asks_for_nothing_more(tmp_path, monkeypatch):
    """What is ahead of the damage is not there for long: its reads are given up, not tried until their time is over."""
    monkeypatch.setattr(object_tar, "CHUNK", 4096)
    tar = write_tar(tmp_path / "a.tar", [m for i in range(40) for m in sample_members(f"{i}", i)])
    content = bytearray(tar.read_bytes())
    content[148:156] = b"7777777\0"  # a checksum of a header that does not match
    tar.write_bytes(content)
    with serving(tmp_path) as server:
        server.fault = lambda request: None if request.range == "bytes=0-4095" else faults.unavailable
        began = time.monotonic()
        with (
            pytest.raises(DataError, match=r"a\.tar: cut short, damaged"),
            ObjectTar(Stores(PATIENCE), f"{server.url}/a.tar", tar.stat().st_size) as opened,
        ):
            scan_tar(opened)
        assert time.monotonic() - began < PATIENCE / 2
        assert len({request.range for request in server.requests}) <= 1 + object_tar.AHEAD


def test_a_long_tail_of_other_members_takes_no_memory(tmp_path, monkeypatch):
    """What follows a sample for longer than a sample may be is let go of."""
    monkeypatch.setattr(object_tar, "CHUNK", 4096)
    monkeypatch.setattr("pretrain.data.walk.MAX_SAMPLE_BYTES", 20_000)
    junk = [("README", b"x" * 8000)] * 40
    tar = write_tar(tmp_path / "a.tar", [*sample_members("x", 1), *junk, *sample_members("y", 2)])
    most = 0
    with (
        serving(tmp_path) as server,
        ObjectTar(Stores(), f"{server.url}/a.tar", tar.stat().st_size) as opened,
    ):
        pread = opened.pread

        def watched(size: int, offset: int) -> bytes:
            nonlocal most
            most = max(most, len(opened._held))
            return pread(size, offset)

        monkeypatch.setattr(opened, "pread", watched)
        assert scan_tar(opened).to_bytes() == scan(tar).to_bytes()
    assert most < 50_000 < tar.stat().st_size
