"""Ranged reads: the samples that were packed, or an error that names the shard. Never anything else."""

import ctypes
import mmap
import os
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from made import open_files, picture, sample_members, write_tar

from pretrain.data import Dataset, open_dataset, read
from pretrain.data.index import ShardIndex, parse_index
from pretrain.data.read import LocalReader
from pretrain.data.scan import index_folder
from pretrain.data.tar import Sample, parse_sample
from pretrain.errors import DataError


def read_all(dataset: Dataset, numbers: np.ndarray | None = None) -> list[Sample]:
    reader = LocalReader(dataset, block_samples=7)
    try:
        return reader.read(*dataset.locate(np.arange(len(dataset)) if numbers is None else numbers))
    finally:
        reader.close()


def plain(samples: list[Sample]) -> list[tuple[str, bytes, int]]:
    return [(sample.key, bytes(sample.image), sample.label) for sample in samples]


def test_the_stock_reader_sees_the_same_samples(digits, train_set):
    """webdataset itself is the oracle: keys, bytes and labels, in the order of the tars."""
    import webdataset

    stock = [
        (sample["__key__"], sample["png"], int(sample["cls"]))
        for sample in webdataset.WebDataset(list(train_set.paths), shardshuffle=False)
    ]
    assert plain(read_all(train_set)) == stock
    assert len(stock) == len(train_set)


def test_any_order_and_any_grouping_give_the_same_samples(train_set):
    whole = plain(read_all(train_set))
    numbers = np.random.default_rng(0).permutation(len(train_set))
    assert plain(read_all(train_set, numbers)) == [whole[i] for i in numbers]


def test_neighbours_in_a_block_are_one_read(train_set, monkeypatch):
    calls = []
    monkeypatch.setattr(read.os, "pread", lambda *given, real=os.pread: calls.append(given) or real(*given))
    read_all(train_set)
    assert len(calls) == sum(-(-shard.samples // 7) for shard in train_set.shards)


def test_more_shards_than_may_be_open(train_set, monkeypatch):
    whole = plain(read_all(train_set))
    monkeypatch.setattr(read, "descriptors_to_use", lambda: 2)
    monkeypatch.setattr(read, "FEWEST_KEPT", 2)
    numbers = np.random.default_rng(0).permutation(len(train_set))
    reader = LocalReader(train_set, block_samples=7, blocks_in_use=2)
    found: dict[int, list[tuple[str, bytes, int]]] = {}

    def work(part: int) -> None:
        mine = numbers[part::4]
        found[part] = [plain(reader.read(*train_set.locate(np.array([n]))))[0] for n in mine]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part in range(4):
        assert found[part] == [whole[n] for n in numbers[part::4]]
    assert len(reader._files) <= 2
    assert len(reader._blocks) <= 2


STRANGE = {
    "pax": (tarfile.PAX_FORMAT, "ключ", 1),
    "gnu long name": (tarfile.GNU_FORMAT, "long/" + "x" * 150, 2),
    "ustar prefix": (tarfile.USTAR_FORMAT, "p" * 90 + "/" + "q" * 90, 3),
    "gnu short name": (tarfile.GNU_FORMAT, "short", 4),
    "upper case": (tarfile.USTAR_FORMAT, "dir.with.dots/name", 5),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_tars_of_other_makers_read_as_the_stock_reader_reads_them(kind, tmp_path):
    import webdataset

    form, key, label = STRANGE[kind]
    image = picture(label)
    suffix = "JPG" if kind == "upper case" else "png"
    members = [(f"{key}.{suffix}", image), (f"{key}.json", b"{}"), (f"{key}.cls", f"{label}\n".encode())]
    write_tar(tmp_path / "a.tar", [*sample_members("first", 0), *members, *sample_members("last", 7)], form)
    index_folder(tmp_path)
    stock = [
        (s["__key__"], s.get("png") or s["jpg"], int(s["cls"]))
        for s in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    ]
    ours = plain(read_all(open_dataset(str(tmp_path))))
    assert ours == stock
    assert ours[1] == (key, image, label)


def test_members_that_are_no_image_and_no_label_are_never_looked_into(tmp_path):
    """A pickle is bytes that nobody opens; links, devices and folders are passed over."""
    canary = tmp_path / "executed"
    payload = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    link, device, folder = (tarfile.TarInfo(f"x.{name}") for name in ("txt", "dev", "d"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    folder.type = tarfile.DIRTYPE
    extra = [(f"x.{suffix}", payload) for suffix in ("pyd", "pkl", "pickle", "pth", "npy")]
    cls, png = sample_members("x", 4)
    write_tar(
        tmp_path / "a.tar",
        [folder, cls, *extra, link, device, png, ("README", b"hello"), ("__meta__/a.json", b"")],
    )
    index_folder(tmp_path)
    assert plain(read_all(open_dataset(str(tmp_path)))) == [("x", png[1], 4)]
    assert not canary.exists()


def test_a_symlink_in_place_of_an_image_is_not_followed(tmp_path):
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tmp_path / "a.tar", [("x.cls", b"1"), link])
    with pytest.raises(DataError, match=r"a\.tar, sample 0 \(x\): holds no image"):
        index_folder(tmp_path)


def test_every_flipped_bit_in_a_sample_is_noticed(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    tar = Path(dataset.paths[0])
    good = tar.read_bytes()
    index = parse_index(Path(f"{tar}.idx").read_bytes(), tar)
    end = int(index.table["offset"][-1]) * 512 + int(index.table["length"][-1])
    generator = np.random.default_rng(0)
    numbers = np.arange(dataset.shards[0].samples)
    for at in generator.integers(0, end, 300):
        damaged = bytearray(good)
        damaged[at] ^= 1 << int(generator.integers(8))
        tar.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar, sample \d+: its bytes are not those"):
            read_all(dataset, numbers)


def test_indexes_are_kept_up_to_a_bound_and_of_the_blocks_in_use_the_rows(train_set, monkeypatch):
    """With room for no whole index each block reads its index once, whatever comes between its samples."""
    whole = plain(read_all(train_set))
    loaded = []
    monkeypatch.setattr(
        read, "load_index", lambda *given, real=read.load_index: loaded.append(given) or real(*given)
    )
    monkeypatch.setattr(read, "INDEX_BYTES", 1)
    reader = LocalReader(train_set, block_samples=7)
    numbers = np.random.default_rng(2).permutation(len(train_set))
    for n in numbers:
        assert plain(reader.read(*train_set.locate(np.array([n])))) == [whole[n]]
    blocks = sum(-(-shard.samples // 7) for shard in train_set.shards)
    assert len(reader._blocks) == blocks >= len(loaded) > len(train_set.shards)
    assert len(reader._indexes) == 1
    reader.close()


@pytest.mark.parametrize("failures", [1, read.REREADS])
def test_a_bit_that_flips_on_the_way_is_read_again(train_set, monkeypatch, caplog, failures):
    """What a bad cable does: the file is sound, and some reads of it are not."""
    whole = plain(read_all(train_set))
    left = failures

    def flipping(descriptor: int, length: int, start: int, real=os.pread) -> bytes:
        nonlocal left
        data = bytearray(real(descriptor, length, start))
        if left:
            left -= 1
            data[600] ^= 1
        return bytes(data)

    monkeypatch.setattr(read.os, "pread", flipping)
    assert plain(read_all(train_set)) == whole
    assert caplog.text.count("train-000000.tar, sample 0: its checksum does not match") == failures


def test_a_read_again_goes_past_the_page_cache(copied):
    """A range that ends inside of pages is dropped whole, so that the next read comes from the disk."""
    folder = copied()
    dataset = open_dataset(str(folder))
    tar = Path(dataset.paths[0])
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tar)], capture_output=True, text=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("a file system in memory has no copy to drop")
    descriptor = os.open(tar, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    block = LocalReader(dataset, block_samples=10)._open_block(read.Key(0, 0))
    block.read(0, 10)
    assert cached_pages(tar) > 0
    block._drop_cached(0, tar.stat().st_size - 1)
    assert cached_pages(tar) == 0
    assert len(block.read(0, 10)) == 10


def cached_pages(path: Path) -> int:
    """Pages of a file that the system holds in memory, by `mincore`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        held = (ctypes.c_ubyte * pages)()
        start = (ctypes.c_char * len(view)).from_buffer(view)
        assert libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(view)), held) == 0
        del start
    return sum(page & 1 for page in held)


def test_a_tar_cut_after_the_opening_is_noticed(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    tar = Path(dataset.paths[0])
    good = tar.read_bytes()
    last = dataset.shards[0].samples - 1
    for share in (0.0, 0.3, 0.8):
        tar.write_bytes(good[: int(len(good) * share)])
        with pytest.raises(DataError, match=r"train-000000\.tar: cut short"):
            read_all(dataset, np.array([last]))


def test_a_rank_in_many_shards_reads_each_index_once_and_keeps_few_files_open(tmp_path, monkeypatch):
    """As with 256 lanes of 4 windows: all shards are in use at a time, and come by turns."""
    write_tar(tmp_path / "000.tar", sample_members("x", 1) + sample_members("y", 2))
    for number in range(1, 700):
        (tmp_path / f"{number:03d}.tar").write_bytes((tmp_path / "000.tar").read_bytes())
    index_folder(tmp_path)
    dataset = open_dataset(str(tmp_path))
    loaded = []
    monkeypatch.setattr(
        read, "load_index", lambda *given, real=read.load_index: loaded.append(given) or real(*given)
    )
    monkeypatch.setattr(read, "descriptors_to_use", lambda: 20)
    reader = LocalReader(dataset, block_samples=1, blocks_in_use=700)
    shards = np.arange(700)
    for sample in (0, 1, 0):
        found = reader.read(shards, np.full(700, sample))
        assert {(s.key, s.label) for s in found} == {("xy"[sample], 1 + sample)}
    assert len(loaded) == 700
    assert 0 < len(open_files(tmp_path)) <= 20
    reader.close()
    assert open_files(tmp_path) == []


def test_a_read_that_ends_after_the_reader_was_closed_leaves_no_descriptor(train_set):
    """As of a decode thread that is at it while the loader closes."""
    reader = LocalReader(train_set, block_samples=4)
    reader.close()
    assert len(reader.read(np.zeros(1, int), np.zeros(1, int))) == 1
    assert open_files(Path(train_set.paths[0]).parent) == []


@pytest.mark.parametrize("failures", [1, read.REREADS])
def test_an_index_that_is_damaged_on_its_way_is_read_again(train_set, monkeypatch, caplog, failures):
    """As by a bit that flips in memory or on a wire: the file itself is sound."""
    whole = plain(read_all(train_set))
    left = failures

    def flipping(content: bytes, *given: object, real=read.checked_index) -> object:
        nonlocal left
        if left:
            left -= 1
            content = content[:90] + bytes([content[90] ^ 1]) + content[91:]
        return real(content, *given)

    monkeypatch.setattr(read, "checked_index", flipping)
    assert plain(read_all(train_set)) == whole
    assert caplog.text.count("damaged: its checksum does not match; reading it again") == failures


def test_an_index_that_stays_damaged_is_fatal_and_named(copied, caplog):
    folder = copied()
    dataset = open_dataset(str(folder))
    file = folder / "train-000000.tar.idx"
    content = file.read_bytes()
    file.write_bytes(content[:90] + bytes([content[90] ^ 1]) + content[91:])
    with pytest.raises(DataError, match=r"train-000000\.tar\.idx: damaged(.|\n)*pretrain shards index"):
        read_all(dataset)
    assert caplog.text.count("reading it again") == read.REREADS


def test_every_flipped_bit_in_an_index_is_noticed(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    file = Path(f"{dataset.paths[0]}.idx")
    good = file.read_bytes()
    generator = np.random.default_rng(1)
    flips = [
        *((at, bit) for at in range(64) for bit in (0, 7)),
        *generator.integers(0, [[len(good), 8]], (200, 2)),
    ]
    for at, bit in flips:
        damaged = bytearray(good)
        damaged[at] ^= 1 << int(bit)
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar\.idx: (.|\n)*pretrain shards index"):
            read_all(dataset, np.array([0]))


def test_an_index_knows_its_own_damage(digits):
    """Also without a manifest beside it."""
    file = next((digits / "train").glob("*.idx"))
    good = file.read_bytes()
    assert parse_index(good, file).to_bytes() == good
    generator = np.random.default_rng(2)
    for at, bit in generator.integers(0, [[len(good), 8]], (200, 2)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << int(bit)
        with pytest.raises(DataError, match=r"\.tar\.idx: "):
            parse_index(bytes(damaged), file)


def test_another_index_of_the_same_tar_is_refused(copied):
    """Sound in itself, of this very tar, and yet not what the manifest names: a label could hide in its offsets."""
    folder = copied()
    dataset = open_dataset(str(folder))
    file = Path(f"{dataset.paths[0]}.idx")
    index = parse_index(file.read_bytes(), file)
    table = index.table.copy()
    table["crc32"][0] ^= 1
    file.write_bytes(ShardIndex(table, index.tar_bytes, index.tar_sha256, index.labels).to_bytes())
    with pytest.raises(DataError, match=r"train-000000\.tar\.idx: not the index that the manifest names"):
        read_all(dataset, np.array([1]))


@pytest.mark.parametrize(
    "change",
    [("offset", 1, 0), ("offset", -1, 2**31), ("length", 0, 0), ("length", 0, 513), ("length", 0, 2**20)],
)
def test_an_index_whose_samples_overlap_or_lie_outside_is_refused(digits, change):
    file = next((digits / "train").glob("*.idx"))
    index = parse_index(file.read_bytes(), file)
    column, row, value = change
    table = index.table.copy()
    table[column][row] = value
    with pytest.raises(DataError, match="overlap, lie outside the tar or are too large"):
        parse_index(ShardIndex(table, index.tar_bytes, index.tar_sha256, index.labels).to_bytes(), file)


def test_a_damaged_header_is_refused_by_its_own_checksum(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", sample_members("x", 1)).read_bytes()[:2048])
    data[3] ^= 1
    with pytest.raises(DataError, match="here: a header in the tar is damaged"):
        parse_sample(bytes(data), "here")


def test_an_index_cut_anywhere_is_noticed(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    file = Path(f"{dataset.paths[0]}.idx")
    good = file.read_bytes()
    for length in (0, 7, 40, 63, 64, 65, len(good) - 12, len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(DataError, match=r"train-000000\.tar\.idx: "):
            read_all(dataset, np.array([0]))


def test_the_index_of_another_tar_is_refused(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    Path(f"{dataset.paths[0]}.idx").write_bytes(Path(f"{dataset.paths[1]}.idx").read_bytes())
    with pytest.raises(
        DataError, match=r"train-000000\.tar\.idx: the index of another tar than train-000000\.tar"
    ):
        read_all(dataset, np.array([0]))


def test_a_shard_that_vanishes_is_named(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    Path(dataset.paths[0]).unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: cannot be opened: No such file"):
        read_all(dataset, np.array([0]))
