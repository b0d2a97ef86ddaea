"""Is a difference more than noise? Runs of one seed see the same samples in the same order, so variants are compared seed
by seed: a randomized block design, seeds as blocks. Plain functions of numbers.

    V  variants    n  seeds    scores: one row for each variant, the first one what the others are compared with
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One variant: its mean, its spread over seeds (standard deviation, n - 1), and its mean difference from the first.

    detectable: the smallest such difference that is told from noise with 95 % confidence for all rows of the table
    together (Bonferroni); infinite with one seed. Of the first row it says nothing.
    """

    mean: float
    spread: float
    difference: float
    detectable: float

    @property
    def stands_out(self) -> bool:
        """Whether the difference is more than noise explains."""
        return abs(self.difference) > self.detectable


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    seeds: int

    @property
    def only_noise(self) -> bool:
        return not any(row.stands_out for row in self.rows)


def compare(
    scores: Sequence[Sequence[float]],
    groups: Sequence[Collection[int]] = (),
    copies: Collection[int] = (),
) -> Comparison:
    """scores [V, n], V at least 2.

    groups: numbers of rows whose noise is estimated apart from that of the others, each group with the first row. None
    given: one noise for all rows. Rows that differ in how much they vary hide small differences of the quiet ones, and
    make differences of noise alone in the loud ones, where one noise is taken for all. copies: rows that are nearly
    another one of their group. They are judged like it and say nothing of noise: counted twice, one row's would seem
    better known than it is.
    """
    first, others = scores[0], range(1, len(scores))
    groups = groups or [others]
    assert sorted(number for group in groups for number in group) == list(others)
    noise = {
        number: detectable(
            [first, *(scores[member] for member in group if member not in copies)], len(others)
        )
        for group in groups
        for number in group
    }
    rows = tuple(
        Row(
            mean(row),
            spread(row),
            mean([ours - base for ours, base in zip(row, first, strict=True)]),
            noise.get(number, math.inf),
        )
        for number, row in enumerate(scores)
    )
    return Comparison(rows, len(first))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; nan of one value."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def residual_variance(scores: Sequence[Sequence[float]]) -> float:
    """Variance of what neither the variant nor the seed explains: (V - 1)(n - 1) degrees of freedom."""
    of_seed = [mean(column) for column in zip(*scores, strict=True)]
    of_variant = [mean(row) for row in scores]
    overall = mean(of_variant)
    squares = math.fsum(
        (value - of_variant[v] - of_seed[s] + overall) ** 2
        for v, row in enumerate(scores)
        for s, value in enumerate(row)
    )
    return squares / ((len(scores) - 1) * (len(of_seed) - 1))


def detectable(scores: Sequence[Sequence[float]], comparisons: int) -> float:
    """t sqrt(2 s^2 / n), s^2 the residual variance, for one of `comparisons` in a table: of two variants and one
    comparison the bound of the paired t-test."""
    from scipy.stats import t

    variants, seeds = len(scores), len(scores[0])
    if seeds < 2:
        return math.inf
    tail = (1 - CONFIDENCE) / 2 / comparisons
    return float(t.isf(tail, (variants - 1) * (seeds - 1))) * math.sqrt(2 * residual_variance(scores) / seeds)
