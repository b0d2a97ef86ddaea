import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import open_files, picture, sample_members, setting, write_tar
from patience import PATIENCE, wait_until
from PIL import Image

from pretrain.batch import Batch
from pretrain.config import TrainSourceConfig
from pretrain.data import Dataset, open_dataset, open_training
from pretrain.data import decode as decoding
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.decode import decode, decoder
from pretrain.data.fill import Filler
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.read import LocalReader
from pretrain.data.scan import index_folder
from pretrain.data.state import planned_order
from pretrain.errors import DataError

BATCH = 12


def train_loader(dataset: Dataset, rank: int = 0, world_size: int = 1, **options: object) -> TrainLoader:
    made = setting(dataset, world_size, **options)
    return TrainLoader(dataset, made.config.data, made.config.model, made.plan, seed=5, rank=rank)


def eval_loader(dataset: Dataset, rank: int = 0, world_size: int = 1, **options: object) -> EvalLoader:
    made = setting(dataset, world_size, **options)
    return EvalLoader(dataset, made.config.data, made.config.model, made.plan, rank=rank)


def counted(batches: list[Batch]) -> Batch:
    """The rows that count, as one batch."""
    rows = [batch.weights > 0 for batch in batches]
    return Batch(
        *(
            torch.cat([getattr(batch, name)[keep] for batch, keep in zip(batches, rows, strict=True)])
            for name in ("images", "labels", "weights", "positions")
        )
    )


def global_batches(
    dataset: Dataset, world_size: int, steps: int, first: int = 0, **options: object
) -> list[Batch]:
    """What all ranks together compute, step by step."""
    loaders = [train_loader(dataset, rank, world_size, **options) for rank in range(world_size)]
    try:
        streams = [loader.steps(first) for loader in loaders]
        return [counted([b for stream in streams for b in next(stream)]) for _ in range(steps)]
    finally:
        for loader in loaders:
            loader.close()


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("images", "labels", "positions"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture(scope="module")
def reference(train_set: Dataset) -> list[Batch]:
    """25 steps: one epoch and its seam."""
    return global_batches(train_set, 1, 25, decode_threads=0)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_global_batches_are_the_same_on_any_world_and_threads(train_set, reference, world_size, threads):
    assert_equal(global_batches(train_set, world_size, 25, decode_threads=threads), reference)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_accumulation_does_not_change_the_global_batch(train_set, reference, world_size, micro_batch):
    batches = global_batches(train_set, world_size, 4, micro_batch=micro_batch, decode_threads=1)
    assert_equal(batches, reference[:4])


@pytest.mark.parametrize(
    "policy",
    [
        {"crop": "inception", "randaugment_timm": {}, "random_erasing": {"prob": 1.0}},
        {"crop": "resize_crop", "three_augment": True, "color_jitter": {"brightness": 0.3, "contrast": 0.3}},
        {"randaugment_bv": {"magnitude": 15.0}},
    ],
    ids=["timm", "three_augment", "big_vision"],
)
def test_policies_do_not_depend_on_the_topology(train_set, policy):
    alone = global_batches(train_set, 1, 3, decode_threads=0, augment=policy)
    for world_size, threads in ((2, 2), (5, 0)):
        assert_equal(global_batches(train_set, world_size, 3, decode_threads=threads, augment=policy), alone)


def test_a_restart_at_a_step_equals_going_on(train_set, reference):
    assert_equal(global_batches(train_set, 3, 6, first=17, decode_threads=2), reference[17:23])


MIX = {"mix": ({"name": "a", "weight": 3}, {"name": "b", "weight": 1})}


@pytest.fixture(scope="module")
def mixed(digits: Path) -> Iterator[tuple[Dataset, dict[str, object], list[Batch]]]:
    """The training digits as two sources, the options that mix and repeat them, and 40 steps: epochs of both."""
    patterns = ("train-{000000..000003}.tar", "train-000004.tar")
    sources = zip(MIX["mix"], patterns, strict=True)
    train = {"mix": tuple(source | {"shards": f"{digits}/train/{name}"} for source, name in sources)}
    dataset = open_training(TrainSourceConfig.model_validate(train))
    options = {"train": train, "augment": {"repeats": 2}}
    return dataset, options, global_batches(dataset, 1, 40, decode_threads=0, **options)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    steps=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    worlds=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    threads=st.integers(0, 3),
    micro_batch=st.none() | st.integers(1, 6),
    prefetch=st.integers(1, 3),
    first=st.integers(0, 20),
)
@pytest.mark.parametrize("kind", ["plain", "mixed and repeated"])
def test_stops_and_other_topologies_change_no_sample(
    train_set, reference, mixed, kind, steps, worlds, threads, micro_batch, prefetch, first
):
    """Begin anywhere, stop and go on at any steps, each time with another world, threads and accumulation."""
    dataset, options, whole = mixed if kind != "plain" else (train_set, {}, reference)
    at = first
    for count, world in zip(steps, worlds, strict=False):
        count = min(count, len(whole) - at)
        batches = global_batches(
            dataset, world, count, first=at,
            decode_threads=threads, micro_batch=micro_batch, prefetch_steps=prefetch, **options,
        )  # fmt: skip
        assert_equal(batches, whole[at : at + count])
        at += count


def test_the_copies_of_a_sample_are_other_views_of_the_same_picture(mixed):
    dataset, options, whole = mixed
    for batch in whole[:10]:
        images, labels = batch.images.unflatten(0, (2, BATCH // 2)), batch.labels.view(2, BATCH // 2)
        assert torch.equal(labels[0], labels[1])
        differ = (images[0] != images[1]).flatten(1).any(1)
        assert differ.float().mean() > 0.5
    alike = global_batches(
        dataset, 1, 3, **options | {"augment": {"repeats": 2, "crop": "resize", "hflip": False}}
    )
    for batch in alike:
        images = batch.images.unflatten(0, (2, BATCH // 2))
        assert torch.equal(images[0], images[1])


def test_every_rank_and_step_has_the_planned_shape(train_set):
    made = setting(train_set, 5, micro_batch=2)
    assert (made.plan.accumulation, made.plan.micro_batch) == (2, 2)
    for rank in range(5):
        with train_loader(train_set, rank, 5, micro_batch=2) as loader:
            batches = next(loader.steps(0))
        assert [batch.images.shape for batch in batches] == [(2, 8, 8, 1)] * 2
        start, stop = made.plan.slice_of(rank)
        assert sum(float(batch.weights.sum()) for batch in batches) == stop - start
        for batch in batches:
            assert (batch.images.dtype, batch.labels.dtype) == (torch.uint8, torch.int64)
            assert (batch.weights.dtype, batch.positions.dtype) == (torch.float32, torch.int64)


def test_padding_repeats_a_real_row_of_the_rank(train_set):
    with train_loader(train_set, 0, 5, micro_batch=1) as loader:  # 2 rows in 3 micro-batches
        batches = next(loader.steps(0))
    assert [float(batch.weights) for batch in batches] == [1, 1, 0]
    assert torch.equal(batches[2].images, batches[1].images)
    assert torch.equal(batches[2].labels, batches[1].labels)


def test_a_row_is_its_samples_view_drawn_by_its_number_in_the_data_set(train_set):
    """The whole way, stage by stage: order, read, decode, draws, view."""
    made = setting(train_set)
    [batch] = global_batches(train_set, 1, 1, first=30)
    order = planned_order(train_set, made.plan, 5)
    view = TrainView(made.config.data.augment, made.config.model, "bilinear", seed=5)
    rows = order.batch(30)
    draws = view.draws(rows.epoch, train_set.starts[rows.shard] + rows.sample, rows.repeat)
    assert len(np.unique(rows.epoch)) == 1
    assert rows.epoch[0] > 0
    for i, sample in enumerate(LocalReader(train_set, 1).read(rows.shard, rows.sample)):
        expected = np.empty((8, 8, 1), np.uint8)
        part = partial(view.part, draws[i])
        view.render(decode(sample.image, 1, 1000, part), draws[i], expected)
        np.testing.assert_array_equal(batch.images[i].numpy(), expected)
        assert batch.labels[i] == sample.label
        assert batch.positions[i] == rows.position[i]


def test_an_epoch_shows_every_picture_with_its_label(train_set, digits_source):
    """Against the files that were packed, without augmentation, at their own size."""
    truth = {picture_of(path).tobytes(): int(path.parent.name) for path in digits_source.rglob("*.png")}
    options = {"augment": {"crop": "resize", "hflip": False}, "decode_threads": 2}
    n = len(train_set)
    rows = counted(global_batches(train_set, 2, -(-n // BATCH), **options))
    first_epoch = rows.positions < n
    seen = [
        (image.numpy().tobytes(), int(label))
        for image, label in zip(rows.images[first_epoch], rows.labels[first_epoch], strict=True)
    ]
    assert len(seen) == n
    assert all(truth[pixels] == label for pixels, label in seen)


def picture_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_evaluation_sees_every_sample_once_on_any_world(val_set, world_size, threads):
    batches = []
    lengths = set()
    for rank in range(world_size):
        with eval_loader(val_set, rank, world_size, decode_threads=threads, micro_batch=3) as loader:
            mine = list(loader)
            lengths.add((len(loader), len(mine)))
            assert {len(batch) for batch in mine} == {
                setting(val_set, world_size, micro_batch=3).plan.micro_batch
            }
            batches += mine
    assert len(lengths) == 1
    positions = counted(batches).positions
    assert torch.equal(positions.sort().values, torch.arange(len(val_set)))


def test_an_evaluation_row_is_the_evaluation_view_of_its_sample(val_set):
    options = {"val_crop": 0.75, "decode_threads": 2, "micro_batch": 5}
    with eval_loader(val_set, 1, 2, **options) as loader:
        rows = counted(list(loader))
    view = EvalView(0.75, "bilinear")
    samples = LocalReader(val_set, 1).read(*val_set.locate(rows.positions.numpy()))
    for image, label, sample in zip(rows.images, rows.labels, samples, strict=True):
        expected = np.empty((8, 8, 1), np.uint8)
        draws = np.empty(0)
        view.render(decode(sample.image, 1, 1000, partial(view.part, draws)), draws, expected)
        np.testing.assert_array_equal(image.numpy(), expected)
        assert label == sample.label


def test_evaluation_can_run_again_on_the_same_loader(val_set):
    with eval_loader(val_set, decode_threads=2) as loader:
        assert_equal(list(loader), list(loader))


def test_more_ranks_than_validation_samples_still_evaluate_each_once(tmp_path):
    tiny = two_samples(tmp_path)
    batches = [batch for rank in range(4) for batch in eval_loader(tiny, rank, 4)]
    assert len(batches) == 4
    assert sorted(counted(batches).positions.tolist()) == [0, 1]


def two_samples(folder: Path, second: bytes | None = None, label: int = 1) -> Dataset:
    write_tar(folder / "a.tar", sample_members("x", 0) + sample_members("y", label, second))
    index_folder(folder)
    return open_dataset(str(folder))


@pytest.mark.parametrize("threads", [0, 2])
def test_without_a_budget_an_undecodable_picture_names_shard_key_and_reason(tmp_path, threads):
    dataset = two_samples(tmp_path, second=b"<html>")
    loader = train_loader(dataset, decode_threads=threads, batch=4, max_bad_share=0.0)
    with loader, pytest.raises(DataError, match=r"a\.tar, sample 1 \(y\): not decodable"):
        list(islice(loader.steps(0), 3))
    assert no_decode_threads()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_picture_over_the_pixel_limit_is_refused_in_training(tmp_path, threads):
    dataset = two_samples(tmp_path, second=picture(0, 300, 300))
    loader = train_loader(dataset, decode_threads=threads, batch=4, max_pixels=10_000, max_bad_share=0.0)
    with loader, pytest.raises(DataError, match=r"a\.tar, sample 1 \(y\): 300 x 300 pixels"):
        next(loader.steps(0))


def test_a_label_out_of_range_is_refused_at_read_too(tmp_path):
    dataset = two_samples(tmp_path, label=3)
    with (
        train_loader(dataset, num_classes=3, batch=4, max_bad_share=0.0) as loader,
        pytest.raises(DataError, match=r"sample 1 \(y\): label 3"),
    ):
        next(loader.steps(0))


def test_bytes_that_changed_after_the_opening_stop_the_step(copied):
    folder = copied()
    dataset = open_dataset(str(folder))
    for tar in folder.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[600] ^= 1
        tar.write_bytes(content)
    with (
        train_loader(dataset) as loader,
        pytest.raises(DataError, match=r"sample 0: its bytes are not those"),
    ):
        list(islice(loader.steps(0), 30))


def test_no_thread_is_left_when_a_consumer_stops_early(train_set):
    with train_loader(train_set, decode_threads=3, prefetch_steps=8) as loader:
        next(loader.steps(0))
        assert not no_decode_threads()
    assert no_decode_threads()


def test_no_thread_is_left_when_the_consumer_fails(train_set):
    def fail(steps: Iterator[list[Batch]]) -> None:
        next(steps)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), train_loader(train_set, decode_threads=3) as loader:
        fail(loader.steps(0))
    assert no_decode_threads()


def test_no_descriptor_is_left_behind(train_set):
    folder = Path(train_set.paths[0]).parent
    for _ in range(3):
        with train_loader(train_set, decode_threads=2) as loader:
            list(islice(loader.steps(0), 5))
            assert open_files(folder)
        assert open_files(folder) == []


def test_waiting_is_measured(train_set):
    with train_loader(train_set, decode_threads=0) as loader:
        steps = loader.steps(0)
        waited = []
        for _ in range(3):
            next(steps)
            waited.append(loader.wait_seconds)
    assert 0 < waited[0] < waited[1] < waited[2]


def test_prefetched_steps_are_ready_when_asked_for(train_set, monkeypatch):
    """With time to work ahead, the next steps come although nothing is decoded any more."""
    fill, filled, going = Filler.fill, [], threading.Event()

    def counted(filler: Filler, *rows: object) -> object:
        assert going.wait(PATIENCE)
        filled.append(rows)
        return fill(filler, *rows)

    monkeypatch.setattr(Filler, "fill", counted)
    going.set()
    with train_loader(train_set, decode_threads=2, prefetch_steps=3) as loader:
        steps = loader.steps(0)
        next(steps)
        wait_until(lambda: len(filled) == 1 + 3)
        going.clear()
        for _ in range(3):
            next(steps)
        assert len(filled) == 1 + 3
        going.set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_cuda_lie_in_pinned_memory(train_set):
    made = setting(train_set)
    plan = replace(made.plan, device="cuda")
    with TrainLoader(train_set, made.config.data, made.config.model, plan, seed=0, rank=0) as loader:
        [batch] = next(loader.steps(0))
    assert all(t.is_pinned() for t in (batch.images, batch.labels, batch.weights, batch.positions))


def no_decode_threads() -> bool:
    return not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_decode_threads_follow_the_cores_that_the_process_was_given(train_set, monkeypatch):
    """Those of its affinity, not the machine's."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with train_loader(train_set, decode_threads="auto") as loader:
            assert loader._workers._threads._max_workers == 1
            monkeypatch.setattr("pretrain.data.loader.cores_given", lambda: 3)
        with train_loader(train_set, decode_threads="auto") as loader:
            assert loader._workers._threads._max_workers == 3
    finally:
        os.sched_setaffinity(0, before)


def test_a_loader_says_at_its_start_which_decoder_it_has(train_set, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="pretrain")
    with train_loader(train_set):
        assert [record.message for record in caplog.records] == [decoder()]
    caplog.clear()
    monkeypatch.setattr(decoding, "jpegbox", None)
    monkeypatch.setattr(decoding, "WHY_WHOLE", "not built")
    with train_loader(train_set):
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert "pictures are decoded whole, the native part is not there (not built)" in record.message
