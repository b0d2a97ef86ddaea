"""A smaller copy of an image that is larger than needed."""

import io

from PIL import Image

from pretrain.data.decode import decode
from pretrain.data.header import Header

_ONE_CHANNEL = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L"})


def shrink(data: bytes, header: Header, longest_side: int, quality: int, max_pixels: int) -> bytes:
    """A copy whose longest side is `longest_side`, in the format of the original; the bytes as they are if it is not
    longer than that.

    The copy holds what training would see: upright by the EXIF orientation, 8 bits, greyscale or RGB, without alpha and
    without metadata. Lanczos with antialiasing; JPEG and WebP of `quality`, PNG without loss. Raises `BadSampleError`.
    """
    if max(header.width, header.height) <= longest_side:
        return data
    pixels = decode(data, 1 if header.mode in _ONE_CHANNEL else 3, max_pixels)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    share = longest_side / max(image.size)
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    with io.BytesIO() as file:
        options = {} if header.format == "PNG" else {"quality": quality}
        image.resize(size, Image.Resampling.LANCZOS).save(file, header.format, **options)
        return file.getvalue()
