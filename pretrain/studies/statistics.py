"""Is a difference more than noise? Runs of one seed see the same samples in the same order, so variants are compared seed
by seed: a randomized block design, seeds as blocks. Plain functions of numbers.

    V  variants    n  seeds    scores: one row for each variant, the first one what the others are compared with
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """One variant: its mean, its spread over seeds (standard deviation, n - 1), and its mean difference from the first."""

    mean: float
    spread: float
    difference: float


@dataclass(frozen=True)
class Comparison:
    """detectable: the smallest difference from the first variant that is told from noise with 95 % confidence, for all of
    the variants together (Bonferroni); infinite with one seed."""

    rows: tuple[Row, ...]
    seeds: int
    detectable: float

    def stands_out(self, row: Row) -> bool:
        """Whether the difference is more than noise explains."""
        return abs(row.difference) > self.detectable

    @property
    def only_noise(self) -> bool:
        return not any(self.stands_out(row) for row in self.rows)


def compare(scores: Sequence[Sequence[float]]) -> Comparison:
    """scores [V, n], V at least 2."""
    first = scores[0]
    rows = tuple(
        Row(mean(row), spread(row), mean([ours - base for ours, base in zip(row, first, strict=True)]))
        for row in scores
    )
    return Comparison(rows, len(first), detectable(scores))


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


def detectable(scores: Sequence[Sequence[float]]) -> float:
    """t sqrt(2 s^2 / n), s^2 the residual variance: of two variants the bound of the paired t-test."""
    from scipy.stats import t

    variants, seeds = len(scores), len(scores[0])
    if seeds < 2:
        return math.inf
    freedom = (variants - 1) * (seeds - 1)
    tail = (1 - CONFIDENCE) / 2 / (variants - 1)
    return float(t.isf(tail, freedom)) * math.sqrt(2 * residual_variance(scores) / seeds)
