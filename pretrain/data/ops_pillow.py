"""Image operations as timm and torchvision define them: on Pillow images, by Pillow itself.

Everywhere uint8 [h, w, C] in and out, C 1 or 3. On greyscale (C = 1) what concerns colour alone is the identity:
`color`, `greyscale`, `hue`.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, ImageStat

from pretrain.data.box import Pixels

Affine = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): output (x, y) shows the input at (ax + by + c, dx + ey + f)."""

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""How `affine` and `rotate` interpolate, by the name of `data.interpolation`."""


def autocontrast(image: Pixels) -> Pixels:
    """Each channel stretched to [0, 255]."""
    return _pixels(ImageOps.autocontrast(_pillow(image)))


def equalize(image: Pixels) -> Pixels:
    """Each channel mapped so that its histogram is flat."""
    return _pixels(ImageOps.equalize(_pillow(image)))


def invert(image: Pixels) -> Pixels:
    return np.bitwise_not(image)


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keep the `bits` highest bits, 0 to 8; 0 is black, as it was before Pillow 13 refused it."""
    return np.bitwise_and(image, np.uint8(256 - 2 ** (8 - bits)))


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Invert what is not below `threshold`, 0 to 256."""
    return _pixels(ImageOps.solarize(_pillow(image), threshold))


def solarize_add(image: Pixels, addition: int) -> Pixels:
    """Add `addition` to what is below 128, at most to 255."""
    levels = np.arange(256)
    table = np.where(levels < 128, np.minimum(levels + addition, 255), levels).astype(np.uint8)
    return table.take(image)


def color(image: Pixels, factor: float) -> Pixels:
    """Between greyscale (0) and the image (1), and beyond."""
    return image if image.shape[2] == 1 else _pixels(ImageEnhance.Color(_pillow(image)).enhance(factor))


def contrast(image: Pixels, factor: float) -> Pixels:
    """Between the mean grey (0) and the image (1), and beyond."""
    mean = ImageStat.Stat(_pillow(image).convert("L")).mean[0]
    return _from_grey(image, int(mean + 0.5), factor)


def brightness(image: Pixels, factor: float) -> Pixels:
    """Between black (0) and the image (1), and beyond."""
    return _from_grey(image, 0, factor)


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Between a smoothed image (0) and the image (1), and beyond."""
    return _pixels(ImageEnhance.Sharpness(_pillow(image)).enhance(factor))


def greyscale(image: Pixels) -> Pixels:
    """ITU-R 601 luma in every channel."""
    return image if image.shape[2] == 1 else _pixels(_pillow(image).convert("L").convert("RGB"))


def hue(image: Pixels, shift: float) -> Pixels:
    """Turn the hue by `shift` of a full circle, -0.5 to 0.5, as torchvision's `adjust_hue` does on Pillow images."""
    if image.shape[2] == 1:
        return image
    hsv = np.array(_pillow(image).convert("HSV"))
    hsv[:, :, 0] += np.int32(shift * 255).astype(np.uint8)  # wraps: a hue is an angle
    return _pixels(Image.frombytes("HSV", (hsv.shape[1], hsv.shape[0]), hsv.tobytes()).convert("RGB"))


def gaussian_blur(image: Pixels, radius: float) -> Pixels:
    """Pillow's approximation by box filters; radius in pixels."""
    return _pixels(_pillow(image).filter(ImageFilter.GaussianBlur(radius)))


def affine(image: Pixels, matrix: Affine, resample: Image.Resampling, fill: Sequence[int]) -> Pixels:
    """Move pixels by `matrix`; what comes from outside is `fill`, one value a channel."""
    picture = _pillow(image)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=_fill(fill)
    )
    return _pixels(moved)


def rotate(image: Pixels, degrees: float, resample: Image.Resampling, fill: Sequence[int]) -> Pixels:
    """Counter-clockwise about the centre; what comes from outside is `fill`, one value a channel."""
    return _pixels(_pillow(image).rotate(degrees, resample=resample, fillcolor=_fill(fill)))


def _from_grey(image: Pixels, level: int, factor: float) -> Pixels:
    """Pillow's blend of one grey (factor 0) and the image (1), by a table: Pillow blends the 256 levels, not the image."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = np.asarray(Image.blend(Image.new("L", levels.size, level), levels, factor))[0]
    blended: Pixels = table.take(image)
    return blended


def _pillow(image: Pixels) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _pixels(image: Image.Image) -> Pixels:
    pixels: Pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _fill(fill: Sequence[int]) -> int | tuple[int, ...]:
    return fill[0] if len(fill) == 1 else tuple(fill)
