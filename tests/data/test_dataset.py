"""Opening a data set: what it tells, and what it refuses before training begins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made import sample_members, write_tar
from patience import PATIENCE

from pretrain.data import contact, facts, open_dataset
from pretrain.data.scan import index_folder
from pretrain.errors import DataError
from pretrain.logs import log


def test_a_folder_and_the_pattern_of_all_its_shards_are_one_data_set(digits):
    folder = digits / "train"
    whole = open_dataset(str(folder))
    for pattern in (f"{folder}/train-{{000000..000004}}.tar", f"{folder}/train-00000{{0,1,2,3,4}}.tar"):
        assert open_dataset(pattern).digest == whole.digest
    assert open_dataset(f"{folder}/").paths == whole.paths


def test_a_pattern_takes_a_part_of_a_folder_and_shards_of_several(digits):
    part = open_dataset(f"{digits}/train/train-{{000001..000002}}.tar")
    assert [Path(path).name for path in part.paths] == ["train-000001.tar", "train-000002.tar"]
    both = open_dataset(f"{digits}/train/train-000003.tar::{digits}/val/val-000000.tar")
    assert len(both.shards) == 2
    assert part.digest != both.digest


def test_facts_are_those_of_the_manifests(digits, train_set, val_set):
    manifest = json.loads((digits / "train" / "manifest.json").read_text())
    found = facts(train_set, val_set)
    assert (found.samples, found.shards, found.digest) == (manifest["samples"], 5, manifest["digest"])
    assert found.bytes == sum(path.stat().st_size for path in (digits / "train").glob("*.tar"))
    assert (found.val_samples, found.val_digest) == (len(val_set), val_set.digest)
    assert len(train_set) + len(val_set) == 300
    assert (facts(train_set, None).val_samples, facts(train_set, None).val_digest) == (0, "")


def test_the_digest_names_the_samples_not_the_place(copied, train_set):
    folder = copied()
    assert open_dataset(str(folder)).digest == train_set.digest
    write_tar(folder / "train-000002.tar", sample_members("other", 1))
    index_folder(folder)
    assert open_dataset(str(folder)).digest != train_set.digest


def test_numbers_are_located_across_shards(train_set):
    shard, sample = train_set.locate(np.arange(len(train_set)))
    assert np.bincount(shard).tolist() == train_set.shard_samples.tolist()
    np.testing.assert_array_equal(train_set.starts[shard] + sample, np.arange(len(train_set)))


def test_too_few_classes_are_refused_before_training(train_set):
    train_set.require_classes(10)
    with pytest.raises(DataError, match=r"labels go up to 9, but model\.num_classes is 9"):
        train_set.require_classes(9)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder\n.*shards pack"):
        open_dataset(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: there is no such folder"):
        open_dataset(str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        index_folder(tmp_path / "nowhere")


def test_tars_without_a_manifest_are_indexed_on_first_contact_as_by_hand(copied, train_set):
    folder = copied()
    for path in folder.glob("*.idx"):
        path.unlink()
    (folder / "manifest.json").unlink()
    found = open_dataset(f"{folder}/train-{{000000..000004}}.tar")
    assert (found.digest, found.shards) == (train_set.digest, train_set.shards)
    before = (folder / "manifest.json").stat()
    assert open_dataset(str(folder)).digest == train_set.digest
    assert (folder / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns


def test_several_processes_at_first_contact_index_once(copied, train_set):
    folder = copied()
    (folder / "manifest.json").unlink()
    code = "import sys; from pretrain.data import open_dataset; print(open_dataset(sys.argv[1]).digest)"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {process.communicate(timeout=PATIENCE)[0].strip() for process in started} == {train_set.digest}


def test_tars_in_a_folder_that_cannot_be_written_are_indexed_in_the_cache(
    copied, train_set, tmp_path, monkeypatch
):
    """Root may write anywhere, so the folder of links is asked for directly."""
    folder = copied()
    for path in [*folder.glob("*.idx"), folder / "manifest.json"]:
        path.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tars = sorted(folder.glob("*.tar"))
    place = contact._links(folder, tars)
    found = open_dataset(str(contact.indexed(place)))
    assert found.digest == train_set.digest
    assert sorted(path.name for path in folder.iterdir()) == [tar.name for tar in tars]
    assert contact._links(folder, tars) == place
    os.utime(tars[0], (1, 1))
    assert contact._links(folder, tars) != place


def test_more_bytes_than_are_indexed_on_first_contact_name_the_command(copied):
    folder = copied()
    (folder / "manifest.json").unlink()
    with (folder / "train-000000.tar").open("r+b") as file:
        file.truncate(contact.MAX_BYTES)  # a hole
    with pytest.raises(
        DataError,
        match=rf"no manifest\.json beside 5 tars of 10\.0 GiB(.|\n)*Run `pretrain shards index {folder}`",
    ):
        open_dataset(str(folder))


def test_missing_shards_and_indexes_are_counted_and_named(copied):
    folder = copied()
    (folder / "train-000001.tar.idx").unlink()
    with pytest.raises(
        DataError, match=r"1 of 5 indexes are missing: .*train-000001\.tar\.idx\n.*shards index"
    ):
        open_dataset(str(folder))
    (folder / "train-000003.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 5 shards are missing: .*train-000003\.tar\n.*shards index"):
        open_dataset(str(folder))


def test_a_link_to_nowhere_is_named(copied):
    folder = copied()
    (folder / "train-000003.tar").unlink()
    (folder / "train-000003.tar").symlink_to(folder / "gone.tar")
    with pytest.raises(DataError, match=r"train-000003\.tar: cannot be read: No such file"):
        open_dataset(str(folder))


def test_a_shard_cut_short_is_found_at_the_opening(copied):
    folder = copied()
    tar = folder / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-000000\.tar: .* bytes, but its manifest says"):
        open_dataset(str(folder))


def test_a_shard_that_is_not_in_the_manifest_is_refused(copied):
    folder = copied()
    with pytest.raises(DataError, match=r"train-000009\.tar: not in the manifest\.json beside it"):
        open_dataset(f"{folder}/train-{{000000,000009}}.tar")


def test_a_shard_named_twice_is_refused(digits):
    with pytest.raises(DataError, match=r"train-000001\.tar twice"):
        open_dataset(f"{digits}/train/train-{{000001,000001}}.tar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"version": 2}, "version"),
        (lambda m: m | {"extra": 1}, "extra"),
        (lambda m: m | {"samples": m["samples"] + 1}, "totals"),
        (lambda m: m | {"digest": "0" * 64}, "digest does not match"),
        (lambda m: m | {"shards": []}, "shards"),
        (lambda m: m | {"shards": m["shards"] * 2}, "twice"),
        (lambda m: m | {"max_label": -1}, "max_label"),
        (lambda m: m | {"shards": [m["shards"][0] | {"name": "../x.tar"}]}, "name"),
        (lambda m: m | {"shards": [m["shards"][0] | {"samples": 0}]}, "samples"),
        (lambda m: m | {"shards": [m["shards"][0] | {"samples": "5"}]}, "samples"),
        (lambda m: [], "object"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(copied, change, message):
    folder = copied()
    file = folder / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(
        DataError, match=rf"manifest\.json: not a usable manifest: .*{message}(.|\n)*shards index"
    ):
        open_dataset(str(folder))


def test_a_manifest_that_is_not_json_is_refused(copied):
    folder = copied()
    (folder / "manifest.json").write_bytes(b"\x00\xff{")
    with pytest.raises(DataError, match="not a usable manifest"):
        open_dataset(str(folder))


def test_a_tar_that_the_manifest_does_not_name_is_left_out_aloud(copied, train_set, caplog):
    folder = copied()
    shutil.copy(next(folder.glob("*.tar")), folder / "zz-new.tar")
    log.addHandler(caplog.handler)
    try:
        assert open_dataset(str(folder)).digest == train_set.digest
    finally:
        log.removeHandler(caplog.handler)
    assert "1 tars are not in its manifest and are left out: " in caplog.text
    assert "zz-new.tar" in caplog.text
    assert "pretrain shards index" in caplog.text
