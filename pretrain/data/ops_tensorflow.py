"""Image operations as big_vision defines them (its `pp/autoaugment.py`, from the EfficientNet code): TensorFlow's
arithmetic, which differs from Pillow's in the last bit and, in `contrast`, in kind.

Everywhere uint8 [h, w, C] in and out, C 1 or 3; sums and products in float32, cut off (not rounded) to uint8. On
greyscale (C = 1) `color` is the identity. Equal operations are those of `ops_pillow`.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pretrain.data import ops_pillow
from pretrain.data.box import Pixels

Floats = npt.NDArray[np.float32]

FILL = 128
"""Grey of what comes from outside the image, and of a cutout."""

_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)


def autocontrast(image: Pixels) -> Pixels:
    """Each channel stretched to [0, 255]."""
    out = np.empty_like(image)
    levels = np.arange(256, dtype=np.float32)
    for c in range(image.shape[2]):
        low, high = np.float32(image[:, :, c].min()), np.float32(image[:, :, c].max())
        if high == low:
            out[:, :, c] = image[:, :, c]
            continue
        scale = np.float32(255) / (high - low)
        out[:, :, c] = _cut(levels * scale + -low * scale).take(image[:, :, c])
    return out


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Invert what is not below `threshold` modulo 256.

    TensorFlow turns the threshold into a uint8, and with the numpy 1 of every published run 256 becomes 0 there: at
    magnitude 10 the whole image is inverted, at 15 what is above 128.
    """
    below = image < np.uint8(threshold % 256)
    return np.where(below, image, np.bitwise_not(image))


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keep the `bits` highest bits, 1 to 8; 0 keeps one too, since TensorFlow shifts a uint8 by at most 7."""
    return ops_pillow.posterize(image, max(bits, 1))


def color(image: Pixels, factor: float) -> Pixels:
    """Between greyscale (0) and the image (1), and beyond."""
    if image.shape[2] == 1:
        return image
    parts = image.astype(np.float32) * np.float32(1 / 255) * _LUMA
    grey = ((parts[:, :, 0] + parts[:, :, 1]) + parts[:, :, 2]) * np.float32(255.5)
    return _blend(np.trunc(grey)[:, :, None], image, factor)


def contrast(image: Pixels, factor: float) -> Pixels:
    """Between a constant (0) and the image (1), and beyond.

    The constant is not the mean grey but the number of pixels / 256, at most 255 (big_vision's issue 109): 196 for
    224 x 224 pixels. Kept, because models were trained with it.
    """
    constant = np.float32(int(min(image.shape[0] * image.shape[1] / 256, 255.0)))
    return _blend(constant, np.arange(256, dtype=np.uint8), factor).take(image)


def brightness(image: Pixels, factor: float) -> Pixels:
    """Between black (0) and the image (1), and beyond."""
    return _blend(np.float32(0), np.arange(256, dtype=np.uint8), factor).take(image)


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Between a smoothed image (0) and the image (1), and beyond; the outermost pixels stay.

    TensorFlow's convolution adds up with fused multiplications: exact products, each sum rounded to float32.
    """
    height, width, channels = image.shape
    wide = image.astype(np.float64)
    smooth = np.zeros((max(height - 2, 0), max(width - 2, 0), channels), np.float32)
    for row in range(3):
        for column in range(3):
            part = wide[row : row + smooth.shape[0], column : column + smooth.shape[1]]
            smooth = (smooth + part * float(_SMOOTH[row, column])).astype(np.float32)
    degenerate = image.copy()
    degenerate[1 : height - 1, 1 : width - 1] = _cut(smooth)
    return _blend(degenerate.astype(np.float32), image, factor)


def rotate(image: Pixels, degrees: float) -> Pixels:
    """About the centre, nearest pixels."""
    height, width, _ = image.shape
    radians = float(np.float32(degrees * (math.pi / 180.0)))
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    right, bottom = np.float32(width - 1), np.float32(height - 1)
    x = (right - (cos * right - sin * bottom)) / np.float32(2)
    y = (bottom - (sin * right + cos * bottom)) / np.float32(2)
    return _moved(image, (cos, -sin, x), (sin, cos, y))


def shear_x(image: Pixels, level: float) -> Pixels:
    return _moved(image, (1, level, 0), (0, 1, 0))


def shear_y(image: Pixels, level: float) -> Pixels:
    return _moved(image, (1, 0, 0), (level, 1, 0))


def translate_x(image: Pixels, pixels: float) -> Pixels:
    return _moved(image, (1, 0, pixels), (0, 1, 0))


def translate_y(image: Pixels, pixels: float) -> Pixels:
    return _moved(image, (1, 0, 0), (0, 1, pixels))


def cutout(image: Pixels, half: int, row: int, column: int) -> Pixels:
    """A grey square of 2 * `half` pixels a side around (row, column), as much of it as is inside (arXiv 1708.04552)."""
    out = image.copy()
    out[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = FILL
    return out


def _blend(degenerate: Floats | np.float32, image: Pixels, factor: float) -> Pixels:
    """degenerate + factor * (image - degenerate), cut off to uint8."""
    if factor == 1.0:
        return image
    wide = image.astype(np.float32)
    return _cut(degenerate + np.float32(factor) * (wide - degenerate))


def _cut(values: Floats) -> Pixels:
    return np.clip(values, 0, 255).astype(np.uint8)


def _moved(image: Pixels, to_x: Sequence[float | np.float32], to_y: Sequence[float | np.float32]) -> Pixels:
    """Output (x, y) shows the input pixel nearest to (to_x . (x, y, 1), to_y . (x, y, 1)), or `FILL`."""
    height, width, _ = image.shape
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    column, row = (
        _nearest(np.float32(a) * x + np.float32(b) * y + np.float32(c)) for a, b, c in (to_x, to_y)
    )
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    out: Pixels = image[row.clip(0, height - 1), column.clip(0, width - 1)]
    out[~inside] = FILL
    return out


def _nearest(coordinates: Floats) -> npt.NDArray[np.int64]:
    """Rounded, halves away from zero."""
    return np.copysign(np.floor(np.abs(coordinates) + np.float32(0.5)), coordinates).astype(np.int64)
