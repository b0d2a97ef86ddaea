"""What an image file says it is, and a smaller copy of one that is larger than needed."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from pretrain.data.decode import FORMATS, BadSampleError, decode

SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ONE_CHANNEL = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L"})


class Header(NamedTuple):
    """format, mode: Pillow's words; width, height: as stored, before any EXIF turn."""

    format: str
    mode: str
    width: int
    height: int


def read_header(data: bytes | memoryview, max_pixels: int) -> Header:
    """No pixel is decoded. Raises `BadSampleError` for what is no JPEG, PNG or WebP, or has too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            header = Header(image.format or "", image.mode, *image.size)
    except Exception as error:  # Pillow raises a dozen kinds on damaged bytes
        raise BadSampleError(
            f"not an image of {', '.join(FORMATS)} ({type(error).__name__}, {len(data):,} bytes)"
        ) from None
    if header.width * header.height > max_pixels:
        raise BadSampleError(f"{header.width} x {header.height} pixels; at most {max_pixels:,} are allowed")
    return header


def shrink(data: bytes, header: Header, longest_side: int, quality: int, max_pixels: int) -> bytes:
    """A copy whose longest side is `longest_side`, in the format of the original; the bytes as they are if it is not
    longer than that.

    The copy holds what training would see: upright by the EXIF orientation, 8 bits, greyscale or RGB, without alpha and
    without metadata. Lanczos with antialiasing; JPEG and WebP of `quality`, PNG without loss. Raises `BadSampleError`.
    """
    if max(header.width, header.height) <= longest_side:
        return data
    pixels = np.asarray(decode(data, 1 if header.mode in _ONE_CHANNEL else 3, max_pixels))
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    share = longest_side / max(image.size)
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    with io.BytesIO() as file:
        options = {} if header.format == "PNG" else {"quality": quality}
        image.resize(size, Image.Resampling.LANCZOS).save(file, header.format, **options)
        return file.getvalue()
