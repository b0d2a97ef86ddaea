"""Random erasing (Zhong et al. 2017, arXiv 1708.04896) as timm's `RandomErasing` defines it, on uint8."""

import math
from collections.abc import Sequence

import numpy as np

from pretrain.config import RandomErasingConfig
from pretrain.data.box import Pixels
from pretrain.draws import Stream, normal, uniform

_TRIES = 10


class RandomErasing:
    """Blot out boxes of an image.

    timm erases normalised floats, with 0 or with standard normal noise; in pixels that is the model's mean, and
    noise of the model's mean and standard deviation, here rounded and held in [0, 255].
    """

    def __init__(self, config: RandomErasingConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        """mean, std: of pixels in [0, 1], one value a channel."""
        self._config = config
        self._mean, self._std = 255.0 * np.asarray(mean), 255.0 * np.asarray(std)
        self.num_draws = 3 + 4 * _TRIES * config.count
        """Whether, two for the key of the noise; for each box and try the area, the shape, top and left."""

    def apply(self, image: Pixels, draws: Sequence[float]) -> Pixels:
        """uint8 [h, w, C] and `num_draws` numbers in [0, 1) -> uint8 [h, w, C]."""
        if draws[0] > self._config.prob:
            return image
        out = image.copy()
        for number in range(self._config.count):
            start = 3 + 4 * _TRIES * number
            box = self._box(image.shape[0], image.shape[1], draws[start : start + 4 * _TRIES])
            if box is not None:
                out[box] = self._fill(out[box].shape, number, draws)
        return out

    def _box(self, height: int, width: int, draws: Sequence[float]) -> tuple[slice, slice] | None:
        """The first box of ten that is smaller than the image both ways."""
        config = self._config
        low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
        for i in range(0, len(draws), 4):
            area_draw, shape_draw, top_draw, left_draw = draws[i : i + 4]
            area = (
                (config.area[0] + (config.area[1] - config.area[0]) * area_draw)
                * height
                * width
                / config.count
            )
            shape = math.exp(low + (high - low) * shape_draw)
            rows, columns = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if rows < height and columns < width:
                top, left = int(top_draw * (height - rows + 1)), int(left_draw * (width - columns + 1))
                return slice(top, top + rows), slice(left, left + columns)
        return None

    def _fill(self, shape: tuple[int, ...], number: int, draws: Sequence[float]) -> Pixels:
        values = self._mean
        if self._config.mode == "pixel":
            # As many normals as there are pixels: from a generator of their own, keyed by two words of the sample's.
            key, word = (int(draw * 2**32) for draw in draws[1:3])
            first, second = uniform(key, Stream.POLICY, 2 * math.prod(shape), word, number).reshape(2, *shape)
            values = self._mean + self._std * normal(first, second)
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)
