"""From the bytes of an image file to pixels: what the file is decides, not what it is called. Pillow decodes."""

import io
import struct

import numpy as np
from PIL import Image

from pretrain.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.3, tag Orientation: what brings the picture upright."""


class BadSampleError(DataError):
    """The bytes are the ones that were packed, and yet no picture can be made of them, or its label is no class."""


def decode(data: memoryview | bytes, in_chans: int, max_pixels: int) -> Image.Image:
    """An upright image of mode "RGB" (in_chans 3) or "L" (1), 8 bits a channel; alpha is dropped.

    Raises `BadSampleError` where the file is of no allowed kind, claims more than `max_pixels` pixels (nothing is decoded
    then), or is damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadSampleError(
                    f"{image.width} x {image.height} pixels; data.max_pixels allows {max_pixels:,}"
                )
            image.load()
            turn = _TURNS.get(_orientation(image))
            upright = _eight_bits(image).convert("RGB" if in_chans == 3 else "L")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged bytes
        raise BadSampleError(f"not decodable as {', '.join(FORMATS)}: {_first_line(error)}") from None
    return upright if turn is None else upright.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none; damaged EXIF does not cost a sound picture."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its upper 8 bits; Pillow's own conversion would clip at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].replace("<_io.BytesIO object", "<bytes")[:200]
