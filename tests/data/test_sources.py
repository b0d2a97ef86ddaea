"""What `pretrain shards pack` reads: tables, parquet with images, label maps; and what it does to an image."""

import csv
import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import picture
from PIL import Image, ImageOps
from typed import contents, done, image_folder, refused, samples
from webdataset import TarWriter

from pretrain.data.pack import Columns
from pretrain.data.pack import unpack as unpacking
from pretrain.data.pack.parquet_images import open_parquet_images
from pretrain.data.pack.unpack import RowGroups

ROWS = [(f"{name}/{i}.png", name) for name in ("ant", "bee", "cat") for i in range(6)]


def table(path: Path, rows: Sequence[Sequence[object]], columns: Sequence[str] = ("path", "label")) -> Path:
    """A CSV or parquet file, by its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        cells = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        pq.write_table(pa.table(cells), path, row_group_size=5)
    return path


def keys_and_labels(folder: Path) -> dict[str, int]:
    return {key: label for key, _, label in samples(folder)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_gives_the_shards_of_the_folder_that_it_lists(tmp_path, kind):
    source = image_folder(tmp_path / "images")
    done("pack", source, tmp_path / "a", "--val-share", 0.3, "--shards", 2)
    done("pack", table(source / f"list.{kind}", ROWS), tmp_path / "b", "--val-share", 0.3, "--shards", 2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_may_say_split_and_key_and_index(tmp_path, kind):
    source = image_folder(tmp_path / "images")
    rows = [
        (7, "first", "ant/0.png", "train", "not looked at"),
        (3, "a/second", "bee/1.png", "train", ""),
        (3, "third", "bee/2.png", "validation", ""),
    ]
    columns = ("label", "key", "path", "split", "notes")
    done("pack", table(source / f"list.{kind}", rows, columns), tmp_path / "out")
    assert keys_and_labels(tmp_path / "out" / "train") == {"first": 7, "a/second": 3}
    assert keys_and_labels(tmp_path / "out" / "val") == {"third": 3}
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert manifest["class_names"] is None


def test_excels_csv_with_a_byte_order_mark_is_read(tmp_path):
    source = image_folder(tmp_path / "images")
    (source / "list.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\nant/0.png,1\r\n")
    done("pack", source / "list.csv", tmp_path / "out")
    assert keys_and_labels(tmp_path / "out" / "train") == {"ant/0": 1}


def test_root_says_where_the_paths_of_a_table_start(tmp_path):
    source = image_folder(tmp_path / "images")
    listed = table(tmp_path / "lists" / "list.csv", ROWS[:3])
    refused(r"line 2: .*is no file", "pack", listed, tmp_path / "out")
    done("pack", listed, tmp_path / "out", "--root", source)
    assert len(samples(tmp_path / "out" / "train")) == 3
    refused("is no table of paths; leave --root out", "pack", source, tmp_path / "b", "--root", source)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/secret.png", "ant/../../secret.png", "link.png", "door/secret.png"]
)
def test_no_path_of_a_table_leads_out_of_its_folder(tmp_path, path):
    source = image_folder(tmp_path / "images")
    (tmp_path / "secret.png").write_bytes(picture(1))
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    (source / "door").symlink_to(tmp_path)
    listed = table(source / "list.csv", [("ant/0.png", 0), (path, 1)])
    refused(r"line 3: .*leads out of (.|\n)*--root", "pack", listed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_the_folder_are_followed(tmp_path):
    source = image_folder(tmp_path / "images")
    (source / "link.png").symlink_to(source / "ant" / "0.png")
    done("pack", table(source / "list.csv", [("link.png", 0)]), tmp_path / "out")
    assert samples(tmp_path / "out" / "train") == [("link", (source / "ant" / "0.png").read_bytes(), 0)]


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        ([("ant/0.png", 0)], ("file", "label"), "has no column path; it has file, label"),
        ([("ant/0.png", 0)], ("path", "class"), "has no column label"),
        ([("ant/0.png", 0, 1)], ("path", "label", "label"), "two columns named label"),
        ([], ("path", "label"), "lists no image"),
        ([("ant/0.png", "")], ("path", "label"), "line 2: the label is empty"),
        (
            [("ant/0.png", 0), ("ant/0.png", 0)],
            ("path", "label"),
            r"line 3 and .*line 2 would both have the key ant/0",
        ),
        (
            [("ant/0.png", 0, "k"), ("ant/1.png", 0, "k")],
            ("path", "label", "key"),
            "would both have the key k",
        ),
        ([("ant/0.png", 0, "../k")], ("path", "label", "key"), r"'\.\./k' cannot be a key"),
        ([("ant/0.png", 0, "a.b")], ("path", "label", "key"), "'a.b' cannot be a key"),
        ([("ant/0.png", 0, "__meta__/a")], ("path", "label", "key"), "readers skip names like that"),
        ([("ant/0.png", 0, "dev")], ("path", "label", "split"), "a split is named 'dev'"),
        (
            [("ant/0.png", 0, "test"), ("ant/1.png", 0, "val")],
            ("path", "label", "split"),
            "both a validation and a test",
        ),
        ([("ant/none.png", 0)], ("path", "label"), r"line 2: .*ant/none\.png is no file"),
        ([("ant", 0)], ("path", "label"), "'ant' ends in none of"),
        ([("ant/a\x1bb.png", 0)], ("path", "label"), "control characters"),
        ([("ant/a\0b.png", 0)], ("path", "label"), "control characters|cannot be read as CSV"),
        *(
            (
                [("ant/0.png", 10), ("ant/1.png", other)],
                ("path", "label"),
                f"line 3: the label {other} is a number, but no",
            )
            for other in ("-1", "2.0", "nan", "10000000000")
        ),
        ([("ant/0.png", 0, "more")], ("path", "label"), "line 2: 3 cells; the table has 2 columns"),
    ],
)
def test_a_table_that_cannot_be_packed_is_named(tmp_path, rows, columns, match):
    source = image_folder(tmp_path / "images")
    refused(match, "pack", table(source / "list.csv", rows, columns), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "data"), [("list.csv", b"\xff\xfe\x00"), ("list.parquet", b"PAR1 no")])
def test_a_table_of_other_bytes_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    refused(rf"{name}: cannot be read as", "pack", tmp_path / name, tmp_path / "out")


# --- label map


@pytest.mark.parametrize("name", ["map.json", "map.csv"])
def test_a_label_map_decides_the_indexes(tmp_path, name):
    source, file = image_folder(tmp_path / "images"), tmp_path / name
    wanted = {"cat": 0, "dog": 1, "ant": 2, "bee": 3}
    lines = "".join(f"{key},{index}\n" for key, index in wanted.items())
    file.write_text(json.dumps(wanted) if name == "map.json" else f"name,index\n{lines}")
    done("pack", source, tmp_path / "a", "--label-map", file)
    assert keys_and_labels(tmp_path / "a" / "train") == {
        f"{c}/{i}": wanted[c] for c in ("ant", "bee", "cat") for i in range(6)
    }
    manifest = json.loads((tmp_path / "a" / "train" / "manifest.json").read_text())
    assert manifest["class_names"] == ["cat", "dog", "ant", "bee"]
    done("pack", table(source / "list.csv", ROWS), tmp_path / "b", "--label-map", file)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_label_that_the_map_does_not_have_is_named(tmp_path):
    source, file = image_folder(tmp_path / "images"), tmp_path / "map.json"
    file.write_text('{"ant": 0, "bee": 1}')
    refused(
        "class folders cat are not in the label map", "pack", source, tmp_path / "out", "--label-map", file
    )
    listed = table(source / "list.csv", ROWS)
    refused(
        r"line 14: the label 'cat' is not in the label map; it has ant, bee",
        "pack",
        listed,
        tmp_path / "out",
        "--label-map",
        file,
    )


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("m.json", '{"a": 0, "b": 2}', "2 names need the indexes 0 to 1, each once; it gives 0, 2"),
        ("m.json", '{"a": 0, "b": 0}', "each once"),
        ("m.json", '{"a": 0, "a": 1}', "'a' occurs twice"),
        ("m.json", '{"a": true}', "an object of names and indexes"),
        ("m.json", '{"a": {"b": 0}}', "an object of names and indexes"),
        ("m.json", '["a"]', "an object of names and indexes"),
        ("m.json", "[" * 100_000, "not JSON"),
        ("m.json", "{", "not JSON"),
        ("m.csv", "a,0\nb\n", "a name and an index are needed in each line; one is 'b'"),
        ("m.csv", "a,0\nb,-1\n", "a name and an index"),
        ("m.csv", "", "0 names need"),
        ("m.csv", None, "cannot be read"),
    ],
)
def test_a_label_map_that_does_not_number_the_classes_is_refused(tmp_path, name, text, match):
    source = image_folder(tmp_path / "images")
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(match, "pack", source, tmp_path / "out", "--label-map", tmp_path / name)


# --- parquet with images


def hugging_face(
    path: Path,
    labels: Sequence[object],
    names: Sequence[str] | None = None,
    first: int = 0,
    columns: tuple[str, str] = ("image", "label"),
) -> list[bytes]:
    """A file as `datasets` writes it: image {bytes, path}, label, and its notes on the columns. Returns the images."""
    images = [picture(first + i, 10, 12, "JPEG" if i % 2 else "PNG") for i in range(len(labels))]
    image = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    made = pa.table({columns[0]: image, columns[1]: list(labels)})
    if names is not None:
        notes = {"info": {"features": {columns[1]: {"names": list(names), "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(notes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=4)
    return images


def test_hugging_faces_parquet_becomes_shards(tmp_path, monkeypatch):
    folder, names = tmp_path / "hub", ["no", "yes"]
    monkeypatch.setattr("pretrain.data.pack.parquet_images.PART_BYTES", 1)  # each row group is a part
    first = hugging_face(folder / "train-00000-of-00002.parquet", [0, 1] * 5, names)
    second = hugging_face(folder / "train-00001-of-00002.parquet", [1, 0, 1], names, first=50)
    val = hugging_face(folder / "validation-00000-of-00001.parquet", [1, 1], names, first=90)
    done("pack", folder, tmp_path / "out", "--shards", 3)
    expected = [(f"train-00000-of-00002/{i:08d}", data, i % 2) for i, data in enumerate(first)]
    expected += [(f"train-00001-of-00002/{i:08d}", data, (i + 1) % 2) for i, data in enumerate(second)]
    assert sorted(samples(tmp_path / "out" / "train")) == sorted(expected)
    assert sorted(data for _, data, _ in samples(tmp_path / "out" / "val")) == sorted(val)
    manifest = json.loads((tmp_path / "out" / "val" / "manifest.json").read_text())
    assert manifest["class_names"] == names
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as tar:
        assert {Path(m.name).suffix for m in tar} == {".cls", ".jpg", ".png"}
    assert not list(tmp_path.glob(".*"))


def test_parquet_without_names_split_by_hash_with_other_columns(tmp_path):
    path = tmp_path / "all.parquet"
    images = hugging_face(path, ["x", "y", "x"] * 10, columns=("img", "kind"))
    refused("has no column label", "pack", path, tmp_path / "out", "--image-column", "img")
    done(
        "pack", path, tmp_path / "out", "--image-column", "img", "--label-column", "kind", "--val-share", 0.3
    )
    packed = samples(tmp_path / "out" / "train") + samples(tmp_path / "out" / "val")
    assert sorted(packed) == sorted((f"all/{i:08d}", data, int(i % 3 == 1)) for i, data in enumerate(images))


def test_plain_binary_columns_with_keys_and_splits(tmp_path):
    images = [picture(i) for i in range(4)]
    made = {
        "image": images,
        "label": [0, 1, 0, 1],
        "key": ["a", "b", "c", "d"],
        "split": ["train"] * 3 + ["test"],
    }
    pq.write_table(pa.table(made), tmp_path / "x.parquet")
    done("pack", tmp_path / "x.parquet", tmp_path / "out")
    assert keys_and_labels(tmp_path / "out" / "train") == {"a": 0, "b": 1, "c": 0}
    assert samples(tmp_path / "out" / "val") == [("d", images[3], 1)]


def write(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: write(p, a=[1], b=[2]), "has no column path nor label; it has a, b"),
        (
            lambda p: write(p, image=["text"], label=[0]),
            "the column image is of type string; bytes of image files",
        ),
        (lambda p: write(p, image=[b""], label=[None]), "row 0: the label is empty"),
        (
            lambda p: write(
                p, image=pa.array([{"bytes": None}], pa.struct([("bytes", pa.binary())])), label=[0]
            ),
            "it is not in the file",
        ),
        (lambda p: write(p, image=[b"<html>"], label=[0]), "not an image of JPEG, PNG, WEBP"),
        (
            lambda p: hugging_face(p, [0, 1, -1], ["a", "b"]),
            r"row 2: the label is -1, but the file names classes 0 to 1",
        ),
        (lambda p: hugging_face(p, [0, 1, 2], ["a", "b"]), r"row 2: the label is 2"),
        (
            lambda p: write(p, image=[picture(1)] * 2, label=[0, 0], key=["k", "k"]),
            "would both have the key k",
        ),
        (lambda p: cut(p, [0] * 40), "cannot be read as parquet"),
        (
            lambda p: write(p, image=[b"", b""], label=[0.0, 1.0]),
            r"row 0: the label 0\.0 is a number, but no class",
        ),
        (lambda p: hugging_face(p, [0.0, math.nan], ["a", "b"]), r"row 0: the label is 0\.0, but"),
        (lambda p: write(p, image=[b""], label=[b"cat"]), "row 0: the label is of type bytes"),
        (
            lambda p: write(p, image=[b"", b""], label=[0, 1], split=["train", None]),
            "row 1: the split is empty",
        ),
        (lambda p: write(p, image=[b""], label=[0], key=pa.array([None], pa.string())), "the key is empty"),
        (lambda p: table(p, [("a.png", [0])]), "row 0: the label is of type list"),
    ],
)
def test_parquet_that_cannot_be_packed_is_named(tmp_path, make, match):
    make(tmp_path / "x.parquet")
    refused(match, "pack", tmp_path / "x.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(path: Path, labels: list[int]) -> None:
    """A page of images is overwritten: the file opens and its labels can be read."""
    hugging_face(path, labels)
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)


def test_files_that_name_classes_differently_are_refused(tmp_path):
    hugging_face(tmp_path / "hub" / "a.parquet", [0, 1], ["x", "y"])
    hugging_face(tmp_path / "hub" / "b.parquet", [0, 1], ["y", "x"], first=9)
    refused("name their classes differently", "pack", tmp_path / "hub", tmp_path / "out")


def test_files_of_which_some_give_splits_and_some_none_are_refused(tmp_path):
    """The images of those that do would be left out."""
    write(tmp_path / "a.parquet", image=[picture(1)], label=[0], split=["train"])
    write(tmp_path / "b.parquet", image=[picture(2)], label=[0])
    refused(
        "of some images which split they are in, and of others nothing", "pack", tmp_path, tmp_path / "out"
    )


def test_what_was_unpacked_is_kept_and_a_changed_file_is_not(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    hugging_face(path, [0] * 9)
    (part,) = open_parquet_images([path], Columns(), None).parts
    assert isinstance(part, RowGroups)
    assert part.unpack(tmp_path) == 9
    monkeypatch.setattr(unpacking, "_BATCH", None)  # it would fail if it read again
    assert part.unpack(tmp_path) == 9
    hugging_face(path, [1] * 8)
    (other,) = open_parquet_images([path], Columns(), None).parts
    assert other.name != part.name


# --- images


def test_tars_are_those_of_webdatasets_writer(tmp_path):
    source = image_folder(tmp_path / "images")
    done("pack", source, tmp_path / "out", "--shards", 1)
    with io.BytesIO() as file:
        with TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for key, data, label in samples(tmp_path / "out" / "train"):
                tar.write({"__key__": key, "png": data, "cls": str(label).encode()})
        assert (tmp_path / "out" / "train" / "train-000000.tar").read_bytes() == file.getvalue()


def turned(
    path: Path, height: int, width: int, orientation: int, kind: str, mode: str = "RGB"
) -> Image.Image:
    """Write a picture with an EXIF orientation; returns it upright, as Pillow turns it."""
    image = Image.open(io.BytesIO(picture(5, height, width))).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return ImageOps.exif_transpose(Image.open(path))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")]
)
def test_larger_images_are_shrunk_upright(tmp_path, kind, mode, orientation):
    upright = turned(tmp_path / "images" / "ant" / f"0.{kind.lower()}", 60, 100, orientation, kind, mode)
    done("pack", tmp_path / "images", tmp_path / "out", "--longest-side", 50, "--quality", 95)
    ((_, data, _),) = samples(tmp_path / "out" / "train")
    shrunk = Image.open(io.BytesIO(data))
    assert (shrunk.format, shrunk.mode, dict(shrunk.getexif())) == (kind, mode, {})
    assert max(shrunk.size) == 50
    expected = upright.resize(shrunk.size, Image.Resampling.LANCZOS)
    assert shrunk.size == ((50, 30) if orientation < 5 else (30, 50))
    difference = np.abs(np.asarray(shrunk).astype(int) - np.asarray(expected))
    assert difference.mean() < (1e-9 if kind == "PNG" else 3)


def test_images_that_are_small_enough_are_stored_as_they_are(tmp_path):
    turned(tmp_path / "images" / "ant" / "0.jpg", 50, 40, 6, "JPEG")
    done("pack", tmp_path / "images", tmp_path / "out", "--longest-side", 50)
    ((_, data, _),) = samples(tmp_path / "out" / "train")
    assert data == (tmp_path / "images" / "ant" / "0.jpg").read_bytes()


BAD = {
    "html.jpg": b"<html>not found</html>",
    "empty.png": b"",
    "cut.png": picture(1)[:20],
    "huge.png": picture(2, 60, 60),
}


def test_an_image_that_is_none_stops_the_pack_and_is_named(tmp_path):
    source = image_folder(tmp_path / "images")
    for name, data in BAD.items():
        (source / "bee" / name).write_bytes(data)
        refused(
            rf"packing stopped, nothing was changed: .*bee/{name} \(bee/{name[:-4]}\): (not an image|60 x 60 pixels)(.|\n)*--skip-bad",
            *("pack", source, tmp_path / "out", "--max-pixels", 3000, "--shards", 1),
        )
        (source / "bee" / name).unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_bad_images_are_left_out_when_asked_and_listed(tmp_path):
    source = image_folder(tmp_path / "images")
    for name, data in BAD.items():
        (source / "bee" / name).write_bytes(data)
    result = done("pack", source, tmp_path / "out", "--max-pixels", 3000, "--skip-bad", "--shards", 2)
    assert "4 bad images were left out: see" in result.output
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "train" / "skipped.jsonl").read_text().splitlines()
    ]
    assert sorted(line["key"] for line in lines) == ["bee/cut", "bee/empty", "bee/html", "bee/huge"]
    assert len(samples(tmp_path / "out" / "train")) == 18
    for path in source.rglob("*.png"):
        path.write_bytes(b"")
    refused(
        "no image of train-00000. is usable|no image of train-000000.tar is usable",
        "pack",
        source,
        tmp_path / "b",
        "--skip-bad",
    )


def test_a_cut_jpeg_that_has_to_be_shrunk_is_bad(tmp_path):
    source = image_folder(tmp_path / "images")
    whole = picture(1, 200, 200, "JPEG", quality=95)
    (source / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    refused(r"ant/cut\.jpg .*not decodable", "pack", source, tmp_path / "out", "--longest-side", 100)
