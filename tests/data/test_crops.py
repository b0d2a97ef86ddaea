"""Crops against the libraries that define them: TensorFlow's by its own answers, DeiT-3's by torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest
from torchvision.transforms import RandomCrop
from torchvision.transforms import functional as torchvision

from pretrain.data.crops import INCEPTION_DRAWS, inception_box, simple_crop
from pretrain.draws import Stream, _philox, uniform

SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)
ANSWERS = json.loads((Path(__file__).parent / "tensorflow.json").read_text())
"""`boxes`: seed, height and width, then what TensorFlow 2.21 answered to `tf.image.stateless_sample_distorted_bounding_box(
[height, width, 3], [], seed=(seed, 7), area_range=SCALE, aspect_ratio_range=RATIO, min_object_covered=0)`."""


class TensorFlowDraws:
    """TensorFlow's stateless generator for seed (a, b), handed out as a crop asks: as a float, or below n by `* n`."""

    def __init__(self, a: int, b: int) -> None:
        scrambled = self._words([a, 0, b, 0], (0x3EC8F720, 0x02461E29))
        self._key, self._counter = (scrambled[0], scrambled[1]), [0, 0, scrambled[2], scrambled[3]]
        self._left: list[int] = []

    @staticmethod
    def _words(counter: list[int], key: tuple[int, int]) -> list[int]:
        words = _philox(np.array(counter, dtype=np.uint64)[:, None], *map(np.uint64, key))
        return [int(word) for word in words[:, 0]]

    def _next(self) -> int:
        if not self._left:
            self._left = self._words(self._counter, self._key)
            self._counter[0] += 1
        return self._left.pop(0)

    def __float__(self) -> float:
        return (self._next() & 0x7FFFFF) / 2**23

    def __mul__(self, n: int) -> int:
        if n & (n - 1) == 0:
            return self._next() & (n - 1)
        while (word := self._next()) > (2**32 - 1) - ((2**32 - 1) % n + 1):
            pass
        return word % n


def test_the_inception_box_is_tensorflows_from_the_same_draws() -> None:
    whole = 0
    for seed, height, width, *box in ANSWERS["boxes"]:
        draws = TensorFlowDraws(seed, 7)
        assert list(inception_box(height, width, SCALE, RATIO, [[draws] * 4] * 100)) == box
        whole += box == [0, 0, height, width]
    assert whole >= 10  # the fallback was among them


def inception_boxes(height: int, width: int, count: int) -> np.ndarray:
    draws = uniform(0, Stream.AUGMENT, INCEPTION_DRAWS, np.arange(count)).reshape(count, -1, 4)
    return np.array([inception_box(height, width, SCALE, RATIO, row.tolist()) for row in draws])


@pytest.mark.parametrize("size", [(375, 500), (28, 28), (1, 1), (3, 400), (400, 3)])
def test_an_inception_box_is_inside_the_image_and_of_an_allowed_area_and_shape(size: tuple[int, int]) -> None:
    for top, left, height, width in inception_boxes(*size, 300):
        assert 0 <= top <= size[0] - height
        assert 0 <= left <= size[1] - width
        if (height, width) != size:
            assert 0.08 * size[0] * size[1] <= height * width
            assert abs(width - height * RATIO[0]) <= 1 or RATIO[0] < width / height < RATIO[1] + 1 / height


def test_the_height_of_an_inception_box_is_uniform_given_its_shape_and_the_last_place_is_never_drawn() -> (
    None
):
    top, left, height, width = inception_boxes(1000, 1000, 4000).T
    shape = width / height
    low, high = np.sqrt(0.08 * 1e6 / shape), np.minimum(np.sqrt(1e6 / shape), np.minimum(1000, 1000 / shape))
    assert kstest((height - low) / (high - low), "uniform").pvalue > 1e-3
    assert kstest(shape, "uniform", args=(RATIO[0], RATIO[1] - RATIO[0])).pvalue > 1e-3
    for start, length in ((top, height), (left, width)):
        free = length < 1000
        assert (start[free] < 1000 - length[free]).all()
        assert kstest((start[free] + 0.5) / (1000 - length[free]), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("size", [(32, 32), (32, 57), (90, 32)])
def test_the_simple_crop_is_torchvisions_from_the_same_draws(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    padded = torchvision.pad(Image.fromarray(pixels), [4], padding_mode="reflect")
    places = set()
    for draws in uniform(0, Stream.AUGMENT, 2, np.arange(200)):
        top, left = (int(draw * (n + 8 - 32 + 1)) for draw, n in zip(draws, size, strict=True))
        expected = torchvision.crop(padded, top, left, 32, 32)
        np.testing.assert_array_equal(simple_crop(pixels, (32, 32), draws), np.asarray(expected))
        places.add((top, left))
    limits = [RandomCrop.get_params(padded, (32, 32)) for _ in range(300)]
    assert max(top for top, _ in places) == max(top for top, *_ in limits) == size[0] + 8 - 32


def test_greyscale_is_cropped_alike() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 30, 1), dtype=np.uint8)
    draws = np.array([0.3, 0.9])
    np.testing.assert_array_equal(
        simple_crop(grey, (16, 16), draws)[:, :, 0], simple_crop(grey.repeat(3, 2), (16, 16), draws)[:, :, 1]
    )
