"""Shards that somebody made to hurt: refused or ignored, nothing executed, nothing followed, time and memory bounded."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from bombs import MAX_PIXELS, jpeg_of_scans, raw_member
from made import picture, sample_members, write_tar
from PIL import Image
from test_loader import train_loader

from pretrain.data import open_dataset
from pretrain.data.decode import decode
from pretrain.data.index import MAX_SAMPLE_BYTES, ShardIndex, parse_index
from pretrain.data.manifest import Shard, digest
from pretrain.data.read import LocalReader
from pretrain.data.scan import index_folder
from pretrain.data.scans import MAX_SCANS, has_too_many_scans
from pretrain.data.tar import MAX_HEADER_BYTES, parse_sample
from pretrain.data.verify import verify_folder
from pretrain.errors import BadSampleError, DataError

END = bytes(10_240)
BYTES_A_PIXEL = 25
"""What a decode may take at its peak, for each pixel that the cap allows."""


def sound(key: str = "good") -> bytes:
    """The members of one sample that nothing is wrong with."""
    return b"".join(raw_member(name, b"0", len(data), data) for name, data in sample_members(key, 1))


def pax(records: bytes) -> bytes:
    return raw_member("pax", b"x", len(records), records)


def record(key: str, value: str) -> bytes:
    """One of pax's: its own length in decimal, a blank, key=value."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + len(str(len(rest)))
    return str(len(rest) + len(str(length))).encode() + rest


def negative(name: str) -> bytes:
    """A header of size -1024 in base 256, as GNU tar writes large numbers."""
    header = bytearray(raw_member(name, b"0", 0))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


LABEL, FILE = raw_member("x.cls", b"0", 1, b"1"), raw_member("x.png", b"0", 1, b"1")

REFUSED = {
    "a link that has content": (raw_member("x.png", b"2", 2**40, linkname="/etc/passwd"), "at most"),
    "a type that nobody knows": (raw_member("x.png", b"Q", 3, b"abc"), "damaged after byte"),
    "eight gigabytes": (raw_member("x.cls", b"0", 2**33 - 1, b"1"), "8,589,934,591 bytes; at most"),
    "an exabyte": (raw_member("x.cls", b"0", 2**60, b"1"), "at most"),
    "less than nothing": (negative("README"), "-1,024 bytes"),
    "less than nothing by pax": (pax(record("size", "-1024")) + raw_member("README", b"0", 0), "-1,024 bytes"),
    "a size by pax": (pax(record("size", "9" * 15)) + LABEL, "at most"),
    "sparse by pax 0.0": (pax(record("GNU.sparse.size", "9" * 12) + record("GNU.sparse.offset", "0")) + FILE, "sparse"),
    "sparse by pax 0.1": (pax(record("GNU.sparse.map", "0,1") + record("GNU.sparse.size", "9" * 12)) + FILE, "sparse"),
    "sparse by pax 1.0": (
        pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.realsize", "9" * 12))
        + raw_member("x.png", b"0", 512, b"1\n0\n1\n" + bytes(506)),
        "sparse",
    ),
    "a pax record of no length": (pax(b"0 path=x\n") + LABEL, "damaged after byte"),
    "a pax header of digits": (pax(b"1" * 10**6) + LABEL, f"at most {MAX_HEADER_BYTES}"),
    "a long link": (raw_member("l", b"K", 10**6, b"a" * 10**6) + LABEL, f"at most {MAX_HEADER_BYTES}"),
    "pax headers without end": (pax(record("a", "b")) * 5000 + LABEL, "hundreds of headers"),
    "long names without end": (raw_member("l", b"L", 4, b"abc\0") * 5000 + LABEL, "hundreds of headers"),
    "a way out by pax": (pax(record("path", "../../x.png")) + FILE, "absolute names"),
    "a root by pax": (pax(record("path", "/etc/x.png")) + FILE, "absolute names"),
    "an escape sequence by pax": (pax(record("path", "a\x1b[2Jb.png")) + FILE, "control characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_member_is_refused_by_name_and_soon(tmp_path, case):
    content, reason = REFUSED[case]
    (tmp_path / "a.tar").write_bytes(sound() + content + END)
    with pytest.raises(DataError, match=rf"a\.tar.*{reason}"):
        index_folder(tmp_path)


IGNORED = {
    "a hard link": raw_member("x.png", b"1", 0, linkname="good.png"),
    "a symbolic link": raw_member("x.png", b"2", 0, linkname="/etc/passwd"),
    "a device": raw_member("x.png", b"3", 0),
    "a disk": raw_member("x.png", b"4", 0),
    "a folder": raw_member("x.png/", b"5", 0),
    "a pipe": raw_member("x.png", b"6", 0),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_is_no_file_is_no_picture(tmp_path, case):
    """The sample lacks one; it is not the file behind a link."""
    (tmp_path / "a.tar").write_bytes(sound() + LABEL + IGNORED[case] + END)
    index_folder(tmp_path)
    dataset = open_dataset(str(tmp_path))
    reader = LocalReader(dataset, 1)
    assert [s.key for s in reader.read(np.array([0]), np.array([0]))] == ["good"]
    with pytest.raises(BadSampleError, match=r"a\.tar, sample 1 \(x\): holds no image"):
        reader.read(np.array([0]), np.array([1]))


@pytest.mark.parametrize(
    "suffix", ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "json", "py", "cls.pkl"]
)
def test_training_executes_nothing_of_a_shard(tmp_path, suffix):
    """A pickle that would touch a file, as a member of its own and in place of the picture."""
    canary = tmp_path / "executed"
    payload = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    good = [m for i in range(4) for m in sample_members(f"k{i}", i)]
    members = [
        *sample_members("a", 1), (f"a.{suffix}", payload),
        ("b.cls", b"1"), (f"b.{suffix}", payload), ("b.png", payload),
    ]  # fmt: skip
    write_tar(tmp_path / "shards" / "a.tar", [*members, *good])
    index_folder(tmp_path / "shards")
    dataset = open_dataset(str(tmp_path / "shards"))
    with train_loader(dataset, batch=6) as loader:
        next(loader.steps(0))
        assert [(bad.key, bad.sample) for bad in loader.take_bad()] == [("b", 1)]
    assert not canary.exists()


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: not a file"):
        index_folder(tmp_path)


@pytest.mark.parametrize("name", [".index.lock", "a.tar.idx.partial", "manifest.json.partial"])
def test_what_links_among_shards_lead_to_is_not_written(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "shards"
    victim.write_text("precious")
    write_tar(folder / "a.tar", sample_members("x", 1))
    (folder / name).symlink_to(victim)
    with pytest.raises(DataError, match=r"symbolic links"):
        open_dataset(str(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match="No such device or address"):
        open_dataset(str(folder))
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["manifest.json", "a.tar.idx", "a.tar"])
def test_a_pipe_in_place_of_anything_beside_it_is_not_waited_for(tmp_path, name):
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    index_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError):
        open_dataset(str(tmp_path))
    if name == "manifest.json":
        with pytest.raises(DataError, match=r"manifest\.json: cannot be read: it is no file"):
            verify_folder(tmp_path, max_pixels=1000)
    else:
        assert len(verify_folder(tmp_path, max_pixels=1000).problems) == 2


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-1\0" + bytes(9)])
def test_a_negative_size_does_not_hold_a_reader_for_ever(size):
    """In the octal field itself, which `int` reads with a sign; the header's sum is right."""
    header = bytearray(raw_member("README", b"0", 0))
    header[257:265] = b"ustar\x0000"
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(DataError, match="here: a header in the tar gives a size of -"):
        parse_sample(bytes(header) + bytes(1024), "here")


@pytest.mark.parametrize(("samples", "labels"), [(0, (0, 0)), (1, (5, 1))])
def test_an_index_of_nothing_or_of_impossible_labels_is_made_anew(tmp_path, samples, labels):
    """Somebody ships it with the tar, younger than that and of its size."""
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    made = index_folder(tmp_path)
    file = tmp_path / "a.tar.idx"
    index = parse_index(file.read_bytes(), file)
    file.write_bytes(ShardIndex(index.table[:samples], index.tar_bytes, index.tar_sha256, labels).to_bytes())
    assert index_folder(tmp_path) == made


def test_an_index_that_asks_for_gigabytes_is_refused(tmp_path):
    """Sound in itself and in a manifest of its own: somebody ships both with the tar."""
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    index_folder(tmp_path)
    file = tmp_path / "a.tar.idx"
    index = parse_index(file.read_bytes(), file)
    table = index.table.copy()
    table["length"][0] = MAX_SAMPLE_BYTES + 512
    forged = ShardIndex(table, 2**40, index.tar_sha256, index.labels).to_bytes()
    with pytest.raises(DataError, match="too large"):
        parse_index(forged, file)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 10**6,
        b'{"version": 1e999}',
        json.dumps({"version": 1, "shards": [{"name": "../a.tar"}]}).encode(),
        json.dumps({"version": 1, "samples": 2**70}).encode(),
        b"\xff\xfe\x00",
        b"",
        b"!!python/object/apply:os.system ['touch executed']",
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, content):
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    index_folder(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match="not a usable manifest"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("field", ["samples", "bytes"])
def test_a_manifest_of_more_than_a_tar_can_hold_is_refused(tmp_path, field):
    """Its totals and its digest are right."""
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    index_folder(tmp_path)
    told = json.loads((tmp_path / "manifest.json").read_text())
    told["shards"][0][field] = told[field] = 2**63
    told |= {"digest": digest([Shard(**told["shards"][0])]), "checksum": None}
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(
        DataError, match=rf"not a usable manifest: shards\.0\.{field}: Input should be less than"
    ):
        open_dataset(str(tmp_path))


# --- pictures


REFUSED_PICTURES = {
    "png without its pixels", "png beyond the cap", "png of 2^31 pixels a side", "png colour profile", "png text",
    "png international text", "png many texts", "jpeg header", "jpeg scans", "webp", "tiff", "gif", "bmp", "ico",
    "eps", "svg",
}  # fmt: skip


def test_bombs_are_refused_or_cost_no_more_than_the_cap_allows(tmp_path):
    """In a process of its own, with a limit on its processor time; each bomb is measured by itself."""
    program = Path(__file__).with_name("bombs.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name, (outcome, _) in found.items() if outcome.startswith("refused")} == REFUSED_PICTURES
    assert "data.max_pixels allows" in found["jpeg header"][0]
    for name, (_, mebibytes) in found.items():
        assert mebibytes * 2**20 <= BYTES_A_PIXEL * MAX_PIXELS, (name, mebibytes)
    assert list(tmp_path.iterdir()) == []  # the EPS would have made a file


def test_more_scans_than_any_encoder_writes_are_refused():
    assert decode(jpeg_of_scans(16, 50), 1, 10_000).shape == (16, 16, 1)
    assert decode(jpeg_of_scans(16, MAX_SCANS - 6), 1, 10_000).shape == (16, 16, 1)
    with pytest.raises(BadSampleError, match=f"more than {MAX_SCANS} scans"):
        decode(jpeg_of_scans(16, MAX_SCANS), 1, 10_000)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_phone_appends_to_a_picture_is_no_scan(progressive):
    film = b"\xff\xda\0\x0c" * (3 * MAX_SCANS)
    data = picture(1, 64, 64, "JPEG", progressive=progressive) + film
    assert not has_too_many_scans(data)
    assert decode(data, 3, 10_000).shape == (64, 64, 3)


def test_scans_of_single_components_are_counted_too():
    """A sequential JPEG with a scan for each component may repeat them as well."""
    with io.BytesIO() as file:
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        data = file.getvalue()
    at = data.index(b"\xff\xda")
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\0\x3f\0" + b"\x2f"
    assert not has_too_many_scans(data)
    assert has_too_many_scans(data[:at] + scan * (MAX_SCANS + 1) + b"\xff\xd9")


def test_tarfile_and_we_agree_that_the_sound_sample_is_sound(tmp_path):
    """The bytes that the cases above are built on, by another reader."""
    (tmp_path / "a.tar").write_bytes(sound() + END)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["good.cls", "good.png"]
    assert index_folder(tmp_path).samples == 1
