"""From the bytes of an image file to pixels: what the file is decides, not what it is called.

JPEG is decoded by libjpeg-turbo (simplejpeg), which gives Pillow's pixels in three quarters of its time without the
GIL; what that refuses, and every other file, by Pillow. The optional native part (`_jpegbox.c`) goes before both and
decodes no more of a JPEG than is wanted. It changes no pixel and no verdict: what it does not fill, it has not judged.
`docs/images.md` has the table of what becomes of what.
"""

import io
import logging
import re
import struct
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from pretrain.data.box import Box, Pixels, crop, whole
from pretrain.data.scans import MAX_SCANS, has_too_many_scans
from pretrain.errors import BadSampleError
from pretrain.logs import log

__all__ = ["FORMATS", "decode", "decoder", "jpegbox", "log_decoder", "opened"]

try:
    from pretrain.data import _jpegbox as jpegbox
except ImportError as error:
    jpegbox, WHY_WHOLE = None, str(error)  # type: ignore[assignment]
else:
    WHY_WHOLE = ""

FORMATS = ("JPEG", "PNG", "WEBP")
_OBJECT = re.compile(r" ?<_io.BytesIO object[^>]*>")
_ORIENTATION = 0x0112
_SHORT = 3
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


def decoder() -> str:
    """What decodes JPEGs here, for people; and, if it is the slower one, how to get the other."""
    if jpegbox is not None:
        return "JPEG: only the box that a view shows is decoded, by the native part"
    return (
        f"JPEG: pictures are decoded whole, the native part is not there ({WHY_WHOLE})\n"
        "  It saves a sixth of the processor time of an image and changes none of its pixels. With a C compiler and\n"
        "  libjpeg-turbo's header (Debian: apt-get install gcc libjpeg62-turbo-dev python3-dev) install this project again."
    )


def log_decoder() -> None:
    """Called once by whoever is going to decode boxes."""
    log.log(logging.WARNING if WHY_WHOLE else logging.INFO, decoder())


def decode(
    data: memoryview | bytes, in_chans: int, max_pixels: int, part: Callable[[int, int], Box] = whole
) -> Pixels:
    """Of an upright picture the box `part(height, width)`: uint8 [h, w, in_chans], RGB (3) or greyscale (1).

    Alpha is dropped. Raises `BadSampleError` where the file is of no allowed kind, claims more than `max_pixels` pixels
    or has too many scans (nothing is decoded then), or is damaged, be it outside of the box.
    """
    if simplejpeg.is_jpeg(data):
        if has_too_many_scans(data):
            raise BadSampleError(f"a JPEG of more than {MAX_SCANS} scans")
        if (found := _decode_box(data, in_chans, max_pixels, part)) is not None:
            return found
        try:
            return _part(_decode_jpeg(data, in_chans, max_pixels), part)
        except ValueError:  # damaged, or of a kind that Pillow reads: it decides
            pass
    return _part(_decode_by_pillow(data, in_chans, max_pixels), part)


def _part(pixels: Pixels, part: Callable[[int, int], Box]) -> Pixels:
    height, width, _ = pixels.shape
    return crop(pixels, part(height, width))


def _decode_box(
    data: memoryview | bytes, in_chans: int, max_pixels: int, part: Callable[[int, int], Box]
) -> Pixels | None:
    """By the native part; None where it is not there, or where the whole picture has to be asked."""
    if jpegbox is None or (size := jpegbox.size_of(data)) is None:
        return None
    height, width, components = size
    if height * width > max_pixels or _jpeg_orientation(data) in _TURNS:
        return None
    box = part(height, width)
    channels = 1 if in_chans == components == 1 else 3
    pixels = np.empty((box.height, box.width, channels), np.uint8)
    if not jpegbox.decode(data, pixels, *box, channels):
        return None
    return pixels if channels == in_chans else _pixels(Image.fromarray(pixels).convert("L"), None)


def _decode_jpeg(data: memoryview | bytes, in_chans: int, max_pixels: int) -> Pixels:
    """A greyscale or colour JPEG; raises `ValueError` for any other, and for what decoders merely warn of."""
    height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
    if stored not in ("Gray", "YCbCr", "RGB"):
        raise ValueError(f"a JPEG in {stored}")
    _check_size(height, width, max_pixels)
    grey = stored == "Gray" and in_chans == 1
    pixels: Pixels = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB")
    turn = _TURNS.get(_jpeg_orientation(data))
    if turn is None and pixels.shape[2] == in_chans:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if grey else pixels)
    return _pixels(image if grey or in_chans == 3 else image.convert("L"), turn)


def _decode_by_pillow(data: memoryview | bytes, in_chans: int, max_pixels: int) -> Pixels:
    try:
        with opened(data) as image:
            _check_size(image.height, image.width, max_pixels)
            image.load()
            turn = _TURNS.get(_orientation(image))
            return _pixels(_eight_bits(image).convert("RGB" if in_chans == 3 else "L"), turn)
    except BadSampleError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged bytes
        raise BadSampleError(f"not decodable as {', '.join(FORMATS)}: {_first_line(error)}") from None


def opened(data: memoryview | bytes) -> Image.Image:
    """A file in Pillow's hands, nothing of it decoded. The caller sees to its size: what Pillow takes for too many pixels is
    not asked, or a larger `data.max_pixels` would not be what is allowed."""
    Image.MAX_IMAGE_PIXELS = None
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSampleError(f"{width} x {height} pixels; data.max_pixels allows {max_pixels:,}")


def _pixels(image: Image.Image, turn: Image.Transpose | None) -> Pixels:
    """uint8 [H, W, C] of a Pillow image of mode RGB or L, turned; writable, its own memory."""
    pixels = np.array(image if turn is None else image.transpose(turn))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none; damaged EXIF does not cost a sound picture."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1


def _jpeg_orientation(data: memoryview | bytes) -> int:
    """EXIF orientation from the segments before the picture, in microseconds; 1 where there is none or it is damaged.

    A segment is FF, a marker, its length as two bytes with those (ITU-T T.81, B.1.1.4); EXIF lies in APP1.
    """
    at = 2
    try:
        while True:
            start, marker, length = struct.unpack_from(">BBH", data, at)
            if start != 0xFF or 0xC0 <= marker <= 0xC3 or marker == 0xDA:
                return 1
            if marker == 0xE1 and bytes(data[at + 4 : at + 10]) == b"Exif\0\0":
                return _tiff_orientation(data[at + 10 : at + 2 + length])
            at += 2 + length
    except struct.error:
        return 1


def _tiff_orientation(tiff: memoryview | bytes) -> int:
    """Tag Orientation of the first directory (TIFF 6.0, section 2); raises `struct.error` where it is cut short."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(count):
        tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
        if tag == _ORIENTATION:
            return int(value) if kind == _SHORT else 1
    return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale keeps its upper 8 bits; Pillow's own conversion would clip at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _first_line(error: Exception) -> str:
    """Without the address of the bytes: the same damage is told in the same words each time."""
    words = (str(error) or type(error).__name__).splitlines()[0]
    return _OBJECT.sub("", words)[:200]
