"""What an image file says of itself before any of its pixels are decoded."""

from typing import NamedTuple

from pretrain.data.decode import FORMATS, opened
from pretrain.errors import BadSampleError

SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class Header(NamedTuple):
    """format, mode: Pillow's words; width, height: as stored, before any EXIF turn."""

    format: str
    mode: str
    width: int
    height: int


def read_header(data: bytes | memoryview, max_pixels: int) -> Header:
    """No pixel is decoded. Raises `BadSampleError` for what is no JPEG, PNG or WebP, or has too many pixels."""
    try:
        with opened(data) as image:
            header = Header(image.format or "", image.mode, *image.size)
    except Exception as error:  # Pillow raises a dozen kinds on damaged bytes
        raise BadSampleError(
            f"not an image of {', '.join(FORMATS)} ({type(error).__name__}, {len(data):,} bytes)"
        ) from None
    if header.width * header.height > max_pixels:
        raise BadSampleError(f"{header.width} x {header.height} pixels; at most {max_pixels:,} are allowed")
    return header
