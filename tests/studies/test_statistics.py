"""The statistics of the studies, beside numbers worked by hand and scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from pretrain.studies.statistics import compare, detectable, mean, residual_variance, spread

BY_HAND = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
"""Means 2 and 4; differences 1, 2, 3, so their mean is 2 and their standard deviation 1."""


def test_numbers_worked_by_hand() -> None:
    assert [mean(row) for row in BY_HAND] == [2, 4]
    assert [spread(row) for row in BY_HAND] == [1, 2]
    assert residual_variance(BY_HAND) == pytest.approx(0.5)  # half the variance of the differences
    assert detectable(BY_HAND, 1) == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-6
    )  # t of two degrees of freedom
    found = compare(BY_HAND)
    assert [row.difference for row in found.rows] == [0, 2]
    assert found.only_noise  # 2 is below 2.48


@pytest.mark.parametrize("seed", range(20))
def test_two_variants_are_judged_as_by_the_paired_t_test(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=(2, 5)) + np.array([[0.0], [1.5]])
    found = compare(scores.tolist())
    assert found.rows[1].stands_out == (stats.ttest_rel(*scores).pvalue < 0.05)
    interval = stats.ttest_rel(scores[1], scores[0]).confidence_interval(0.95)
    assert found.rows[1].detectable == pytest.approx((interval.high - interval.low) / 2)


def test_what_a_seed_does_to_every_variant_is_no_noise() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 6))
    moved = (scores + 10 * np.arange(6)).tolist()
    assert detectable(moved, 3) == pytest.approx(detectable(scores.tolist(), 3))


def test_of_equal_variants_hardly_one_table_in_twenty_finds_a_difference() -> None:
    random = np.random.default_rng(1)
    tables = random.normal(size=(1000, 6, 3)) + random.normal(size=(1000, 1, 3))
    false = sum(not compare(scores.tolist()).only_noise for scores in tables)
    assert false / 1000 < 0.07


def test_rows_that_vary_unlike_are_judged_in_groups_each_by_its_own_noise() -> None:
    """Two quiet rows, which hardly move apart, beside three loud ones: taken for alike, the quiet ones can show nothing,
    and the loud ones show a difference too often."""
    random = np.random.default_rng(2)
    base = random.normal(size=(1000, 1, 5))
    loud, quiet = (
        base + size * random.normal(size=(1000, number, 5)) for size, number in ((1.0, 3), (0.01, 2))
    )
    tables = np.concatenate([base, quiet, loud], axis=1)
    grouped = [compare(scores.tolist(), [(1, 2), (3, 4, 5)]) for scores in tables]
    assert sum(not found.only_noise for found in grouped) / 1000 < 0.07
    moved = tables + np.array([0, 0.1, 0, 0, 0, 0])[:, None]
    assert all(compare(scores.tolist(), [(1, 2), (3, 4, 5)]).rows[1].stands_out for scores in moved[:50])
    assert not any(compare(scores.tolist()).rows[1].stands_out for scores in moved[:50])


def test_groups_share_the_one_chance_in_twenty() -> None:
    scores = np.random.default_rng(3).normal(size=(4, 5)).tolist()
    found = compare(scores, [(1,), (2, 3)])
    assert found.rows[1].detectable == detectable([scores[0], scores[1]], 3)
    assert found.rows[2].detectable == found.rows[3].detectable == detectable(scores[:1] + scores[2:], 3)
    with pytest.raises(AssertionError):
        compare(scores, [(1, 2)])  # a row that nobody judges


def test_a_row_that_is_there_twice_makes_no_bound_smaller() -> None:
    scores = np.random.default_rng(4).normal(size=(3, 3)).tolist()
    twice = [*scores, scores[1]]
    found, once = compare(twice, copies=[3]), detectable(scores, 3)
    assert [row.detectable for row in found.rows[1:]] == [once] * 3
    assert compare(twice).rows[1].detectable < once


def test_one_seed_tells_nothing_from_noise() -> None:
    found = compare([[0.5], [0.9]])
    assert found.rows[1].detectable == math.inf
    assert found.only_noise
    assert math.isnan(found.rows[0].spread)
