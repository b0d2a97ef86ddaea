"""The counter-based generator: published answers, and the properties that the sample order leans on."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.draws import Shuffle, Stream, _philox, integers, permutation, split64, uniform

# Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    assert (_philox(words(counter), *words(key)) == words(answer)).all()


def test_philox_is_the_same_for_one_counter_and_for_many() -> None:
    counters = np.stack([words(counter) for counter, _, _ in KNOWN_ANSWERS], axis=1)
    together = _philox(counters, np.uint64(1), np.uint64(2))
    for i in range(counters.shape[1]):
        assert (together[:, i] == _philox(counters[:, i], np.uint64(1), np.uint64(2))).all()


def test_uniform_covers_the_unit_interval_evenly() -> None:
    draws = uniform(3, Stream.AUGMENT, 8, a=np.arange(20_000)).ravel()
    assert draws.min() >= 0
    assert draws.max() < 1
    # Kolmogorov-Smirnov distance to the uniform law; 1.95 / sqrt(n) is exceeded once in a thousand draws of n.
    ordered = np.sort(draws)
    distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance < 1.95 / math.sqrt(len(ordered))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"stream": Stream.DROP_PATH},
        {"a": 8},
        {"b": 1},
        {"c": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_part_of_the_key_gives_unrelated_draws(other: dict[str, int]) -> None:
    key = {"seed": 1, "stream": Stream.AUGMENT, "a": 7, "b": 0, "c": 0}
    here, there = uniform(**key, count=10_000), uniform(**(key | other), count=10_000)
    # The correlation of two independent samples of n has a standard deviation of 1 / sqrt(n).
    assert abs(np.corrcoef(here, there)[0, 1]) < 4 / math.sqrt(10_000)


def test_draws_do_not_depend_on_what_is_asked_with_them() -> None:
    table = uniform(5, Stream.AUGMENT, 6, a=np.arange(10)[:, None], b=np.arange(3))
    assert table.shape == (10, 3, 6)
    for a in reversed(range(10)):
        for b in range(3):
            assert (uniform(5, Stream.AUGMENT, 6, a=a, b=b) == table[a, b]).all()


def test_fewer_draws_are_the_first_of_more() -> None:
    assert (uniform(5, Stream.AUGMENT, 3, a=1) == uniform(5, Stream.AUGMENT, 9, a=1)[:3]).all()


@given(n=st.integers(0, 300), seed=st.integers(0, 2**32 - 1), a=st.integers(0, 2**32 - 1))
def test_permutation_holds_every_number_once(n: int, seed: int, a: int) -> None:
    order = permutation(seed, Stream.SHARDS, n, a)
    assert order.dtype == np.int64
    assert (np.sort(order) == np.arange(n)).all()


def test_permutations_put_every_number_everywhere_equally_often() -> None:
    rounds, n = 6000, 5
    counts = np.zeros((n, n))
    for a in range(rounds):
        counts[np.arange(n), permutation(0, Stream.SAMPLES, n, a)] += 1
    expected = rounds / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # (n - 1)^2 = 16 degrees of freedom; 39.25 is exceeded once in a thousand.
    assert chi_square < 39.25


@given(position=st.integers(0, 2**63 - 1))
def test_split64_keeps_every_bit(position: int) -> None:
    low, high = split64(position)
    assert 0 <= low < 2**32
    assert int(high) * 2**32 + int(low) == position


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), a=st.integers(0, 2**32 - 1))
@example(n=Shuffle.SORTED, seed=0, a=0)
@example(n=Shuffle.SORTED + 1, seed=0, a=0)
def test_a_shuffle_holds_every_number_once_and_knows_the_way_back(n: int, seed: int, a: int) -> None:
    shuffle = Shuffle(seed, Stream.BLOCKS, n, a)
    number = shuffle.at(np.arange(n))
    assert (np.sort(number) == np.arange(n)).all()
    assert (shuffle.place_of(number) == np.arange(n)).all()
    some = np.arange(0, n, 7)[::-1]
    assert (shuffle.at(some) == number[some]).all()


def test_a_short_shuffle_is_the_sorted_permutation() -> None:
    for n in (1, 2, 100, Shuffle.SORTED):
        shuffle = Shuffle(3, Stream.BLOCKS, n, 5, 6, 7)
        assert (shuffle.at(np.arange(n)) == permutation(3, Stream.BLOCKS, n, 5, 6, 7)).all()


def test_permutations_of_many_keys_at_once_are_those_of_each() -> None:
    together = permutation(3, Stream.MIXING, 50, np.arange(4)[:, None], np.arange(3))
    for a in range(4):
        for b in range(3):
            assert (together[a, b] == permutation(3, Stream.MIXING, 50, a, b)).all()


@pytest.mark.parametrize("n", [1025, 4001, 50_000])
def test_a_long_shuffle_looks_like_a_random_permutation(n: int) -> None:
    """Places, neighbours, inversions and fixed points over many keys, each within bounds that chance leaves once in
    thousands of times."""
    rounds, cells = 40, 8
    counts = np.zeros((cells, cells))
    fixed, inversions, neighbours = 0, 0, 0
    for a in range(rounds):
        number = Shuffle(0, Stream.BLOCKS, n, a).at(np.arange(n))
        np.add.at(counts, (np.arange(n) * cells // n, number * cells // n), 1)
        fixed += int((number == np.arange(n)).sum())
        neighbours += int((np.abs(np.diff(number)) == 1).sum())
        some = number[:: max(1, n // 200)]
        inversions += int((some[:, None] > some[None, :])[np.triu_indices(len(some), 1)].sum())
    expected = rounds * n / cells**2
    # At random the cells' chi-square has (cells - 1)^2 = 49 degrees of freedom; 85.4 is exceeded once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 85.4
    # Fixed points: Poisson of mean 1 a permutation. Neighbours that stay neighbours: mean 2.
    assert abs(fixed - rounds) < 5 * math.sqrt(rounds)
    assert abs(neighbours - 2 * rounds) < 5 * math.sqrt(2 * rounds)
    pairs = len(some) * (len(some) - 1) / 2
    deviation = math.sqrt(rounds * len(some) * (len(some) - 1) * (2 * len(some) + 5) / 72)
    assert abs(inversions - rounds * pairs / 2) < 4 * deviation


def test_a_long_shuffle_is_pinned() -> None:
    """It is part of the sample order, and so of a run's identity."""
    shuffle = Shuffle(1, Stream.BLOCKS, 2000, 2, 3)
    assert shuffle.at(np.array([0, 1, 2, 1000, 1999])).tolist() == [155, 450, 1025, 920, 814]


def test_integers_are_the_words_that_uniform_divides() -> None:
    whole = integers(3, Stream.DROPOUT, 6, a=np.arange(5), b=2)
    assert whole.dtype == np.int32
    assert whole.shape == (5, 6)
    share = uniform(3, Stream.DROPOUT, 6, a=np.arange(5), b=2)
    assert np.array_equal(whole.view(np.uint32) * 2.0**-32, share)
