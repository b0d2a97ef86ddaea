"""Random numbers as a pure function of what they are for: no state, no order of calls, no rank.

Philox-4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (figure 4 and section 3.3),
over numpy arrays of counters. The key is (seed, stream), the counter (index, a, b, c): whoever asks for the draws
of, say, sample 7 of epoch 3 gets the same ones on any rank, thread or restart, and on any version of a library.
"""

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


class Stream(IntEnum):
    """What a draw is for. Numbers are part of every run's identity: add at the end, never renumber."""

    SHARDS = 0
    BLOCKS = 1
    SAMPLES = 2
    AUGMENT = 3
    DROP_PATH = 4
    SPLIT = 5
    MIXING = 6
    MIXUP = 7
    POLICY = 8
    DROPOUT = 9


def uniform(
    seed: int, stream: Stream, count: int, a: npt.ArrayLike, b: npt.ArrayLike = 0, c: npt.ArrayLike = 0
) -> FloatArray:
    """Draw `count` numbers in [0, 1), in steps of 2^-32, for every (a, b, c).

    a, b, c: integers in [0, 2^32), broadcast together to a shape S. Returns float64 [*S, count].
    """
    return _words(seed, stream, count, a, b, c).astype(np.float64) * 2.0**-32


def integers(
    seed: int, stream: Stream, count: int, a: npt.ArrayLike, b: npt.ArrayLike = 0, c: npt.ArrayLike = 0
) -> npt.NDArray[np.int32]:
    """Draw `count` integers, uniform over all of int32, for every (a, b, c) as `uniform` takes them: [*S, count]."""
    return _words(seed, stream, count, a, b, c).astype(np.uint32).view(np.int32)


def permutation(
    seed: int, stream: Stream, n: int, a: npt.ArrayLike, b: npt.ArrayLike = 0, c: npt.ArrayLike = 0
) -> IntArray:
    """A permutation of range(n) for every (a, b, c): int64 [*S, n] for S as in `uniform`.

    Sorts n 64-bit draws; a tie keeps the lower number first.
    """
    words = _words(seed, stream, 2 * n, a, b, c)
    return np.argsort(words[..., 0::2] << _HALF | words[..., 1::2], axis=-1, kind="stable").astype(np.int64)


class Shuffle:
    """A permutation of range(n) of which only those places are computed that are asked for, in both directions.

    Up to `SORTED` numbers it is `permutation`, uniform over all of them. Above, numbers are pairs (left, right) with
    left * B + right, A * B >= n, and each round adds a drawn function of one half to the other, as in the generalised
    Feistel cipher of Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5, with the ten rounds
    of NIST SP 800-38G; a pair that is no number goes through again. Memory is O(sqrt(n)).
    """

    SORTED = 1024

    def __init__(self, seed: int, stream: Stream, n: int, a: int, b: int = 0, c: int = 0) -> None:
        self._n = n
        if n <= self.SORTED:
            self._table = permutation(seed, stream, n, a, b, c)
            self._inverse = np.argsort(self._table)
            return
        left = math.isqrt(n - 1) + 1
        self._sides = left, -(-n // left)
        pairs = _ROUNDS // 2
        words = _words(seed, stream, pairs * sum(self._sides), a, b, c).astype(np.int64)
        to_left, to_right = words[: pairs * self._sides[1]], words[pairs * self._sides[1] :]
        self._rounds = list(
            zip(
                to_left.reshape(pairs, self._sides[1]) % self._sides[0],
                to_right.reshape(pairs, self._sides[0]) % self._sides[1],
                strict=True,
            )
        )

    def at(self, place: IntArray) -> IntArray:
        """The number at each place: int64 of the same shape."""
        return self._table[place] if self._n <= self.SORTED else self._walk(self._encrypt, place)

    def place_of(self, number: IntArray) -> IntArray:
        """Where each number stands: the inverse of `at`."""
        return self._inverse[number] if self._n <= self.SORTED else self._walk(self._decrypt, number)

    def _walk(self, step: Callable[[IntArray], IntArray], value: IntArray) -> IntArray:
        value = step(value)
        while (outside := value >= self._n).any():
            value[outside] = step(value[outside])
        return value

    def _encrypt(self, value: IntArray) -> IntArray:
        left, right = np.divmod(value, self._sides[1])
        for to_left, to_right in self._rounds:
            left = (left + to_left[right]) % self._sides[0]
            right = (right + to_right[left]) % self._sides[1]
        return left * self._sides[1] + right

    def _decrypt(self, value: IntArray) -> IntArray:
        left, right = np.divmod(value, self._sides[1])
        for to_left, to_right in reversed(self._rounds):
            right = (right - to_right[left]) % self._sides[1]
            left = (left - to_left[right]) % self._sides[0]
        return left * self._sides[1] + right


def normal(first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Two uniform draws in [0, 1) as one standard normal (Box and Muller 1958): float64 of their shape, exact."""
    radius = np.sqrt(-2.0 * np.log1p(-np.asarray(first, dtype=np.float64)))
    return np.asarray(radius * np.cos(2.0 * np.pi * np.asarray(second, dtype=np.float64)))


def symmetric_beta(alpha: float, first: npt.ArrayLike, second: npt.ArrayLike) -> FloatArray:
    """Two uniform draws in [0, 1) as one of Beta(alpha, alpha), any alpha > 0: float64 of their shape, in [0, 1].

    Exact and without rejection, so that the number of draws is fixed: T / sqrt(2 alpha + T^2) of a Student t with
    2 alpha degrees of freedom is 2 Beta - 1, and T comes from two uniforms by Bailey's polar method (1994,
    "Polar generation of random variates with the t-distribution"); Devroye 1996, "Random variate generation in one
    line of code".
    """
    uniform = np.log1p(-np.asarray(first, dtype=np.float64))
    with np.errstate(over="ignore", divide="ignore"):  # an infinite ratio is a share of 0 or 1
        ratio = np.expm1(-uniform / alpha)  # T^2 / (2 alpha cos^2)
        cosine = np.cos(2.0 * np.pi * np.asarray(second, dtype=np.float64))
        return np.asarray(0.5 + 0.5 * np.copysign(1.0 / np.sqrt(1.0 + 1.0 / (ratio * cosine**2)), cosine))


def split64(position: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    """A position in [0, 2^63) as (low, high) words for `a` and `b`."""
    value = np.asarray(position, dtype=np.int64)
    return value & np.int64(0xFFFFFFFF), value >> np.int64(32)


def _words(
    seed: int, stream: Stream, count: int, a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike
) -> Words:
    """`count` 32-bit words for every (a, b, c), each in a uint64: [*S, count]."""
    calls = -(-count // 4)
    index = np.arange(calls, dtype=np.uint64)
    rest = (np.asarray(x, dtype=np.uint64)[..., None] for x in (a, b, c))
    counter = np.stack(np.broadcast_arrays(index, *rest))
    words = _philox(counter, np.uint64(seed), np.uint64(stream))  # [4, *S, calls]
    return np.moveaxis(words, 0, -1).reshape(*words.shape[1:-1], calls * 4)[..., :count]


def _philox(counter: Words, key0: np.uint64, key1: np.uint64) -> Words:
    """Ten rounds over counters [4, ...] of 32-bit words held in uint64; returns the same shape."""
    x0, x1, x2, x3 = counter
    for _ in range(_ROUNDS):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (product1 >> _HALF) ^ x1 ^ key0,
            product1 & _LOW,
            (product0 >> _HALF) ^ x3 ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return np.stack([x0, x1, x2, x3])
