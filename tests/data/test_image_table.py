"""`docs/images.md`: each line of its table, against pixels worked out here; and how near a view is to Pillow's."""

import io
import re
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from pretrain.config import AugmentConfig, ModelConfig
from pretrain.data.augment import EvalView, TrainView, random_resized_box
from pretrain.data.box import crop
from pretrain.data.decode import decode
from pretrain.errors import BadSampleError

TABLE = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 427 x 640
SMALL = PHOTOS[1].crop((200, 100, 240, 130))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def with_alpha() -> Image.Image:
    image = SMALL.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def sixteen_bits() -> np.ndarray:
    return (np.asarray(SMALL.convert("L")).astype(np.uint16) << 8) + 0xAB


def rgb16() -> bytes:
    """An RGB PNG of 16 bits a channel, which Pillow does not write: zlib and chunks by hand."""
    values = (np.asarray(SMALL).astype(">u2") << 8) + 0x55
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", SMALL.width, SMALL.height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def rotated(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(SMALL, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


PALETTE = SMALL.quantize(16)
RGB = np.asarray(SMALL)

# What is stored, and the RGB (or greyscale) pixels that it stands for.
LINES: dict[str, list[tuple[bytes, np.ndarray]]] = {
    "JPEG, colour": [
        (data, np.asarray(opened(data).convert("RGB")))
        for options in ({}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True})
        for data in [saved(SMALL, "JPEG", **options)]
    ],
    "JPEG, greyscale": [(data, np.asarray(opened(data))) for data in [saved(SMALL.convert("L"), "JPEG")]],
    "JPEG, CMYK": [
        (data, np.asarray(opened(data).convert("RGB"))) for data in [saved(SMALL.convert("CMYK"), "JPEG")]
    ],
    "PNG or WebP, RGB": [(saved(SMALL, "PNG"), RGB), (saved(SMALL, "WEBP", lossless=True), RGB)],
    "PNG, greyscale or 1 bit": [
        (saved(SMALL.convert("L"), "PNG"), np.asarray(SMALL.convert("L"))),
        (saved(SMALL.convert("1"), "PNG"), np.asarray(SMALL.convert("1")) * np.uint8(255)),
    ],
    "PNG, 16 bits a channel": [
        (saved(Image.fromarray(sixteen_bits()), "PNG"), np.asarray(SMALL.convert("L"))),
        (rgb16(), RGB),
    ],
    "PNG, palette": [
        (saved(PALETTE, "PNG"), np.array(PALETTE.getpalette()).reshape(-1, 3)[np.asarray(PALETTE)])
    ],
    "PNG or WebP with alpha, or a transparent colour": [
        (saved(with_alpha(), "PNG"), RGB),
        (saved(with_alpha(), "WEBP", lossless=True, exact=True), RGB),
        (saved(SMALL, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
        (
            saved(PALETTE, "PNG", transparency=3),
            np.array(PALETTE.getpalette()).reshape(-1, 3)[np.asarray(PALETTE)],
        ),
    ],
    "WebP, animated": [
        (saved(SMALL, "WEBP", save_all=True, append_images=[SMALL.rotate(90)], lossless=True), RGB)
    ],
    "EXIF orientation 2 to 8": [
        (data, np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB")))
        for kind in ("JPEG", "PNG", "WEBP")
        for orientation in range(2, 9)
        for data in [rotated(kind, orientation)]
    ],
    "EXIF that is damaged": [
        (saved(SMALL, "JPEG", exif=exif), np.asarray(opened(saved(SMALL, "JPEG"))))
        for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    ],
}
BAD: dict[str, list[bytes]] = {
    "more pixels than `data.max_pixels` by the header": [
        saved(Image.new("L", (2000, 2000)), kind) for kind in ("JPEG", "PNG", "WEBP")
    ],
    "anything else": [
        *(saved(SMALL, kind) for kind in ("GIF", "TIFF", "BMP")),
        b"<html></html>",
        *(saved(SMALL, kind)[:-40] for kind in ("JPEG", "PNG", "WEBP")),
        *(saved(SMALL, kind)[:20] for kind in ("JPEG", "PNG", "WEBP")),
    ],
}


def test_the_table_has_a_test_for_each_line():
    lines = re.findall(r"^\| (.*?) \|", TABLE, re.MULTILINE)[2:]
    assert len(lines) == len(LINES) + len(BAD)
    for line, tested in zip(lines, [*LINES, *BAD], strict=True):
        assert line.startswith(tested)


@pytest.mark.parametrize("line", LINES)
def test_a_file_becomes_the_pixels_that_the_table_says(line):
    for data, expected in LINES[line]:
        rgb = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, axis=2)
        luma = (
            np.asarray(Image.fromarray(rgb.astype(np.uint8)).convert("L")) if expected.ndim == 3 else expected
        )
        np.testing.assert_array_equal(decode(data, 3, 10**6), rgb)
        np.testing.assert_array_equal(decode(data, 1, 10**6), luma[:, :, None])


@pytest.mark.parametrize("line", BAD)
def test_a_file_is_a_bad_sample_where_the_table_says(line):
    for data in BAD[line]:
        with pytest.raises(BadSampleError):
            decode(data, 3, 10**6)


def test_luma_is_itu_601s():
    weights = np.array([0.299, 0.587, 0.114])
    luma = decode(saved(SMALL, "PNG"), 1, 10**6)[:, :, 0]
    assert np.abs(luma - RGB @ weights).max() <= 1


def train_view(interpolation: str, crop: str = "random_resized") -> TrainView:
    model = ModelConfig(size="Ti", img_size=(8, 8), patch_size=(4, 4), num_classes=2)
    return TrainView(AugmentConfig(hflip=False, crop=crop), model, interpolation, seed=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_views_of_photographs_are_pillows_within_a_tenth_of_a_grey_level(in_chans, interpolation):
    """Pillow decodes, crops and resizes on the same boxes: large and small ones, growing, shrinking, at the borders."""
    view = train_view(interpolation)
    means, largest = [], 0
    for number, photo in enumerate(PHOTOS * 3):
        factor = (1.0, 0.5, 0.1)[number // 2]
        image = photo.resize((round(640 * factor), round(427 * factor)))
        data = saved(image, "JPEG", quality=90)
        theirs = opened(data).convert("RGB" if in_chans == 3 else "L")
        for draws in view.draws(np.zeros(12, np.int64), np.arange(12)):
            box = random_resized_box(image.height, image.width, (0.08, 1.0), (0.75, 4 / 3), draws)
            cut = theirs.crop((box.left, box.top, box.left + box.width, box.top + box.height))
            kernel = getattr(Image.Resampling, interpolation.upper())
            expected = np.asarray(cut.resize((96, 96), kernel)).reshape(96, 96, in_chans)
            found = np.empty((96, 96, in_chans), np.uint8)
            view.render(decode(data, in_chans, 10**6, partial(view.part, draws)), draws, found)
            difference = np.abs(found.astype(int) - expected)
            means.append(difference.mean())
            largest = max(largest, difference.max())
    assert np.mean(means) < 0.1
    assert (
        largest <= 1 or interpolation == "bicubic"
    )  # which overshoots, and is clipped between its two passes


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 500), (500, 3)])
@pytest.mark.parametrize("target", [(1, 1), (16, 16), (5, 33)])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_tiny_and_oblong_pictures_are_pillows_too(size, target, in_chans):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, in_chans), dtype=np.uint8)
    image = Image.fromarray(pixels if in_chans == 3 else pixels[:, :, 0])
    for interpolation in ("bilinear", "bicubic"):
        expected = image.resize((target[1], target[0]), getattr(Image.Resampling, interpolation.upper()))
        batch = np.full((3, *target, in_chans), 77, np.uint8)
        view = train_view(interpolation, crop="resize")
        view.render(pixels, np.zeros(41), batch[1])
        assert (batch[[0, 2]] == 77).all()  # nothing is written beside the row
        assert np.abs(batch[1].astype(int) - np.asarray(expected).reshape(batch[1].shape)).max() <= 2
        evaluated = np.empty((*target, in_chans), np.uint8)
        evaluation, draws = EvalView(0.875, interpolation), np.empty(0)
        evaluation.render(crop(pixels, evaluation.part(draws, *size)), draws, evaluated)
