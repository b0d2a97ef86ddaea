"""Weights of a mixture as the smallest whole numbers that stand in the same ratio."""

import math
from collections.abc import Sequence
from fractions import Fraction

MAX_SUM = 2**16
"""Positions in which every source has exactly its part: the order works in blocks of that many."""


def whole_ratios(weights: Sequence[float]) -> tuple[int, ...]:
    """0.75 and 0.25 are 3 : 1, and 3 and 1 too. Decimals count as they are written, not as binary fractions.

    Raises `ValueError` where a weight is not above 0 or the numbers add up to more than `MAX_SUM`.
    """
    if min(weights) <= 0:
        raise ValueError(f"a weight is above 0; given: {_listed(weights)}")
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * unit) for fraction in exact]
    common = math.gcd(*whole)
    ratios = tuple(number // common for number in whole)
    if sum(ratios) > MAX_SUM:
        raise ValueError(
            f"the weights {_listed(weights)} are {' : '.join(f'{n:,}' for n in ratios)} in whole numbers, which add up "
            f"to more than {MAX_SUM:,}; give round ones, such as {' : '.join(map(str, _rounded(weights)))}"
        )
    return ratios


def _rounded(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers of which the smallest is 1, or as many hundredths of their sum."""
    if max(weights) <= 100 * min(weights):
        return [round(weight / min(weights)) for weight in weights]
    return [max(1, round(100 * weight / sum(weights))) for weight in weights]


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.12g}" for weight in weights)
