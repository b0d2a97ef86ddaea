"""Pixels, and a part of them. Sizes are (height, width)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
"""uint8 [height, width, channels], rows of one memory block; 3 channels are RGB, 1 is greyscale."""


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def whole(height: int, width: int) -> Box:
    """All of a picture of that size."""
    return Box(0, 0, height, width)


def crop(pixels: Pixels, box: Box) -> Pixels:
    """The part of `pixels` in `box`; the same memory."""
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]
