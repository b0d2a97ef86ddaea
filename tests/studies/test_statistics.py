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
    assert detectable(BY_HAND) == pytest.approx(
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
    assert found.stands_out(found.rows[1]) == (stats.ttest_rel(*scores).pvalue < 0.05)
    interval = stats.ttest_rel(scores[1], scores[0]).confidence_interval(0.95)
    assert found.detectable == pytest.approx((interval.high - interval.low) / 2)


def test_what_a_seed_does_to_every_variant_is_no_noise() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 6))
    assert detectable((scores + 10 * np.arange(6)).tolist()) == pytest.approx(detectable(scores.tolist()))


def test_of_equal_variants_hardly_one_table_in_twenty_finds_a_difference() -> None:
    random = np.random.default_rng(1)
    tables = random.normal(size=(1000, 6, 3)) + random.normal(size=(1000, 1, 3))
    false = sum(not compare(scores.tolist()).only_noise for scores in tables)
    assert false / 1000 < 0.07


def test_one_seed_tells_nothing_from_noise() -> None:
    found = compare([[0.5], [0.9]])
    assert found.detectable == math.inf
    assert found.only_noise
    assert math.isnan(found.rows[0].spread)
