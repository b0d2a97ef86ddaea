"""Random crops beside torchvision's (`augment`): TensorFlow's, and DeiT-3's simple one. Sizes are (height, width)."""

from collections.abc import Sequence

import numpy as np

from pretrain.data.box import Box, Pixels
from pretrain.draws import FloatArray, IntArray

INCEPTION_TRIES = 100
INCEPTION_DRAWS = 4 * INCEPTION_TRIES
"""Shape, height, top and left for each try."""

SIMPLE_DRAWS = 2
"""Top and left."""

SIMPLE_PADDING = 4
"""Pixels that DeiT-3 adds on each side by reflection (Touvron et al. 2022, arXiv 2204.07118, section 3.3)."""


def inception_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: Sequence[Sequence[float]],
) -> Box:
    """The crop of Szegedy et al. 2015 as `tf.image.sample_distorted_bounding_box` defines it and big_vision uses it:
    without boxes to cover, `min_object_covered` 0, the whole image where 100 tries fail.

    draws: numbers in [0, 1), 4 for each try. Width / height is uniform in `ratio`; then the height, not the area, is
    uniform over the whole numbers that give an area in `scale`. The arithmetic is the kernel's in float32, with what
    is odd in it: the last place at the bottom and at the right is never drawn.
    """
    f32 = np.float32
    smallest, largest = (f32(share) * f32(width) * f32(height) for share in scale)
    low, high = f32(ratio[0]), f32(ratio[1])
    for shape_draw, height_draw, top_draw, left_draw in draws:
        shape = f32(shape_draw) * (high - low) + low
        rows = int(np.rint(np.sqrt(smallest / shape)))
        most = int(np.rint(np.sqrt(largest / shape)))
        if _columns(most, shape) > width:
            most = int((width + 0.5 - float(f32(1e-7))) / float(shape))
            most -= _columns(most, shape) > width
        most = min(most, height)
        rows = min(rows, most)
        if rows < most:
            rows += int(height_draw * (most - rows + 1))
        # Rounding may have left the range of areas by a row.
        if f32(rows * _columns(rows, shape)) < smallest:
            rows += 1
        if f32(rows * _columns(rows, shape)) > largest:
            rows -= 1
        columns = _columns(rows, shape)
        fits = 0 < columns <= width and 0 < rows <= height
        if fits and smallest <= f32(rows * columns) <= largest:
            top = int(top_draw * (height - rows)) if rows < height else 0
            left = int(left_draw * (width - columns)) if columns < width else 0
            return Box(top, left, rows, columns)
    return Box(0, 0, height, width)


def _columns(rows: int, shape: np.float32) -> int:
    """Width of so many rows, halves to even."""
    return int(np.rint(np.float32(rows) * shape))


def simple_crop(image: Pixels, size: tuple[int, ...], draws: FloatArray) -> Pixels:
    """DeiT-3's crop of an image whose shorter side is resized already: a window of `size`, anywhere in the image with
    4 reflected pixels on each side; torchvision's `RandomCrop(size, padding=4, padding_mode="reflect")`.

    image: uint8 [h, w, C], at least as large as `size` and than 5 pixels; draws: float64 [2]. Returns uint8 [*size, C].
    """
    rows, columns = (
        _reflected(length, wanted, draw)
        for length, wanted, draw in zip(image.shape[:2], size, draws.tolist(), strict=True)
    )
    return image[rows[:, None], columns]


def _reflected(length: int, wanted: int, draw: float) -> IntArray:
    """Indices in [0, length) of a window of `wanted` in -4 .. length + 3, reflected without repeating the edge."""
    start = int(draw * (length + 2 * SIMPLE_PADDING - wanted + 1)) - SIMPLE_PADDING
    index = np.abs(np.arange(start, start + wanted, dtype=np.int64))
    reflected: IntArray = np.minimum(index, 2 * (length - 1) - index)
    return reflected
