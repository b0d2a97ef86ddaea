"""From decoded pixels to a view of the model's size, written into its row of a batch.

Sizes are (height, width), pixels uint8 [height, width, channels] throughout.
"""

import math

import numpy as np
import numpy.typing as npt

from pretrain.config import AugmentConfig, ModelConfig
from pretrain.data.box import Box, Pixels, crop, whole
from pretrain.data.crops import INCEPTION_DRAWS, SIMPLE_DRAWS, inception_box, simple_crop
from pretrain.data.policies import Policy
from pretrain.data.resize import mirror, resize
from pretrain.draws import FloatArray, IntArray, Stream, split64, uniform

_TRIES = 10
NUM_DRAWS = 4 * _TRIES + 1
"""Area, shape, top and left for each try of a `random_resized` crop, room enough for the simpler ones; then the flip."""
LONGEST = 64
"""Length of a picture in widths, or the other way round, beyond which only its middle is looked at; see `middle`."""
REPEAT_SHIFT = 24
"""The upper word of a sample's number has room for the repeat: 2^56 samples are enough."""


class TrainView:
    """Random crop, flip and policy, drawn by (seed, epoch, sample, repeat): the same on any rank, thread or restart."""

    def __init__(self, config: AugmentConfig, model: ModelConfig, interpolation: str, seed: int) -> None:
        self._config, self._interpolation, self._seed = config, interpolation, seed
        self._num_draws = INCEPTION_DRAWS + 1 if config.crop == "inception" else NUM_DRAWS
        self._policy = Policy(config, model, interpolation, seed)

    def draws(self, epoch: IntArray, sample: IntArray, repeat: npt.ArrayLike = 0) -> FloatArray:
        """float64 [n, draws] in [0, 1) for samples by epoch, number, and which of its copies in the batch.

        Those of crop and flip, then the policy's.
        """
        low, high = split64(sample)
        high = high | np.left_shift(repeat, REPEAT_SHIFT)
        view = uniform(self._seed, Stream.AUGMENT, self._num_draws, low, high, epoch)
        return np.concatenate([view, self._policy.draws(low, high, epoch)], axis=1)

    def part(self, draws: FloatArray, height: int, width: int) -> Box:
        """What the view of a picture of that size shows of it; draws: a row of `draws`."""
        config = self._config
        match config.crop:
            case "random_resized":
                return random_resized_box(height, width, config.scale, config.ratio, draws)
            case "inception":
                tries = draws[:INCEPTION_DRAWS].reshape(-1, 4).tolist()
                return inception_box(height, width, config.scale, config.ratio, tries)
            case "resize_crop":
                return middle(height, width)
        return whole(height, width)

    def render(self, pixels: Pixels, draws: FloatArray, out: Pixels) -> None:
        """Write a view into `out` [H, W, C] of `pixels` [h, w, C], the `part` of the picture; draws: as there."""
        view, policy = draws[: self._num_draws], draws[self._num_draws :]
        if self._config.crop == "resize_crop":
            covering = _resized(pixels, covering_size(pixels.shape, out.shape, 1.0), self._interpolation)
            pixels = simple_crop(covering, out.shape[:2], view[:SIMPLE_DRAWS])
        resize(pixels, out, self._interpolation)
        if self._config.hflip and view[-1] < 0.5:
            mirror(out)
        if self._policy.num_draws > 0:
            out[...] = self._policy.apply(out, policy)


class EvalView:
    """Resize so that a centre crop keeps `val_crop` of the side, and crop."""

    def __init__(self, val_crop: float, interpolation: str) -> None:
        self._val_crop, self._interpolation = val_crop, interpolation

    def draws(self, epoch: IntArray, sample: IntArray, repeat: npt.ArrayLike = 0) -> FloatArray:
        """Nothing is drawn: float64 [n, 0]."""
        return np.empty((len(sample), 0))

    def part(self, draws: FloatArray, height: int, width: int) -> Box:
        """What of a picture of that size the view is made of."""
        return middle(height, width)

    def render(self, pixels: Pixels, draws: FloatArray, out: Pixels) -> None:
        """Write the view of `pixels` [h, w, C], the `part` of the picture, into `out` [H, W, C]."""
        covering = covering_size(pixels.shape, out.shape, self._val_crop)
        resized = _resized(pixels, covering, self._interpolation)
        out[...] = crop(resized, centre_box(covering, out.shape))


def random_resized_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: FloatArray
) -> Box:
    """The crop of Szegedy et al. 2015 (arXiv 1409.4842, section 6) as torchvision's `RandomResizedCrop` defines it.

    The area is uniform in `scale`, the logarithm of width / height uniform in `ratio`; after ten boxes that do not
    fit, the largest central one of an allowed shape.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, shape_draw, top_draw, left_draw in draws[: 4 * _TRIES].reshape(_TRIES, 4).tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        shape = math.exp(log_low + (log_high - log_low) * shape_draw)
        box_width, box_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(top_draw * (height - box_height + 1))
            left = int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def middle(height: int, width: int) -> Box:
    """All of a picture; of one that is more than `LONGEST` times as long as wide, the middle of that shape.

    To cover a square with a thread of pixels takes thousands of squares, of which a crop shows a pixel or two.
    """
    rows, columns = min(height, LONGEST * width), min(width, LONGEST * height)
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def covering_size(image: tuple[int, ...], size: tuple[int, ...], keep: float) -> tuple[int, int]:
    """The smallest size of the image's shape that covers size / keep (rounded down, as timm does)."""
    height, width = math.floor(size[0] / keep), math.floor(size[1] / keep)
    if height * image[1] >= width * image[0]:
        return height, max(width, height * image[1] // image[0])
    return max(height, width * image[0] // image[1]), width


def centre_box(image: tuple[int, ...], size: tuple[int, ...]) -> Box:
    """Rounds half to even, as torchvision's `CenterCrop` does."""
    return Box(round((image[0] - size[0]) / 2), round((image[1] - size[1]) / 2), size[0], size[1])


def _resized(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    resized = np.empty((*size, pixels.shape[2]), np.uint8)
    resize(pixels, resized, interpolation)
    return resized
