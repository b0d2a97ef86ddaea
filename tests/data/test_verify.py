"""`pretrain shards verify`, `stats` and `repair`: every kind of damage is found and named, and can be left out."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made import Member, picture, sample_members, write_tar
from PIL import Image
from typed import contents, done, image_folder, refused, run, samples

from pretrain.data import open_dataset, raw
from pretrain.data import verify as verifying
from pretrain.data.index import index_path, parse_index
from pretrain.data.manifest import Shard
from pretrain.data.scan import Indexed, index_folder, write_manifest

JPEG = picture(3, 40, 30, "JPEG")


def problems(folder: Path, *options: object) -> list[tuple[str, int | None, str | None, str]]:
    """What `verify --json` says; its exit code is 1 if that is anything."""
    result = run("verify", folder, "--json", *options)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == (1 if lines else 0), (result.output, result.exception)
    return [(line["shard"], line["sample"], line["key"], line["reason"]) for line in lines]


def good(folder: Path, shards: int = 2, each: int = 4) -> Path:
    for i in range(shards):
        write_tar(folder / f"{i}.tar", [m for j in range(each) for m in sample_members(f"s{i}k{j}", j)])
    index_folder(folder)
    return folder


def with_members(folder: Path, members: list[Member]) -> Path:
    """Good shards and `bad.tar`, indexed: what is wrong with it only a look at the samples tells."""
    good(folder)
    write_tar(folder / "bad.tar", [*sample_members("first", 1), *members])
    index_folder(folder)
    return folder


def test_packed_shards_have_no_problem(digits):
    for split in ("train", "val"):
        assert problems(digits / split, "--workers", 2) == []
        assert problems(digits / split, "--fast") == []
    result = done("verify", digits / "val")
    assert "5 shards" in result.output
    assert f"all is well ({len(samples(digits / 'val'))} samples decoded)" in result.output


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.cls", b"1"), ("x.jpg", b"<html>")], "not decodable as JPEG, PNG, WEBP"),
        ([("x.cls", b"1"), ("x.jpg", b"")], "not decodable as"),
        ([("x.cls", b"1"), ("x.jpg", JPEG[: len(JPEG) // 2])], "not decodable as"),
        ([("x.cls", b"1"), ("x.png", picture(1)[:-30])], "not decodable as"),
        ([("x.cls", b"1"), ("x.png", picture(1, 100, 100))], "100 x 100 pixels; "),
    ],
)
def test_images_that_training_cannot_use_are_named(tmp_path, members, reason):
    ((shard, sample, key, said),) = problems(with_members(tmp_path, members), "--max-pixels", 9_000)
    assert (shard, sample, key) == ("bad.tar", 1, "x")
    assert said.startswith(reason)
    assert problems(tmp_path, "--fast") == []


def test_labels_out_of_range_are_named(tmp_path):
    folder = good(tmp_path, shards=1, each=6)
    assert problems(folder, "--num-classes", 6) == []
    found = problems(folder, "--num-classes", 4)
    assert [(sample, key) for _, sample, key, _ in found] == [(4, "s0k4"), (5, "s0k5")]
    assert found[0][3] == "the label is 4; 0 to 3 are in range"


def test_labels_beyond_the_class_names_or_the_manifests_range_are_named(tmp_path):
    good(tmp_path, shards=1, each=6)
    index_folder(tmp_path, ["a", "b", "c", "d", "e"])
    assert [p[1] for p in problems(tmp_path)] == [5]
    file = tmp_path / "0.tar"
    index = parse_index(index_path(file).read_bytes(), file)
    text = json.loads((tmp_path / "manifest.json").read_text())["shards"][0]
    write_manifest(tmp_path, [Indexed(Shard(**text), (1, 5))], None)
    assert [(p[1], p[3]) for p in problems(tmp_path)] == [(0, "the label is 0; 1 to 5 are in range")]
    assert index.labels == (0, 5)


def test_a_key_that_occurs_in_another_shard_is_named_once(tmp_path, monkeypatch):
    """And each shard is opened once for that: where all count their keys from 0, every sample is one of them."""
    good(tmp_path, shards=3)
    shutil.copy(tmp_path / "0.tar", tmp_path / "3.tar")
    index_folder(tmp_path)
    opened = []
    monkeypatch.setattr(verifying, "opened", lambda path: opened.append(path.name) or raw.opened(path))
    assert problems(tmp_path) == [
        ("3.tar", i, f"s0k{i}", f"sample {i} of 0.tar has the same key") for i in range(4)
    ]
    assert opened == ["0.tar", "1.tar", "2.tar", "3.tar", "0.tar", "3.tar"]


def tamper(folder: Path, name: str, change) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def test_changed_bytes_are_named_by_shard_and_sample(tmp_path):
    folder = good(tmp_path, shards=2)
    index = parse_index((folder / "1.tar.idx").read_bytes(), folder)
    start = int(index.table["offset"][2]) * 512

    def flip(data: bytearray) -> None:
        data[start + 512 + 3] ^= 1  # in the label of sample 2

    tamper(folder, "1.tar", flip)
    whole = ("1.tar", None, None, "the tar is not the one of the manifest (sha256)")
    sample = ("1.tar", 2, "s1k2", "its bytes are not those that were indexed (checksum)")
    assert problems(folder) == [whole, sample]
    assert problems(folder, "--fast") == [whole]


def test_a_tar_that_was_cut_names_what_is_lost(tmp_path):
    folder = good(tmp_path, shards=2)
    index = parse_index((folder / "0.tar.idx").read_bytes(), folder)
    end = int(index.table["offset"][3]) * 512
    tamper(folder, "0.tar", lambda data: data[: end + 100])
    found = problems(folder)
    assert [(p[0], p[1]) for p in found] == [("0.tar", None), ("0.tar", 3)]
    assert found[0][3].startswith(f"the tar has {end + 100:,} bytes; the manifest says")
    assert found[1][3] == "cut short: the tar ends before it"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "0.tar").unlink(), ["the tar cannot be read: No such file"]),
        (lambda f: (f / "0.tar.idx").unlink(), ["the index cannot be read: No such file"]),
        (lambda f: tamper(f, "0.tar.idx", lambda d: d[:-1]), ["the index is not usable: "]),
        (
            lambda f: shutil.copy(f / "1.tar.idx", f / "0.tar.idx"),
            ["the index is not the one of the manifest"],
        ),
        (lambda f: shutil.copy(f / "1.tar", f / "2.tar"), ["the tar is not in the manifest"]),
    ],
)
def test_missing_and_exchanged_files_are_named_and_the_rest_is_checked(tmp_path, damage, said):
    good(tmp_path)
    write_tar(tmp_path / "bad.tar", [("x.cls", b"1"), ("x.jpg", b"<html>")])
    index_folder(tmp_path)
    damage(tmp_path)
    for options in ((), ("--workers", 2)):
        found = problems(tmp_path, *options)
        assert any(p[3].startswith(said[0]) for p in found)
        assert ("bad.tar", 0, "x") in [p[:3] for p in found]
    assert any(p[3].startswith(said[0]) for p in problems(tmp_path, "--fast"))


def test_a_disk_that_does_not_give_a_tar_is_named(tmp_path):
    folder = good(tmp_path)
    tar = folder / "1.tar"
    tar.unlink()
    tar.symlink_to("/proc/self/mem")  # the kernel answers EIO
    named = [reason for shard, _, _, reason in problems(folder) if shard == tar.name]
    assert named == ["the tar cannot be read: Input/output error", "its samples were not looked at"]
    refused(r"1\.tar, sample 0: cannot be read: Input/output error", "stats", folder)


def test_every_flip_in_a_shard_is_found(tmp_path):
    folder = good(tmp_path, shards=1)
    generator = np.random.default_rng(0)
    size = (folder / "0.tar").stat().st_size
    for name, length in (("0.tar", size), ("0.tar.idx", (folder / "0.tar.idx").stat().st_size)):
        whole = (folder / name).read_bytes()
        for at in generator.integers(0, length, 40):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(generator.integers(8))
            (folder / name).write_bytes(damaged)
            assert problems(folder), (name, at)
        (folder / name).write_bytes(whole)
    assert problems(folder) == []


def test_the_table_shows_names_from_a_tar_as_harmless_text(tmp_path):
    folder = with_members(tmp_path, [("[red]x[bold].cls", b"1"), ("[red]x[bold].jpg", b"\x1b[2J")])
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "[red]" in result.output
    assert "\x1b[2J" not in result.output
    assert f"pretrain shards repair {folder}" in "".join(result.output.split("\n"))


def test_other_members_are_said_and_are_no_problem(tmp_path):
    result = done(
        "verify", with_members(tmp_path, [*sample_members("x", 1), ("x.json", b"{}"), ("x.txt", b"hello")])
    )
    assert "members that training does not look at: json (1), txt (1)" in result.output


def test_without_a_manifest_the_remedy_is_said(tmp_path):
    write_tar(tmp_path / "a.tar", sample_members("x", 1))
    for command in (
        ("verify", tmp_path),
        ("stats", tmp_path),
        ("repair", tmp_path, tmp_path / "b", "--report", "r"),
    ):
        refused(f"pretrain shards index {tmp_path}", *command)


# --- stats


def test_stats_count_what_is_there_and_draw_it(tmp_path, digits, digits_source):
    figure = tmp_path / "digits.png"
    result = done("stats", digits / "train", "--figure", figure, "--workers", 2)
    packed = samples(digits / "train")
    labels = Counter(label for _, _, label in packed)
    assert f"{len(packed)} samples in 5 shards" in result.output
    most, count = labels.most_common(1)[0]
    assert (
        f"{min(labels.values())}, {np.median(list(labels.values())):.0f}, {max(labels.values())}"
        in result.output
    )
    assert f"{most} ({count})" in result.output
    sizes = [Image.open(io.BytesIO(data)) for _, data, _ in packed]
    assert {(image.size, image.mode) for image in sizes} == {((8, 8), "L")}
    assert f"PNG    │ L    │ {len(packed)}" in result.output
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 500
    refused("cannot be written", "stats", digits / "train", "--figure", tmp_path / "no" / "where.png")
    refused("cannot be written", "stats", digits / "train", "--figure", tmp_path / "x.docx")


def test_a_sample_of_a_large_set_is_taken_in_even_steps(digits):
    result = done("stats", digits / "train", "--sample", 40)
    assert "of 40 of them in even steps" in result.output
    assert "PNG    │ L    │ 40" in result.output


def test_stats_percentiles_are_numpys(tmp_path):
    source = tmp_path / "images" / "a"
    source.mkdir(parents=True)
    widths = [7, 20, 90, 33, 41]
    for i, width in enumerate(widths):
        (source / f"{i}.png").write_bytes(picture(i, 10, width))
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "bad.png").write_bytes(picture(1, 10, 200))
    done("pack", tmp_path / "images", tmp_path / "out")
    result = done("stats", tmp_path / "out" / "train", "--max-pixels", 1000)
    line = next(line for line in result.output.splitlines() if "width" in line)
    cells = [cell.strip() for cell in line.split("│")[2:-1]]
    assert cells == [f"{v:,.0f}" for v in np.percentile(widths, (0, 1, 5, 25, 50, 75, 95, 99, 100))]
    assert "none   │      │ 1" in result.output


def test_stats_of_damaged_shards_count_what_is_bad(tmp_path):
    folder = good(tmp_path, shards=1, each=4)
    size = (folder / "0.tar").stat().st_size
    index = parse_index((folder / "0.tar.idx").read_bytes(), folder)
    start = int(index.table["offset"][1]) * 512
    tamper(folder, "0.tar", lambda data: data[:start] + bytes(size - start))
    assert "none   │      │ 3" in done("stats", folder).output
    tamper(folder, "0.tar", lambda data: bytes(size))
    refused(r"none of 4 samples has an image; `pretrain shards verify` says why", "stats", folder)


# --- repair


def bad_folder(folder: Path) -> Path:
    """Three shards: one with bad samples of several kinds, one with nothing else, one sound."""
    write_tar(folder / "0.tar", [m for j in range(4) for m in sample_members(f"a{j}", j)])
    mixed = [*sample_members("b0", 1), ("b1.cls", b"1"), ("b1.jpg", b"<html>"), *sample_members("b2", 2)]
    write_tar(folder / "1.tar", [*mixed, *sample_members("a3", 3)])
    write_tar(folder / "2.tar", [("c0.cls", b"1"), ("c0.jpg", b"")])
    index_folder(folder, ["w", "x", "y", "z"])
    return folder


def test_repair_leaves_out_what_verify_found(tmp_path):
    folder, report = bad_folder(tmp_path / "bad"), tmp_path / "report.jsonl"
    before = contents(folder)
    report.write_text(run("verify", folder, "--json").stdout)
    result = done("repair", folder, tmp_path / "good", "--report", report, "--workers", 2)
    for said in (
        "1.tar, sample 1 (b1): not decodable",
        "1.tar, sample 3 (a3): sample 3 of 0.tar has the same key",
    ):
        assert f"left out: {said}" in result.output
    assert "no sample of it is good: 2.tar" in result.output
    assert contents(folder) == before
    assert problems(tmp_path / "good") == []
    kept = [sample for sample in samples(folder) if sample[0] not in ("b1", "c0")]
    assert samples(tmp_path / "good") == kept[:-1]
    found = open_dataset(str(tmp_path / "good"))
    assert [Path(p).name for p in found.paths] == ["0.tar", "1.tar"]
    assert found.class_names == ("w", "x", "y", "z")
    assert (tmp_path / "good" / "0.tar").read_bytes() == (folder / "0.tar").read_bytes()


def test_repair_takes_a_runs_quarantine_report(tmp_path):
    folder = bad_folder(tmp_path / "bad")
    lines = [
        {"shard": f"{folder}/1.tar", "sample": 1, "key": "b1", "reason": "not decodable", "epoch": 3},
        {"shard": "1.tar", "sample": 1, "key": "b1", "reason": "again"},
        {"shard": "0.tar", "key": "a2", "reason": "by its key"},
        {"shard": "0.tar", "sample": 0, "key": None, "reason": "by its \x1b[2Jnumber"},
    ]
    for number in (1, 2):
        half = lines[: 2 * number][-2:]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in half))
    result = done(
        "repair",
        folder,
        tmp_path / "good",
        "--report",
        tmp_path / "1.jsonl",
        "--report",
        tmp_path / "2.jsonl",
    )
    assert [key for key, _, _ in samples(tmp_path / "good")] == ["a1", "a3", "b0", "b2", "a3", "c0"]
    assert "by its \N{REPLACEMENT CHARACTER}[2Jnumber" in result.output


def test_repaired_tars_end_as_gnu_tar_expects(tmp_path):
    folder, report = bad_folder(tmp_path / "bad"), tmp_path / "report.jsonl"
    report.write_text(json.dumps({"shard": "0.tar", "sample": 3, "reason": ""}) + "\n")
    done("repair", folder, tmp_path / "good", "--report", report)
    assert (tmp_path / "good" / "0.tar").stat().st_size % 10_240 == 0
    with tarfile.open(tmp_path / "good" / "0.tar") as tar:
        assert [m.name for m in tar] == [n for j in range(3) for n in (f"a{j}.cls", f"a{j}.png")]


def test_repair_saves_what_is_left_of_a_damaged_tar(tmp_path):
    folder, report = good(tmp_path / "bad", shards=2, each=6), tmp_path / "report.jsonl"
    intact = samples(folder)
    index = parse_index((folder / "1.tar.idx").read_bytes(), folder)
    end = int(index.table["offset"][4]) * 512
    tamper(folder, "1.tar", lambda data: data[: end + 100])
    tamper(folder, "0.tar", lambda data: data.__setitem__(600, data[600] ^ 1))
    report.write_text(run("verify", folder, "--json").stdout)
    result = done("repair", folder, tmp_path / "good", "--report", report)
    assert "about a shard as a whole, so nothing was left out for it: 1.tar: the tar has" in result.output
    assert samples(tmp_path / "good") == [*intact[1:6], *intact[6:10]]
    assert problems(tmp_path / "good") == []


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"shard": "9.tar", "sample": 0, "reason": ""}, r"line 1: '9\.tar' is not one of these shards"),
        ({"shard": "0.tar", "sample": 99, "reason": ""}, r"0\.tar has no sample 99"),
        ({"shard": "0.tar", "sample": -1, "reason": ""}, r"0\.tar has no sample -1"),
        (
            {"shard": "0.tar", "sample": 0, "key": "zz", "reason": ""},
            "it calls the sample 'zz', but it is 'a0'",
        ),
        ({"shard": "0.tar", "key": "zz", "reason": ""}, r"0\.tar has no sample of the key 'zz'"),
        ({"shard": "0.tar", "sample": "0"}, "sample is a number"),
        ({"shard": 3}, "an object with shard, sample, key and reason"),
        ("{", "JSON lines are needed"),
        (None, "not a report of bad samples"),
    ],
)
def test_a_report_about_something_else_is_refused(tmp_path, line, match):
    folder = bad_folder(tmp_path / "bad")
    if line is not None:
        (tmp_path / "r.jsonl").write_text(line if isinstance(line, str) else json.dumps(line))
    refused(match, "repair", folder, tmp_path / "good", "--report", tmp_path / "r.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == (["bad"] if line is None else ["bad", "r.jsonl"])


def test_repair_never_copies_damaged_bytes_and_never_writes_over_anything(tmp_path):
    folder, report = good(tmp_path / "bad"), tmp_path / "r.jsonl"
    report.write_text(json.dumps({"shard": "0.tar", "sample": 0, "reason": ""}))
    refused("never repaired in place", "repair", folder, folder, "--report", report)
    everything = [{"shard": f"{i}.tar", "sample": j} for i in range(2) for j in range(4)]
    report.write_text("".join(json.dumps(line) + "\n" for line in everything))
    refused("name every sample", "repair", folder, tmp_path / "good", "--report", report)
    report.write_text(json.dumps({"shard": "0.tar", "sample": 0, "reason": ""}))
    tamper(folder, "1.tar", lambda data: data.__setitem__(600, data[600] ^ 1))
    refused("no report names it", "repair", folder, tmp_path / "good", "--report", report)
    assert not (tmp_path / "good").exists()
    assert not list(tmp_path.glob(".*"))


def test_shards_of_a_folder_keep_their_place_when_repaired_in_parallel(tmp_path):
    source = image_folder(tmp_path / "images", per_class=20)
    done("pack", source, tmp_path / "out", "--shards", 6)
    (tmp_path / "r.jsonl").write_text("")
    done(
        "repair",
        tmp_path / "out" / "train",
        tmp_path / "same",
        "--report",
        tmp_path / "r.jsonl",
        "--workers",
        3,
    )
    assert contents(tmp_path / "same") == contents(tmp_path / "out" / "train")
