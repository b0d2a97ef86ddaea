import contextlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from pretrain.data.decode import decode
from pretrain.data.header import read_header
from pretrain.errors import BadSampleError

LIMIT = 10_000


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def photograph() -> Image.Image:
    """640 x 427, in colour."""
    return Image.fromarray(load_sample_image("china.jpg"))


def colours() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8))


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("stored", ["L", "LA", "P", "RGB", "RGBA", "1", "CMYK", "I;16"])
def test_every_stored_mode_becomes_the_models_channels(stored, in_chans):
    if stored == "I;16":
        image = Image.fromarray(np.arange(126, dtype=np.uint16).reshape(9, 14) * 500)
    else:
        image = colours().convert(stored)
    found = decode(saved(image, "JPEG" if stored == "CMYK" else "PNG"), in_chans, LIMIT)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, (9, 14, in_chans), True)


def test_sixteen_bits_keep_their_upper_eight():
    values = np.array([[0, 255, 256, 65535, 32768]], dtype=np.uint16)
    found = decode(saved(Image.fromarray(values), "PNG"), 1, LIMIT)
    assert found[:, :, 0].tolist() == [[0, 0, 1, 255, 128]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_the_content_decides_the_format(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(saved(colours(), kind, **options), 3, LIMIT)
    if kind != "JPEG":
        np.testing.assert_array_equal(found, np.asarray(colours()))


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("stored", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 100}, {"optimize": True}],
    ids=str,
)
def test_a_jpeg_has_pillows_pixels(stored, options, in_chans):
    data = saved(photograph().convert(stored), "JPEG", **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB" if in_chans == 3 else "L")
    np.testing.assert_array_equal(
        decode(memoryview(data), in_chans, 10**6), np.asarray(expected).reshape(427, 640, in_chans)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_as_pillow_applies_it(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(colours(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data, 3, LIMIT), np.asarray(expected))


def test_damaged_exif_does_not_cost_the_picture():
    plain = decode(saved(colours(), "JPEG"), 3, LIMIT)
    for garbage in (b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0XXXXXXXXXX"):
        np.testing.assert_array_equal(decode(saved(colours(), "JPEG", exif=garbage), 3, LIMIT), plain)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_bomb_is_refused_by_its_header(kind):
    bomb = saved(Image.new("L", (4000, 4000)), kind)
    with pytest.raises(BadSampleError, match=r"4000 x 4000 pixels; data\.max_pixels allows 10,000"):
        decode(bomb, 3, LIMIT)


def test_a_bomb_beyond_pillows_own_limit_is_refused():
    header = bytearray(saved(Image.new("L", (1, 1)), "PNG"))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(BadSampleError, match=r"60000 x 60000 pixels; data\.max_pixels allows 10,000"):
        decode(bytes(header), 3, LIMIT)


def test_what_is_allowed_is_read_also_beyond_pillows_own_limit(monkeypatch):
    """A small limit of Pillow's stands for its 179 million pixels."""
    data = saved(Image.new("L", (200, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert decode(data, 3, 20_000).shape == (100, 200, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert read_header(data, 20_000).width == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"GIF89a",
        saved(Image.new("L", (8, 8)), "BMP"),
        saved(Image.new("L", (8, 8)), "GIF"),
    ],
)
def test_other_files_are_refused(data):
    with pytest.raises(BadSampleError, match="not decodable"):
        decode(data, 3, LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_short_is_refused(kind):
    data = saved(colours().resize((100, 80)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadSampleError):
            decode(data[: int(len(data) * share)], 3, LIMIT)


def test_random_damage_gives_a_picture_or_a_named_error():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = saved(colours(), kind)
        for _ in range(150):
            damaged = bytearray(data)
            for at in generator.integers(0, len(data), 3):
                damaged[at] ^= 1 << int(generator.integers(8))
            with contextlib.suppress(BadSampleError):
                assert decode(bytes(damaged), 3, LIMIT).shape[2] == 3
