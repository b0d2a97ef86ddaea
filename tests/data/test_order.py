import math
import tracemalloc
from collections.abc import Iterator
from itertools import groupby, pairwise, product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.plan import slice_bounds
from pretrain.data.order import Order, Rows, evaluation_slice
from pretrain.draws import Shuffle, Stream, permutation

RAGGED = [17, 1, 40, 8, 3, 29, 5]


def order(shards=RAGGED, *, seed=7, batch=24, lanes=8, block=6, window=3) -> Order:
    return Order(
        shards, seed=seed, global_batch=batch, lanes=lanes, block_samples=block, window_blocks=window
    )


def ids(shards: list[int], rows: Rows) -> np.ndarray:
    """Numbers of the samples in the data set."""
    return np.concatenate(([0], np.cumsum(shards)))[rows.shard] + rows.sample


def by_position(shards: list[int], made: Order, positions: int) -> np.ndarray:
    """Sample numbers at positions 0..positions-1."""
    batches = [made.batch(t) for t in range(-(-positions // made.global_batch))]
    number = np.concatenate([ids(shards, rows) for rows in batches])
    position = np.concatenate([rows.position for rows in batches])
    return number[np.argsort(position)][:positions]


def assert_every_window_is_an_epoch(shards: list[int], made: Order, epochs: int) -> None:
    n = sum(shards)
    numbers = by_position(shards, made, epochs * n).reshape(epochs, n)
    assert (np.sort(numbers, axis=1) == np.arange(n)).all()


@pytest.mark.parametrize(
    ("shards", "batch", "lanes"),
    [
        (RAGGED, 24, 8),  # 103 samples: neither lanes nor batch divide them
        (RAGGED, 24, 24),
        ([103], 24, 8),  # one shard
        ([50, 53], 24, 12),  # fewer shards than lanes
        ([2, 3], 24, 8),  # a batch larger than the data set, more lanes than samples
        ([1], 4, 4),
        ([64, 32], 32, 32),  # everything divides
        ([5, 0, 9], 6, 3),  # an empty shard
    ],
)
def test_every_window_of_positions_holds_every_sample_once_over_100_epochs(shards, batch, lanes):
    assert_every_window_is_an_epoch(shards, order(shards, batch=batch, lanes=lanes), epochs=100)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 12),
    lane_rows=st.integers(1, 5),
    block=st.integers(1, 50),
    window=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_of_data_set_gives_whole_epochs(shards, lanes, lane_rows, block, window, seed):
    made = order(shards, seed=seed, batch=lanes * lane_rows, lanes=lanes, block=block, window=window)
    assert_every_window_is_an_epoch(shards, made, epochs=4)


@pytest.mark.parametrize("batch", [24, 25, 7])
def test_ranks_together_hold_the_batch_for_any_world(batch):
    lanes = {24: 8, 25: 5, 7: 7}[batch]
    for step in (0, 4, 31):  # 4: the seam of the first two epochs lies in the batch of 24
        whole = order(batch=batch, lanes=lanes).batch(step)
        for world in (1, 2, 3, 4, 5, 7):
            parts = [
                order(batch=batch, lanes=lanes).rows(step, *slice_bounds(batch, rank, world))
                for rank in range(world)
            ]
            for field, column in enumerate(whole):
                np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), column)


def test_a_seek_equals_iteration():
    walking = order()
    for step in range(40):
        walked = walking.batch(step)
        for field, column in enumerate(order().batch(step)):
            np.testing.assert_array_equal(walked[field], column)


def test_asking_backwards_and_out_of_order_changes_nothing():
    made = order()
    first = made.batch(2)
    made.batch(90)
    made.rows(17, 5, 6)
    again = made.batch(2)
    np.testing.assert_array_equal(ids(RAGGED, first), ids(RAGGED, again))


def test_a_batch_is_listed_by_lane():
    for step in range(10):
        rows = order().batch(step)
        lane = rows.position % sum(RAGGED) % 8
        assert (np.diff(lane) >= 0).all()
        assert all((np.diff(rows.position[lane == n]) > 0).all() for n in range(8))


def test_samples_have_other_neighbours_in_another_epoch():
    numbers = by_position([1000], order([1000], batch=10, lanes=5, block=50, window=2), 2000)
    pairs = [
        {tuple(sorted(pair)) for pair in pairwise(epoch.tolist())}
        for epoch in (numbers[:1000], numbers[1000:])
    ]
    assert len(pairs[0] & pairs[1]) < 30


def test_seeds_give_different_orders():
    assert (by_position(RAGGED, order(seed=1), 103) != by_position(RAGGED, order(seed=2), 103)).mean() > 0.9


def test_a_lane_reads_block_after_block():
    """The point of blocks: one lane's consecutive samples come from a window of few ranges."""
    shards = [500] * 8
    made = order(shards, batch=8, lanes=4, block=20, window=3)
    numbers = by_position(shards, made, 4000)
    lane = numbers[0::4]
    for first in range(0, len(lane) - 60, 60):
        assert len(np.unique(lane[first : first + 60] // 20)) <= 8


def naive(
    shards: list[int], epoch: int, *, lanes: int, block: int, window: int, seed: int = 7, source: int = 0
) -> list[int]:
    """The samples of an epoch by position, written down from the definition, one list after another."""
    key = source << 20
    firsts = np.concatenate(([0], np.cumsum(shards)))
    places = [
        (shard, sample)
        for shard in permutation(seed, Stream.SHARDS, len(shards), epoch, key).tolist()
        for sample in range(shards[shard])
    ]
    dealt: list[list[tuple[int, int]]] = []
    for lane in range(lanes):
        span = len(places) // lanes + (lane < len(places) % lanes)
        left = sum(len(done) for done in dealt)
        blocks = [
            list(run) for _, run in groupby(places[left : left + span], lambda p: (p[0], p[1] // block))
        ]
        drawn = Shuffle(seed, Stream.BLOCKS, len(blocks), epoch, lane | key).at(np.arange(len(blocks)))
        shuffled = [blocks[i] for i in drawn]
        done: list[tuple[int, int]] = []
        for number, start in enumerate(range(0, len(blocks), window)):
            inside = [place for run in shuffled[start : start + window] for place in run]
            drawn = permutation(seed, Stream.SAMPLES, len(inside), epoch, lane | key, number)
            done += [inside[i] for i in drawn]
        dealt.append(done)
    return [
        int(firsts[shard] + sample)
        for j in range(len(places))
        for shard, sample in [dealt[j % lanes][j // lanes]]
    ]


@pytest.mark.parametrize(
    ("shards", "lanes", "block", "window"),
    [
        (RAGGED, 8, 6, 3),
        ([100, 60, 80], 2, 10, 1),
        ([7], 4, 100, 2),
        ([3, 0, 9], 6, 2, 5),
        ([50, 53], 1, 7, 4),
        ([2600, 7, 1393], 2, 1, 3),  # lanes of 2,000 blocks: long shuffles
        ([2600, 7, 1393], 1, 3, 4),
    ],
)
def test_the_order_is_its_definition(shards, lanes, block, window):
    made = order(shards, batch=lanes, lanes=lanes, block=block, window=window)
    n = sum(shards)
    numbers = by_position(shards, made, 2 * n).reshape(2, n)
    for epoch in range(2):
        assert numbers[epoch].tolist() == naive(shards, epoch, lanes=lanes, block=block, window=window)


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    lanes=st.integers(1, 6),
    block=st.integers(1, 12),
    window=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_order_is_its_definition_where_every_shuffle_is_a_long_one(shards, lanes, block, window, seed):
    with patch.object(Shuffle, "SORTED", 0):
        made = order(shards, seed=seed, batch=lanes, lanes=lanes, block=block, window=window)
        numbers = by_position(shards, made, sum(shards)).tolist()
        assert numbers == naive(shards, 0, lanes=lanes, block=block, window=window, seed=seed)


def compositions(n: int) -> Iterator[list[int]]:
    """Every way to fill shards with n samples: 2^(n-1) lists."""
    for cuts in product((False, True), repeat=n - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        yield [b - a for a, b in pairwise(edges)]


def enumerate_all(most_samples: int) -> int:
    cases = 0
    for n in range(1, most_samples + 1):
        for shards in compositions(n):
            for lanes, block, window in product((1, 2, 3, 5), (1, 2, 3), (1, 2)):
                made = order(shards, batch=lanes, lanes=lanes, block=block, window=window)
                assert_every_window_is_an_epoch(shards, made, epochs=2)
                cases += 1
    return cases


def test_every_small_data_set_in_every_small_setting():
    """All ways to fill shards with up to 5 samples; lanes, blocks and windows from one to more than there are."""
    assert enumerate_all(5) == 31 * 24


@pytest.mark.slow
def test_every_data_set_of_up_to_nine_samples():
    assert enumerate_all(9) == 511 * 24


def test_the_order_of_a_small_case_is_pinned():
    """The order is part of a run's identity: a change here breaks every resume, and must be a new version."""
    numbers = by_position([5, 3, 4], order([5, 3, 4], seed=1, batch=4, lanes=2, block=2, window=2), 24)
    assert numbers.tolist() == [
        10,
        1,
        5,
        11,
        6,
        0,
        8,
        2,
        7,
        3,
        9,
        4,
        2,
        9,
        7,
        11,
        0,
        10,
        5,
        8,
        1,
        3,
        6,
        4,
    ]


def test_lanes_must_divide_the_batch():
    with pytest.raises(ValueError, match="8 lanes do not divide"):
        order(batch=12, lanes=8)


def billion() -> Order:
    """10^9 samples in 10^5 ragged shards; blocks of 84 are about 8 MiB of photographs."""
    shards = 9_500 + np.arange(100_000) * 7919 % 1001
    shards[0] += 10**9 - shards.sum()
    return Order(shards, seed=1, global_batch=4096, lanes=256, block_samples=84, window_blocks=4)


def test_a_seek_into_a_billion_samples_computes_one_lane():
    made = billion()
    rows = made.rows(5_000_000, 17, 18)
    assert len(made._sources[0]._lanes) == 1
    assert rows.epoch[0] == 5_000_000 * 4096 // 10**9


def test_a_seek_into_a_billion_samples_takes_little_memory_even_for_all_lanes():
    made = billion()
    tracemalloc.start()
    rows = made.batch(5_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20  # a list of the blocks alone would be 90 MiB a column
    assert len(np.unique(rows.shard * 2**20 + rows.sample)) == 4096


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 200), st.integers(0, 23), st.integers(1, 24)), min_size=1, max_size=12
    )
)
def test_what_was_asked_before_never_shows(asked):
    """The order keeps lanes and windows; nothing of it may leak into an answer."""
    made = order()
    for step, start, length in asked:
        stop = min(24, start + length)
        for field, column in zip(made.rows(step, start, stop), order().batch(step), strict=True):
            np.testing.assert_array_equal(field, column[start:stop])


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 103])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_evaluation_counts_every_sample_once_in_equally_many_batches(samples, world):
    slices = [evaluation_slice(samples, rank, world, batch=4) for rank in range(world)]
    assert len({number.shape for number, _ in slices}) == 1
    counted = np.concatenate([number[counts] for number, counts in slices])
    assert np.sort(counted).tolist() == list(range(samples))
    assert all((number >= 0).all() and (number < samples).all() for number, _ in slices)


def test_evaluation_runs_no_forward_too_many():
    for samples, world, batch in [(103, 4, 8), (96, 4, 8), (1, 8, 8)]:
        number, _ = evaluation_slice(samples, 0, world, batch)
        assert len(number) == math.ceil(math.ceil(samples / world) / batch)


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(1, 400), world=st.integers(1, 300), batch=st.integers(1, 40))
def test_evaluation_is_exact_on_any_world(samples, world, batch):
    """Nobody waits for a rank with fewer batches, no sample counts twice, none is missing, padding is real rows."""
    slices = [evaluation_slice(samples, rank, world, batch) for rank in range(world)]
    assert {number.shape for number, _ in slices} == {slices[0][0].shape}
    counted = np.concatenate([number[counts] for number, counts in slices])
    assert counted.tolist() == list(range(samples))
    assert all((number >= 0).all() and (number < samples).all() for number, _ in slices)


def test_what_cannot_be_ordered_is_refused():
    for shards in ([], [0, 0]):
        with pytest.raises(ValueError, match="at least one sample"):
            order(shards)
    with pytest.raises(ValueError, match="fewer than 1048576"):
        order(batch=2**20, lanes=2**20)
