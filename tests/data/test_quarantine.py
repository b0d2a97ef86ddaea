"""Bad samples in training: the same ones stand in on any topology, each is counted once, too many end the run."""

import json
from pathlib import Path

import numpy as np
import pytest
from made import Member, picture, sample_members, write_tar
from test_loader import assert_equal, counted, eval_loader, global_batches, train_loader

from pretrain.data import Dataset, open_dataset
from pretrain.data.quarantine import FLOOR, REPORT, TRIES, BadSample, Quarantine, replaced, stand_ins
from pretrain.data.scan import index_folder
from pretrain.errors import BadSampleError, DataError

OPTIONS = {"num_classes": 10, "max_pixels": 10_000, "in_chans": 3}
REASONS = {
    "html": "not decodable",
    "empty": "not decodable",
    "cut": "not decodable",
    "giant": "300 x 300 pixels; data.max_pixels allows 10,000",
    "no-label": "holds no label",
    "no-image": "holds no image",
    "words": "the label is b'seven'",
    "beyond": "label 12; model.num_classes is 10",
    "two": "holds two images",
}
"""What is wrong with the sample of that key, and how it is said."""


def damaged(key: str) -> list[Member]:
    label, image = sample_members(key, 5, picture(7))
    return {
        "html": [label, (image[0], b"<html>404</html>")],
        "empty": [label, (image[0], b"")],
        "cut": [label, (image[0], image[1][: len(image[1]) // 2])],
        "giant": [label, (image[0], picture(0, 300, 300))],
        "no-label": [image],
        "no-image": [label],
        "words": [(label[0], b"seven"), image],
        "beyond": [(label[0], b"12"), image],
        "two": [label, image, (f"{key}.jpg", picture(1, kind="JPEG"))],
    }[key]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three shards of 20 samples; three bad ones in each, the first two of them neighbours, the last at the end."""
    folder = tmp_path_factory.mktemp("spoilt")
    keys = iter(REASONS)
    for shard in range(3):
        members = []
        for i in range(20):
            if i in (6, 7, 19):
                members += damaged(next(keys))
            else:
                members += sample_members(f"{shard}-{i}", i % 10, picture(100 * shard + i))
        write_tar(folder / f"{shard}.tar", members)
    index_folder(folder)
    return open_dataset(str(folder))


def places(dataset: Dataset) -> dict[tuple[str, int], str]:
    """(shard, sample) of each bad one, with its key."""
    keys = iter(REASONS)
    return {(path, i): next(keys) for path in dataset.paths for i in (6, 7, 19)}


@pytest.fixture(scope="module")
def reference(spoilt: Dataset) -> list:
    """11 steps of 12: two epochs and the seam between them."""
    return global_batches(spoilt, 1, 11, decode_threads=0, **OPTIONS)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_same_samples_stand_in_on_any_world_threads_and_restart(spoilt, reference, world_size, threads):
    options = OPTIONS | {"decode_threads": threads, "micro_batch": 2}
    assert_equal(global_batches(spoilt, world_size, 11, **options), reference)
    assert_equal(global_batches(spoilt, world_size, 3, first=4, **options), reference[4:7])


def test_a_process_that_decodes_replaces_and_reports_the_same(spoilt, reference):
    with train_loader(spoilt, decode_threads=2, workers="processes", **OPTIONS) as loader:
        steps = [step for _, step in zip(range(5), loader.steps(0), strict=False)]
        assert {bad.key for bad in loader.take_bad()} == set(REASONS)
    assert_equal([counted(batches) for batches in steps], reference[:5])


def test_a_stand_in_is_the_next_good_sample_seen_as_the_bad_one_was_to_be(spoilt):
    """The same data set without damage, in which each bad sample holds what stands in for it, gives the same batches."""
    whole = spoilt_as_replaced(Path(spoilt.source).with_name("as-replaced"))
    options = OPTIONS | {
        "decode_threads": 0,
        "block_mib": 1.0,
    }  # a block is a shard, whatever the bytes of a sample
    assert_equal(*(global_batches(dataset, 1, 11, **options) for dataset in (spoilt, whole)))


def spoilt_as_replaced(folder: Path) -> Dataset:
    for shard in range(3):
        members = []
        for i in range(20):
            source = {6: 8, 7: 8, 19: 0}.get(i, i)
            _, image = sample_members("", 0, picture(100 * shard + source))
            members += sample_members(f"{shard}-{i}", source % 10, image[1])
        write_tar(folder / f"{shard}.tar", members)
    index_folder(folder)
    return open_dataset(str(folder))


@pytest.mark.parametrize(("world_size", "repeats"), [(1, 1), (3, 1), (5, 3)])
def test_each_bad_sample_is_counted_once_over_epochs_ranks_and_repeats(spoilt, tmp_path, world_size, repeats):
    """Five batches of 12 samples are an epoch of 60; padded rows, copies and later epochs add nothing to the count."""
    (tmp_path / "logs").mkdir()
    totals = np.zeros(15, dtype=int)
    for rank in range(world_size):
        quarantine = Quarantine(tmp_path, rank, 0.5)
        more = {"batch": 12 * repeats, "augment": {"repeats": repeats}, "micro_batch": 5, "decode_threads": 2}
        with train_loader(spoilt, rank, world_size, **OPTIONS, **more) as loader:
            for step, _ in zip(range(15), loader.steps(0), strict=False):
                totals[step] += quarantine.record(loader.take_bad())
        assert loader.take_bad() == []
    assert totals[:5].sum() == len(REASONS)
    assert totals[5:].sum() == 0
    quarantine.merge()
    lines = [json.loads(line) for line in (tmp_path / REPORT).read_text().splitlines()]
    assert {(line["shard"], line["sample"]): line["key"] for line in lines} == places(spoilt)
    for line in lines:
        assert REASONS[line["key"]] in line["reason"]
        assert line["epoch"] == 0
        assert 0 <= line["position"] < 60 * repeats
    assert lines == sorted(lines, key=lambda line: (line["shard"], line["sample"]))


def test_a_restart_on_other_ranks_reports_no_sample_twice(spoilt, tmp_path):
    (tmp_path / "logs").mkdir()
    for rank, world_size, first in ((0, 1, 0), (0, 2, 2), (1, 2, 2)):
        quarantine = Quarantine(tmp_path, rank, 0.5)
        with train_loader(spoilt, rank, world_size, decode_threads=0, **OPTIONS) as loader:
            for _, _ in zip(range(5), loader.steps(first), strict=False):
                quarantine.record(loader.take_bad())
    quarantine.merge()
    lines = (tmp_path / REPORT).read_text().splitlines()
    assert len(lines) == len(REASONS)
    own = tmp_path / "logs" / "quarantine.rank_0.jsonl"
    assert len(own.read_text().splitlines()) == len(REASONS)  # rank 0 knew them all from the first attempt


def test_what_was_prefetched_and_never_handed_out_is_not_reported(spoilt):
    with train_loader(spoilt, decode_threads=2, prefetch_steps=8, batch=6, **OPTIONS) as loader:
        next(loader.steps(0))
        assert all(bad.position < 6 for bad in loader.take_bad())


def test_an_evaluation_replaces_nothing_and_names_the_sample(spoilt):
    with eval_loader(spoilt, decode_threads=2, **OPTIONS) as loader, pytest.raises(DataError) as caught:
        list(loader)
    assert "0.tar, sample 6 (html): not decodable" in str(caught.value)
    assert "Nothing stands in for a bad sample in an evaluation" in str(caught.value)


def test_without_a_budget_every_kind_is_an_error(spoilt):
    with (
        train_loader(spoilt, max_bad_share=0.0, **OPTIONS) as loader,
        pytest.raises(DataError, match=r"\d\.tar, sample (6|7|19) \((.|\n)*max_bad_share is 0"),
    ):
        for _, _ in zip(range(5), loader.steps(0), strict=False):
            pass


def test_a_flipped_bit_is_never_taken_for_a_bad_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(8) for m in sample_members(f"k{i}", i)])
    index_folder(tmp_path)
    dataset = open_dataset(str(tmp_path))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 + 512 + 20] ^= 4  # in the picture of sample 0
    (tmp_path / "a.tar").write_bytes(data)
    with train_loader(dataset, batch=8) as loader, pytest.raises(DataError, match="its bytes are not those"):
        next(loader.steps(0))
    assert loader.take_bad() == []


def test_stand_ins_are_the_next_ones_around_the_shard():
    assert list(stand_ins(2, 5)) == [3, 4, 0, 1]
    assert list(stand_ins(0, 1)) == []
    assert list(stand_ins(10, 1000)) == list(range(11, 11 + TRIES))


@pytest.mark.parametrize("samples", [1, 3, 1000])
def test_a_shard_without_a_good_sample_in_reach_is_an_error(samples):
    tried = []

    def fail(number: int) -> int:
        tried.append(number)
        raise BadSampleError("empty", "a.tar, sample 7", "k")

    with pytest.raises(DataError, match="nothing can stand in for sample 0") as caught:
        replaced(0, samples, fail)
    assert not isinstance(caught.value, BadSampleError)
    assert tried == list(stand_ins(0, samples))


# --- the budget


@pytest.mark.parametrize(
    ("share", "seen", "allowed"),
    [(0.0, 10**6, 0), (1e-4, 10, FLOOR), (1e-4, 10**5, 10), (1e-4, 5 * 10**5, 50), (0.5, 8, FLOOR)],
)
def test_the_budget_is_a_share_of_the_distinct_samples_seen(tmp_path, share, seen, allowed):
    quarantine = Quarantine(tmp_path, 0, share)
    quarantine.check(allowed, seen)
    assert not quarantine.allows(allowed + 1, seen)
    with pytest.raises(DataError, match=rf"{allowed + 1} of the .*\n.*quarantine\.jsonl names each"):
        quarantine.check(allowed + 1, seen)


# --- the files


def bad(sample: int, position: int = 0, epoch: int = 0, key: str = "k") -> BadSample:
    return BadSample("s/a.tar", sample, key, "broken", epoch, position, 0)


def test_a_line_that_a_kill_cut_short_spoils_no_other(tmp_path):
    (tmp_path / "logs").mkdir()
    Quarantine(tmp_path, 0, 0.1).record([bad(1, 1), bad(2, 2)])
    file = tmp_path / "logs" / "quarantine.rank_0.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    again = Quarantine(tmp_path, 0, 0.1)
    assert again.record([bad(1, 1), bad(2, 2), bad(3, 3)]) == 3
    again.merge()
    assert [json.loads(line)["sample"] for line in (tmp_path / REPORT).read_text().splitlines()] == [1, 2, 3]


def test_a_key_of_strange_characters_stays_one_line(tmp_path):
    (tmp_path / "logs").mkdir()
    strange = bad(1, key="ключ\u2028\x85 b")
    quarantine = Quarantine(tmp_path, 0, 0.1)
    quarantine.record([strange])
    quarantine.merge()
    assert (tmp_path / REPORT).read_bytes().count(b"\n") == 1
    assert json.loads((tmp_path / REPORT).read_text()) == strange._asdict()


def test_a_run_without_bad_samples_writes_no_report(tmp_path):
    (tmp_path / "logs").mkdir()
    quarantine = Quarantine(tmp_path, 0, 0.1)
    assert quarantine.record([]) == 0
    quarantine.merge()
    assert list(tmp_path.rglob("*.jsonl")) == []
