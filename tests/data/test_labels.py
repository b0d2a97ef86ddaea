"""Labels beyond the model's classes: a stray one is set aside, a wrong number of classes is said before training."""

from pathlib import Path

import pytest
from made import picture, sample_members, setting, write_tar
from store_server import serving
from test_loader import assert_equal, global_batches, train_loader
from typed import done

from pretrain.data import Dataset, check_labels, labels, open_dataset
from pretrain.data.scan import index_folder
from pretrain.errors import DataError


def made(folder: Path, classes: list[object], shards: int = 3, names: list[str] | None = None) -> Dataset:
    """Shards of 40 samples with labels as given, again and again."""
    for shard in range(shards):
        members = []
        for i in range(40):
            number = 40 * shard + i
            members += sample_members(f"k{number}", classes[number % len(classes)], picture(number, 9, 9))
        write_tar(folder / f"{shard}.tar", members)
    index_folder(folder, names)
    return open_dataset(str(folder))


def check(dataset: Dataset, num_classes: int = 10, **data: object) -> None:
    check_labels(dataset, setting(dataset, **data).config.data, num_classes)


STRAYS = [*range(10)] * 6 + [-1] + [*range(9)] + [999_999_999] + [*range(10)] * 4 + ["", "12.5"]
"""Two labels out of range and two that are no numbers in 113."""


def test_stray_labels_stop_nothing_and_are_never_trained_on(tmp_path, caplog):
    dataset = made(tmp_path, STRAYS)
    check(dataset)
    assert "labels go up to 999999999, but model.num_classes is 10; 1 of " in caplog.text
    with train_loader(dataset, batch=12, decode_threads=0) as loader:
        steps = [step for _, step in zip(range(10), loader.steps(0), strict=False)]
        reasons = {bad.reason for bad in loader.take_bad()}
    seen = {int(label) for batches in steps for batch in batches for label in batch.labels}
    assert seen <= set(range(10))
    assert len(reasons) == 4
    assert "label 999999999; model.num_classes is 10" in reasons


@pytest.mark.parametrize("world_size", [2, 3])
def test_stray_labels_are_replaced_the_same_on_any_ranks_and_after_a_restart(tmp_path, world_size):
    dataset = made(tmp_path, STRAYS)
    whole = global_batches(dataset, 1, 10, decode_threads=0)
    assert_equal(global_batches(dataset, world_size, 10), whole)
    assert_equal(global_batches(dataset, world_size, 3, first=5), whole[5:8])


def test_a_wrong_number_of_classes_is_said_before_training(tmp_path):
    dataset = made(tmp_path, [*range(20)])
    with pytest.raises(
        DataError,
        match=r"labels go up to 19, but model\.num_classes is 10; 60 of 120 samples looked at have a label from 10 on"
        r"(.|\n)*Set model\.num_classes to at least 20(.|\n)*verify FOLDER --num-classes 10",
    ):
        check(dataset)
    check(dataset, 20)


def test_labels_from_one_to_n_are_a_wrong_config_and_not_strays(tmp_path):
    """The usual mistake: classes counted from one."""
    with pytest.raises(DataError, match=r"12 of 120 samples looked at have a label from 10 on"):
        check(made(tmp_path, [*range(1, 11)]))


def test_more_named_classes_than_the_model_has_are_a_wrong_config_whatever_the_labels(tmp_path):
    dataset = made(tmp_path, [0, 1], names=["ant", "bee", "cat"])
    check(dataset, 3)
    with pytest.raises(
        DataError, match=r"names 3 classes, and labels go up to 1, but model\.num_classes is 2\n.*at least 3"
    ):
        check(dataset, 2)


def test_where_no_sample_may_be_bad_no_label_may_be_beyond(tmp_path):
    dataset = made(tmp_path, STRAYS)
    with pytest.raises(DataError, match=r"labels go up to 999999999, but model\.num_classes is 10"):
        check(dataset, max_bad_share=0.0)


def test_a_share_that_the_user_allows_is_allowed(tmp_path):
    dataset = made(tmp_path, [*range(10), 10])
    check(dataset, max_bad_share=0.2)
    check(dataset)  # ten may be bad in any case


def test_only_some_samples_of_each_source_are_looked_at(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(labels, "LOOKED_AT", 15)
    dataset = made(tmp_path, [*range(10)] * 10 + [11])
    check(dataset)
    assert "of 15 samples looked at" in caplog.text


def test_labels_of_a_store_are_looked_at_too_and_only_where_they_may_be_wrong(tmp_path):
    made(tmp_path, [*range(20)])
    with serving(tmp_path) as server:
        dataset = open_dataset(server.url)
        with pytest.raises(DataError, match=r"60 of 120 samples looked at"):
            check(dataset)
        server.requests.clear()
        check(dataset, 20)
        assert server.requests == []


def test_stats_of_a_stray_label_take_no_memory_for_it(tmp_path):
    made(tmp_path, STRAYS)
    output = done("stats", tmp_path).output
    assert "images whose label is none of them" in output
    named = made(tmp_path / "named", [0, 1, 7], names=["ant", "bee"])
    assert "images whose label is none of them" in done("stats", Path(named.source)).output
