"""Several sources by weight, repeated samples, and what a checkpoint says of both."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import sample_members, write_tar
from test_order import RAGGED, naive

from pretrain.config import Config, Plan, TrainSourceConfig, resolve
from pretrain.config.data import MAX_SOURCES
from pretrain.config.plan import DataFacts, Hardware, SourceShare, slice_bounds
from pretrain.config.ratios import whole_ratios
from pretrain.data import Dataset, open_training
from pretrain.data.mixing import MIN_BLOCK, Mix
from pretrain.data.order import Order, Rows, Share
from pretrain.data.scan import index_folder
from pretrain.data.skipped import Skipped
from pretrain.data.state import check_continues, data_state, distinct_seen, source_epochs
from pretrain.errors import CheckpointError, DataError

RATIOS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ratios=RATIOS, seed=st.integers(0, 2**32 - 1), block=st.integers(0, 2**40))
def test_every_block_holds_each_source_exactly_by_its_ratio(ratios, seed, block):
    size = sum(ratios) * -(-MIN_BLOCK // sum(ratios))
    source, number = Mix(ratios, seed).deal(block * size, size)
    counts = np.bincount(source, minlength=len(ratios))
    assert (counts * sum(ratios) == np.array(ratios) * size).all()
    for s in range(len(ratios)):
        first = block * counts[s]
        assert number[source == s].tolist() == list(range(first, first + counts[s]))


@settings(max_examples=60, deadline=None)
@given(ratios=RATIOS, first=st.integers(0, 10_000), count=st.integers(1, 3000))
def test_a_seek_in_a_mixture_equals_walking_and_knows_the_counts(ratios, first, count):
    mix = Mix(ratios, seed=3)
    source, number = mix.deal(0, first + count)
    here = mix.deal(first, count)
    np.testing.assert_array_equal(here[0], source[first:])
    np.testing.assert_array_equal(here[1], number[first:])
    walked = np.bincount(source[:first], minlength=len(ratios))
    np.testing.assert_array_equal(mix.before(first), walked)
    for s in range(len(ratios)):  # a source is walked without a gap
        assert number[source == s].tolist() == list(range((source == s).sum()))


def test_neighbours_of_an_even_mixture_are_of_one_source_half_of_the_time():
    """Strict alternation would have every pair of neighbours, which mixup joins, come from two sources."""
    source, _ = Mix([1, 1], seed=0).deal(0, 40_000)
    assert abs((source[0::2] == source[1::2]).mean() - 0.5) < 0.02


def test_what_a_mixture_was_asked_before_never_shows():
    mix = Mix([3, 1], seed=0)
    for first, count in ((0, 10), (5, 2000), (1020, 8), (2**40, 3), (0, 10), (1024, 1)):
        for ours, fresh in zip(mix.deal(first, count), Mix([3, 1], seed=0).deal(first, count), strict=True):
            np.testing.assert_array_equal(ours, fresh)


def test_a_mixture_is_pinned():
    """It is part of a run's identity: a change here breaks every resume, and must be a new version of the order."""
    source, number = Mix([3, 1], seed=1).deal(5000, 16)
    assert source.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]
    assert number[:4].tolist() == [1254, 1255, 3746, 3747]


@pytest.mark.parametrize(
    ("weights", "ratios"),
    [
        ([0.75, 0.25], (3, 1)),
        ([3, 1], (3, 1)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([1.0], (1,)),
        ([1e-3, 1.0], (1, 1000)),
        ([300, 100, 200], (3, 1, 2)),
    ],
)
def test_weights_are_taken_as_they_are_written(weights, ratios):
    assert whole_ratios(weights) == ratios


def test_weights_that_no_block_holds_exactly_are_refused_with_round_ones():
    with pytest.raises(ValueError, match=r"14,197,122 in whole numbers.* such as 1 : 11$"):
        whole_ratios([1281167, 14197122])
    with pytest.raises(ValueError, match="above 0"):
        whole_ratios([1, 0])


SOURCES = [RAGGED, [9, 30], [4]]
SHARES = [Share(7, 5), Share(2, 2), Share(1, 1)]
ALL_SHARDS = [samples for shards in SOURCES for samples in shards]
FIRST = np.cumsum([0, *map(sum, SOURCES)])


def order(*, batch: int = 24, lanes: int = 4, repeats: int = 1, mixed: bool = True) -> Order:
    return Order(
        ALL_SHARDS if mixed else RAGGED,
        seed=7,
        global_batch=batch,
        lanes=lanes,
        block_samples=6,
        window_blocks=3,
        sources=SHARES if mixed else [],
        repeats=repeats,
    )


def ids(rows: Rows) -> np.ndarray:
    """Numbers of the samples in the data set."""
    return np.concatenate(([0], np.cumsum(ALL_SHARDS)))[rows.shard] + rows.sample


def stacked(made: Order, steps: range) -> Rows:
    """The rows of steps in the order of their positions."""
    rows = Rows(*(np.concatenate(column) for column in zip(*map(made.batch, steps), strict=True)))
    return Rows(*(column[np.argsort(rows.position)] for column in rows))


def test_each_source_of_a_mixture_goes_through_its_epochs_in_its_own_order():
    rows = stacked(order(), range(150))
    source = np.searchsorted(FIRST, ids(rows), side="right") - 1
    given = Mix([share.ratio for share in SHARES], 7).before(150 * 24)
    for s, shards in enumerate(SOURCES):
        n = sum(shards)
        own, epoch = ids(rows)[source == s] - FIRST[s], rows.epoch[source == s]
        assert len(own) == given[s]
        np.testing.assert_array_equal(epoch, np.arange(len(own)) // n)
        for e in range(2):
            expected = naive(shards, e, lanes=4, block=6, window=3, source=s)
            assert own[e * n : (e + 1) * n].tolist() == expected
    assert given.min() > 2 * min(map(sum, SOURCES))


def test_equal_sources_are_shuffled_differently():
    made = Order(
        [100, 100], seed=1, global_batch=20, lanes=1, block_samples=5, window_blocks=2,
        sources=[Share(1, 1), Share(1, 1)],
    )  # fmt: skip
    rows = stacked(made, range(20))
    first, second = rows.sample[rows.shard == 0][:100], rows.sample[rows.shard == 1][:100]
    assert (first == second).mean() < 0.2


@settings(max_examples=60, deadline=None)
@given(
    repeats=st.integers(1, 4),
    lanes=st.integers(1, 4),
    lane_rows=st.integers(1, 3),
    world=st.integers(1, 9),
    step=st.integers(0, 10**6),
    mixed=st.booleans(),
)
def test_ranks_together_hold_the_batch_whatever_is_mixed_and_repeated(
    repeats, lanes, lane_rows, world, step, mixed
):
    options = {"batch": repeats * lanes * lane_rows, "lanes": lanes, "repeats": repeats, "mixed": mixed}
    batch = options["batch"]
    whole = order(**options).batch(step)
    parts = [
        order(**options).rows(step, *slice_bounds(batch, r, min(world, batch)))
        for r in range(min(world, batch))
    ]
    for field, column in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), column)
    assert np.sort(whole.position).tolist() == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("repeats", [2, 3])
def test_the_copies_of_a_sample_are_told_apart_and_the_rest_is_the_order_of_distinct_samples(repeats, mixed):
    many, once = order(batch=24, repeats=repeats, mixed=mixed), order(batch=24 // repeats, mixed=mixed)
    for step in range(60):
        rows, distinct = many.batch(step), once.batch(step)
        for copy in range(repeats):
            mine = rows.repeat == copy
            for name in ("shard", "sample", "epoch"):
                np.testing.assert_array_equal(getattr(rows, name)[mine], getattr(distinct, name))
        copies_beside = (np.diff(ids(rows)) == 0) & (np.diff(rows.epoch) == 0)
        assert not copies_beside.any()  # mixup would join a picture with itself


FACTS = DataFacts(samples=1000, shards=9, bytes=10**8, digest="d" * 64, source_samples=(700, 300))


def plan(
    facts: DataFacts = FACTS, world: int = 1, weights: tuple[float, ...] = (0.75, 0.25), **data: object
) -> Plan:
    mix = [{"name": f"s{i}", "shards": "x", "weight": weight} for i, weight in enumerate(weights)]
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"mix": tuple(mix)}, **data},
            "model": {"size": "Ti", "img_size": (8, 8), "patch_size": (4, 4), "num_classes": 3},
            "optim": {"lr": 1e-3, "warmup_epochs": 1},
            "train": {"global_batch": 48, "total_epochs": 12},
        }
    )
    return resolve(config, world, facts, Hardware("cpu", "test", False))


def test_an_epoch_as_a_length_is_as_many_rows_as_there_are_samples():
    plain, repeated = plan(), plan(augment={"repeats": 3})
    for made in (plain, repeated):
        assert (made.total_steps, made.warmup_steps) == (250, 21)
        assert made.epochs == 12
    assert (plain.distinct_samples, repeated.distinct_samples, repeated.lanes) == (48, 16, 16)
    assert (
        "sources",
        "s0 75.0%: 700 samples, 12.86 passes\ns1 25.0%: 300 samples, 10.00 passes",
    ) in plain.table()
    assert ("global batch", "48 samples: 16, each 3 times with draws of its own") in repeated.table()


def test_the_state_counts_what_each_source_gave():
    made = plan(augment={"repeats": 3})
    state = data_state(250, made, 5, Skipped())
    assert state["samples_seen"] == 12_000
    assert list(state["sources"]) == ["s0 3", "s1 1"]
    given = np.array(list(state["sources"].values()))
    assert given.sum() == 4000
    assert abs(given[0] - 3000) < 64
    passes = source_epochs(250, made, 5, Skipped())
    assert passes == {"s0": given[0] / 700, "s1": given[1] / 300}


def test_the_state_is_below_1_kb_with_the_most_and_longest_of_everything():
    shares = tuple(SourceShare(f"{'n' * 17}-{i:02d}", 10**12, 4096) for i in range(MAX_SOURCES))
    worst = replace(
        plan(), sources=shares, train_samples=16 * 10**12, train_digest="d" * 64, global_batch=2**20, repeats=64,
        lanes=2**14, block_samples=10**6, window_blocks=10**4,
    )  # fmt: skip
    skipped = Skipped(10**9, 0, (10**12,) * MAX_SOURCES, 10**13)
    state = data_state(10**9, worst, 2**32 - 1, skipped)
    assert min(state["sources"].values()) > 10**12
    assert state["distinct"] == 10**13
    assert len(json.dumps(state)) < 1024


def test_the_state_is_the_same_on_every_rank_and_world():
    assert len({json.dumps(data_state(99, plan(world=world), 3, Skipped())) for world in (1, 5, 48)}) == 1


@pytest.mark.parametrize("repeats", [1, 2])
def test_what_the_state_counts_is_what_came_also_past_batches_and_over_restarts(repeats):
    """Against the batches themselves: a run that goes back and on past some batches twice, in its first epochs and later."""
    made = plan(DataFacts(240, 2, 240 * 100, "d", source_samples=(180, 60)), augment={"repeats": repeats})
    sizes = [180, 60]
    mix = Mix([3, 1], 5)
    given, seen, first = np.zeros(2, int), set(), set()
    skipped, batch = Skipped(), 0
    for step in range(30):
        if step in (2, 3, 17):  # goes back to this step's checkpoint, and on past two batches or five
            saved = json.loads(json.dumps(data_state(step, made, 5, skipped)))
            batch += 5 if step == 3 else 2
            skipped = Skipped.of(saved).up_to(batch)
        assert skipped.batch(step) == batch
        for source, number in zip(
            *mix.deal(batch * made.distinct_samples, made.distinct_samples), strict=True
        ):
            given[source] += 1
            seen.add((source, number % sizes[source]))  # of an order that is the same in each epoch
            if number < sizes[source]:
                first.add((source, number))
        batch += 1
        state = data_state(step + 1, made, 5, skipped)
        assert list(state["sources"].values()) == given.tolist()
        assert state["distinct"] == distinct_seen(step + 1, made, 5, skipped) == len(first) <= len(seen)
    assert len(first) < len(seen)  # what was passed over came later


def a_dataset(digest: str = "d" * 64) -> Dataset:
    made = Dataset("here", (), (), (0, 1), None)
    made.__dict__["digest"] = digest
    return made


def test_going_on_with_another_mixture_data_set_or_order_is_refused():
    made = plan()
    before = json.loads(json.dumps(data_state(10, made, 1, Skipped())))
    check_continues(before, plan(world=4), 1, a_dataset(), "step_10")
    for other in (plan(weights=(0.5, 0.5)), plan(FACTS, weights=(0.25, 0.75))):
        with pytest.raises(
            CheckpointError, match=r"step_10 was trained on the mixture s0 3 : s1 1; this config gives"
        ):
            check_continues(before, other, 1, a_dataset(), "step_10")
    other = plan(replace(FACTS, digest="e" * 64))
    with pytest.raises(DataError, match=r"step_10 was trained on the data set d{64}, but here is e{64}"):
        check_continues(before, other, 1, a_dataset("e" * 64), "step_10")
    for key, changed, seed in [
        ("seed 1 -> 2", made, 2),
        ("repeats 1 -> 2", plan(augment={"repeats": 2}), 1),
        ("lanes 48 -> 12", plan(lanes=12), 1),
        ("block_samples 84 -> 10", plan(block_mib=1.0), 1),
        ("window_blocks 4 -> 2", plan(window_blocks=2), 1),
    ]:
        with pytest.raises(CheckpointError, match=key):
            check_continues(before, changed, seed, a_dataset(), "step_10")
    with pytest.raises(CheckpointError, match="order 1 -> 2"):
        check_continues(before | {"order": 1}, made, 1, a_dataset(), "step_10")
    with pytest.raises(CheckpointError, match="written by an earlier release"):
        check_continues(before | {"sources": [["s0", 3, 360]]}, made, 1, a_dataset(), "step_10")


def mix(*patterns: str) -> TrainSourceConfig:
    return TrainSourceConfig.model_validate(
        {"mix": tuple({"name": f"s{i}", "shards": p, "weight": 1} for i, p in enumerate(patterns))}
    )


def test_sources_become_one_data_set_with_global_numbers(digits: Path, train_set: Dataset):
    folder = digits / "train"
    two = open_training(
        mix(f"{folder}/train-{{000000..000001}}.tar", f"{folder}/train-{{000002..000004}}.tar")
    )
    assert (two.paths, two.labels, two.class_names) == (
        train_set.paths,
        train_set.labels,
        train_set.class_names,
    )
    assert two.source_shards == (2, 3)
    assert two.source_samples.tolist() == [
        train_set.shard_samples[:2].sum(),
        train_set.shard_samples[2:].sum(),
    ]
    moved = open_training(
        mix(f"{folder}/train-{{000000..000002}}.tar", f"{folder}/train-{{000003..000004}}.tar")
    )
    assert (
        len({two.digest, moved.digest, train_set.digest}) == 3
    )  # where a source ends is part of the identity
    assert open_training(TrainSourceConfig(shards=str(folder))).digest == train_set.digest


def test_sources_that_name_other_classes_are_refused(tmp_path: Path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"]), ("c", None), ("d", ["cat", "dog"])):
        write_tar(tmp_path / name / f"{name}.tar", sample_members("x", 1))
        index_folder(tmp_path / name, classes)
    open_training(mix(str(tmp_path / "a"), str(tmp_path / "d")))
    for other, told in (("b", "2 classes: dog, cat"), ("c", "classes without names")):
        with pytest.raises(DataError, match=rf"s0 \(2 classes: cat, dog.*s1 \({told}"):
            open_training(mix(str(tmp_path / "a"), str(tmp_path / other)))


def test_a_shard_in_two_sources_is_refused(digits: Path):
    folder = digits / "train"
    with pytest.raises(DataError, match=r"train-000001\.tar belongs to two sources; .* weight"):
        open_training(mix(f"{folder}/train-{{000000..000001}}.tar", f"{folder}/train-{{000001..000004}}.tar"))


def test_a_missing_source_is_named(digits: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: there is no such folder"):
        open_training(mix(str(digits / "train"), str(tmp_path / "nowhere")))
