"""`pretrain shards pack` and `index`, as they are typed."""

import errno
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from made import Member, picture, sample_members, write_tar
from PIL import Image
from typed import contents, done, image_folder, refused, run, samples

from pretrain.data import open_dataset
from pretrain.data.pack import ShardSize, open_source, pack
from pretrain.data.scan import index_folder
from pretrain.data.tar import MAX_HEADER_BYTES
from pretrain.errors import DataError


def idx_files(folder: Path, train: int = 10, val: int = 4, packed: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, count in (("train", train), ("t10k", val)):
        images[name] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", images[name]), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            data = header + values.tobytes()
            file = folder / f"{name}-{kind}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(data))
            else:
                file.write_bytes(data)
    return images


# --- pack


def test_an_image_folder_becomes_train_and_val(tmp_path):
    source, out = image_folder(tmp_path / "images"), tmp_path / "out"
    result = done("pack", source, out, "--val-share", 0.3, "--shards", 2)
    assert f"data.train.shards: {out / 'train'}" in result.output
    packed = samples(out / "train") + samples(out / "val")
    expected = [
        (f"{name}/{i}", (source / name / f"{i}.png").read_bytes(), label)
        for label, name in enumerate(("ant", "bee", "cat"))
        for i in range(6)
    ]
    assert sorted(packed) == sorted(expected)
    manifest = json.loads((out / "val" / "manifest.json").read_text())
    assert manifest["class_names"] == ["ant", "bee", "cat"]
    assert len(manifest["shards"]) == 2
    assert not list(tmp_path.glob(".*"))


def test_a_split_folder_stays_split(tmp_path):
    image_folder(tmp_path / "images" / "train")
    image_folder(tmp_path / "images" / "val", per_class=1, names=("bee", "dog"))
    done("pack", tmp_path / "images", tmp_path / "out", "--shards", 1)
    assert {key: label for key, _, label in samples(tmp_path / "out" / "val")} == {"bee/0": 1, "dog/0": 3}
    assert len(samples(tmp_path / "out" / "train")) == 18
    refused("already split", "pack", tmp_path / "images", tmp_path / "other", "--val-share", 0.1)


def test_folders_named_like_splits_are_no_classes(tmp_path):
    image_folder(tmp_path / "images" / "train")
    image_folder(tmp_path / "images" / "test", per_class=1)
    done("pack", tmp_path / "images", tmp_path / "out")
    assert {key: label for key, _, label in samples(tmp_path / "out" / "val")} == {
        "ant/0": 0, "bee/0": 1, "cat/0": 2,
    }  # fmt: skip
    (tmp_path / "images" / "validation" / "ant").mkdir(parents=True)
    refused("both a validation and a test", "pack", tmp_path / "images", tmp_path / "other")
    image_folder(tmp_path / "vehicles", names=("car", "train"))
    done("pack", tmp_path / "vehicles", tmp_path / "other")
    assert len(samples(tmp_path / "other" / "train")) == 12


def test_what_a_folder_holds_besides_images_is_said(tmp_path, caplog):
    source = image_folder(tmp_path / "images", per_class=1)
    for name in (
        "ant/1.bmp",
        "bee/deep/2.BMP",
        "notes",
        "loose.png",
        "ant/.hidden",
        ".more/x.bmp",
        "ant/.old/0.png",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(picture(1))
    done("pack", source, tmp_path / "out")
    assert len(samples(tmp_path / "out" / "train")) == 3
    assert (
        f"{source}: files that are no jpeg, jpg, png, webp below a class folder are left out: "
        ".bmp (2), notes (1), .png (1)"
    ) in caplog.text


@pytest.mark.parametrize(
    ("name", "target", "match"),
    [
        ("link.png", "nowhere.png", "link.png: is no file, or a link to nowhere"),
        ("more", ".", "not followed"),
    ],
)
def test_what_would_be_missing_in_silence_is_refused(tmp_path, name, target, match):
    source = image_folder(tmp_path / "images")
    (source / "ant" / name).symlink_to(target)
    refused(match, "pack", source, tmp_path / "out")


def test_names_that_are_no_utf8_are_packed_and_name_no_class(tmp_path):
    source = image_folder(tmp_path / "images", per_class=1)
    (source / os.fsdecode(b"ant/caf\xe9\n.png")).write_bytes(picture(1))
    done("pack", source, tmp_path / "out")
    assert "ant/caf__" in {key for key, _, _ in samples(tmp_path / "out" / "train")}
    (source / os.fsdecode(b"\xe9")).mkdir()
    refused(r"'\\udce9' cannot name a class: it is not UTF-8", "pack", source, tmp_path / "other")


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnists_files_become_greyscale_pngs(tmp_path, packed):
    images = idx_files(tmp_path / "idx", packed=packed)
    done("pack", tmp_path / "idx", tmp_path / "out", "--shards", 2)
    for name, split in (("train", "train"), ("t10k", "val")):
        packed_samples = samples(tmp_path / "out" / split)
        assert len(packed_samples) == len(images[name])
        for key, data, label in packed_samples:
            number = int(key.rpartition("/")[2])
            picture_read = Image.open(io.BytesIO(data))
            assert (picture_read.mode, picture_read.format, label) == ("L", "PNG", number % 10)
            np.testing.assert_array_equal(np.asarray(picture_read), images[name][number])


def test_packing_twice_gives_the_same_bytes(tmp_path):
    source = image_folder(tmp_path / "images")
    for out in ("one", "two"):
        done("pack", source, tmp_path / out, "--val-share", 0.3)
        time.sleep(1.1 if out == "one" else 0)  # a clock in the tars would show
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_gives_another_order_of_the_same_samples(tmp_path):
    source = image_folder(tmp_path / "images")
    for seed in (0, 1):
        done("pack", source, tmp_path / f"{seed}", "--seed", seed)
    first, second = (samples(tmp_path / f"{seed}" / "train") for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_shards_and_val_are_not_ordered_by_class(tmp_path):
    source = image_folder(tmp_path / "images", per_class=60)
    done("pack", source, tmp_path / "out", "--val-share", 0.25, "--shards", 3)
    for split in ("train", "val"):
        labels = np.array([label for _, _, label in samples(tmp_path / "out" / split)])
        assert np.abs(np.diff(labels)).mean() > 0.6  # 0 where ordered; 8/9 expected
        thirds = np.array_split(labels, 3)
        assert all(set(third) == {0, 1, 2} for third in thirds)
        assert np.bincount(labels).min() > 0.5 * len(labels) / 3


def test_an_image_keeps_its_split_when_others_join(tmp_path):
    done("pack", image_folder(tmp_path / "few", per_class=20), tmp_path / "a", "--val-share", 0.3)
    done("pack", image_folder(tmp_path / "many", per_class=40), tmp_path / "b", "--val-share", 0.3)
    val_of_few = {key for key, _, _ in samples(tmp_path / "a" / "val")}
    val_of_many = {key for key, _, _ in samples(tmp_path / "b" / "val")}
    assert val_of_few == {key for key in val_of_many if int(key.rpartition("/")[2]) < 20}


def test_shard_size_cuts_by_content(tmp_path):
    source = image_folder(tmp_path / "images", per_class=20)
    done("pack", source, tmp_path / "out", "--shard-size", 0.001)
    found = open_dataset(str(tmp_path / "out" / "train"))
    assert len(found) == 60
    assert len(found.shards) > 5
    for path in found.paths[:-1]:
        with tarfile.open(path) as tar:
            assert sum(m.size for m in tar if m.name.endswith("png")) >= 0.001 * 2**20


def test_tars_are_plain_ustar(digits):
    for path in (digits / "train").glob("*.tar"):
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            for member in tar:
                assert data[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
                assert member.type == tarfile.REGTYPE
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    source, out = image_folder(tmp_path / "images"), tmp_path / "out"
    done("pack", source, out)
    before = contents(out)
    refused(r"out exists\n.*--overwrite", "pack", source, out)
    assert contents(out) == before
    done("pack", source, out, "--val-share", 0.3, "--overwrite")
    assert contents(out) != before
    assert not list(tmp_path.glob(".*"))


def test_overwrite_never_deletes_what_is_not_packed_shards(tmp_path):
    source, out = image_folder(tmp_path / "images"), tmp_path / "out"
    done("pack", source, out)
    (out / "thesis.txt").write_text("five years")
    refused("holds more than packed shards", "pack", source, out, "--overwrite")
    refused("holds more than packed shards", "pack", source, source, "--overwrite")
    assert (out / "thesis.txt").exists()
    refused("thesis.txt is no folder", "pack", source, out / "thesis.txt", "--overwrite")


def test_a_failing_pack_leaves_what_was_there(tmp_path):
    source, out = image_folder(tmp_path / "images"), tmp_path / "out"
    done("pack", source, out)
    before = contents(out)
    found = open_source(source)
    (source / "bee" / "3.png").unlink()
    with pytest.raises(DataError, match=r"packing stopped, nothing was changed: .*bee/3\.png"):
        pack(found, out, val_share=0, size=ShardSize(1, 0), seed=0, overwrite=True)
    assert contents(out) == before
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", x())
    (tmp_path / "a.tar.idx.partial").mkdir()  # stands in for a read-only disk, which root would not notice
    refused("cannot be indexed: .*a.tar.idx.partial", "index", tmp_path)


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    """Root may enter any, so the system's answer is put in its place."""

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write_tar(tmp_path / "a.tar", x())
    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    refused("cannot be read: Permission denied", "index", tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read: Permission denied"):
        open_dataset(str(tmp_path))


def test_a_url_is_no_folder_of_a_command_on_files(tmp_path, monkeypatch):
    source = image_folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    for arguments in (("pack", source, "s3://bucket/out"), ("verify", "s3://bucket/out")):
        assert "'s3://bucket/out' is a URL; this command works on files" in run(*arguments).output
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_keys_that_would_be_one_are_refused(tmp_path):
    source = image_folder(tmp_path / "images")
    (source / "ant" / "0.jpg").write_bytes(picture(1, kind="JPEG"))
    refused(
        r"0\.png and .*0\.jpg would both have the key ant/0|0\.jpg and .*0\.png",
        "pack",
        source,
        tmp_path / "out",
    )


def test_names_with_dots_and_blanks_become_keys_that_stock_readers_group(tmp_path):
    source = image_folder(tmp_path / "images", per_class=1)
    (source / "ant" / "n01.v2 (copy).PNG").write_bytes(picture(3))
    done("pack", source, tmp_path / "out")
    assert "ant/n01_v2__copy_" in {key for key, _, _ in samples(tmp_path / "out" / "train")}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "holds neither MNIST's idx files nor a folder for each class"),
        (lambda p: (p / "ant").mkdir(parents=True), "no image"),
        (lambda p: image_folder(p, names=("__x__",)), "readers skip names"),
        (
            lambda p: (idx_files(p), (p / "t10k-labels-idx1-ubyte.gz").unlink()),
            r"t10k-labels-idx1-ubyte\[\.gz\] is missing",
        ),
        (lambda p: (idx_files(p), cut(p / "train-images-idx3-ubyte.gz")), "cannot be read"),
        (lambda p: (idx_files(p, packed=False), cut(p / "train-images-idx3-ubyte")), "cut short"),
        (
            lambda p: (idx_files(p, packed=False), (p / "train-labels-idx1-ubyte").write_bytes(b"PK")),
            "not an idx file",
        ),
        (lambda p: swap_labels(p), "do not match"),
    ],
)
def test_a_source_that_cannot_be_packed_is_named(tmp_path, make, match):
    make(tmp_path / "source")
    refused(match, "pack", tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def swap_labels(folder: Path) -> None:
    idx_files(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "train-labels-idx1-ubyte.gz")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 0))


def test_a_val_share_that_leaves_a_split_empty_is_refused(tmp_path):
    source = image_folder(tmp_path / "images", per_class=1)
    refused("leaves train or val empty", "pack", source, tmp_path / "out", "--val-share", 0.000001)


# --- index


def test_stock_tars_are_indexed_and_say_what_to_do_next(tmp_path):
    write_tar(tmp_path / "b.tar", [m for i in range(3) for m in sample_members(f"k{i}", i)])
    write_tar(tmp_path / "a.tar", [m for i in range(2) for m in sample_members(f"k{i}", 7)])
    result = done("index", tmp_path)
    assert f"data.train.shards: {tmp_path}" in result.output
    found = open_dataset(str(tmp_path))
    assert [Path(path).name for path in found.paths] == ["a.tar", "b.tar"]
    assert (found.shard_samples.tolist(), found.labels) == ([2, 3], (0, 7))


def test_indexing_packed_shards_again_changes_nothing(copied):
    folder = copied()
    before = contents(folder)
    done("index", folder)
    assert contents(folder) == before


def x(label: object = 1) -> list[Member]:
    return sample_members("x", label)


def y(label: object = 2) -> list[Member]:
    return sample_members("y", label)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([x()[0], *y(), x()[1]], "members of sample x do not stand together"),
        ([*x(), *y(), *x()], "members of sample x do not stand together, or its key occurs twice"),
        ([*x(), x()[1]], r"x\.png occurs twice"),
        ([*x(), ("x.PNG", b"")], r"x\.png occurs twice"),
        ([*x(), ("x.jpg", b"")], r"sample 0 \(x\): holds two images"),
        ([x()[0], y()[0]], r"none of its 2 samples is usable; .*sample 0 \(x\): holds no image"),
        ([x()[1], y()[1]], r"none of its 2 samples is usable; .*sample 0 \(x\): holds no label"),
        ([("../../etc/x.cls", b"1"), ("../../etc/x.png", b"")], r"'../../etc/x\.cls'.*refused"),
        ([("/etc/x.cls", b"1"), ("/etc/x.png", b"")], r"absolute names"),
        ([("a\nb.cls", b"1"), ("a\nb.png", b"")], "control characters"),
        (x("seven"), r"sample 0 \(x\): the label is b'seven'"),
        (x("-1"), "the label is"),
        (x("1.5"), "the label is"),
        (x(""), "the label is"),
        (x("9" * 30), "the label is"),
        ([], "holds no sample"),
        ([("README", b"")], "holds no sample"),
    ],
)
def test_tars_that_no_reader_should_trust_are_refused(tmp_path, members, match):
    write_tar(tmp_path / "good.tar", x())
    write_tar(tmp_path / "z.tar", members)
    refused(rf"z\.tar(.|\n)*{match}", "index", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_few_samples_without_label_or_image_are_indexed_with_a_warning(tmp_path, caplog):
    """Training replaces them; refusing a tar of ten thousand for one would lose the others."""
    bad = [("n.png", x()[1][1]), ("i.cls", b"3"), *sample_members("w", "seven")]
    write_tar(tmp_path / "a.tar", [*x(), *bad, *y()])
    done("index", tmp_path)
    assert "a.tar: 3 of 5 samples are bad; the first: " in caplog.text
    assert "sample 1 (n): holds no label" in caplog.text
    found = open_dataset(str(tmp_path))
    assert (len(found), found.labels) == (5, (1, 2))


def test_names_of_classes_are_not_lost_in_silence(copied, caplog):
    folder = copied()
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_label": 9', '"max_label": 8'))
    done("index", folder)
    assert "names of classes, if it has any, are not taken over" in caplog.text
    assert "its checksum does not match its labels or class names" in caplog.text


def test_a_tar_cut_anywhere_is_refused_or_whole(tmp_path):
    """A cut may cost padding after the end of the archive, never a sample in silence."""
    good = write_tar(tmp_path / "good" / "a.tar", [m for i in range(5) for m in sample_members(f"k{i}", i)])
    data = good.read_bytes()
    end = len(data.rstrip(b"\0"))
    (tmp_path / "cut").mkdir()
    for length in sorted({*range(0, len(data), 177), *range(0, len(data), 512)}):
        (tmp_path / "cut" / "a.tar").write_bytes(data[:length])
        assert samples_found(tmp_path / "cut") in ((None, 5) if length > end else (None,))


def samples_found(folder: Path) -> int | None:
    """Samples of a folder of tars; none where it is refused."""
    try:
        return index_folder(folder).samples
    except DataError:
        return None


def test_damaged_headers_are_refused_not_skipped(tmp_path):
    """`tarfile` ends in silence at a damaged header; every sample behind it would be lost."""
    good = write_tar(
        tmp_path / "a.tar", [m for i in range(5) for m in sample_members(f"k{i}", i)]
    ).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [member.offset for member in tar]
    generator = np.random.default_rng(0)
    for offset in offsets:
        for at in generator.integers(0, 512, 8):
            damaged = bytearray(good)
            damaged[offset + at] ^= 1 << int(generator.integers(7))
            (tmp_path / "a.tar").write_bytes(damaged)
            with pytest.raises(DataError, match=r"a\.tar"):
                index_folder(tmp_path)


def test_two_tars_in_one_file_are_refused(tmp_path):
    one = write_tar(tmp_path / "a.tar", x()).read_bytes()
    (tmp_path / "a.tar").write_bytes(one * 2)
    refused("several tars in one file", "index", tmp_path)


def test_a_compressed_tar_is_refused(tmp_path):
    plain = write_tar(tmp_path / "a.tar", x()).read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(plain))
    refused("not an uncompressed tar", "index", tmp_path)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_a_giant_header_is_refused_unread(tmp_path, kind):
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, 50 * MAX_HEADER_BYTES
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(header.size + 10_240)
    refused(f"at most {MAX_HEADER_BYTES} are read", "index", tmp_path)


def test_a_sparse_member_is_refused(tmp_path):
    cls, png = x()
    write_tar(tmp_path / "a.tar", [cls, png])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmembers()[1]
    member.type = tarfile.GNUTYPE_SPARSE
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    refused("is a sparse file", "index", tmp_path)


def test_members_renamed_by_a_header_for_the_whole_tar_are_refused(tmp_path):
    """A ranged read does not see that header and would read the sample under another name."""
    member = tarfile.TarInfo("y.png")
    renamed = {"path": "x.png"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers=renamed) as tar:
        tar.addfile(member)
    refused("its members depend on headers before it", "index", tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    refused(r"there is no \.tar file", "index", tmp_path)


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys; import pretrain.shards; "
        "print([m for m in ('torch', 'webdataset', 'numpy', 'PIL', 'pydantic', 'tqdm') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
