"""A box of a JPEG by the native part: the same pixels, and the same verdict on the file, as decoding the whole of it."""

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import simplejpeg
from patience import PATIENCE
from PIL import Image

from pretrain.data import decode as decoding
from pretrain.data.box import Box, Pixels, crop, whole
from pretrain.data.decode import decode
from pretrain.errors import BadSampleError

jpegbox = pytest.importorskip(
    "pretrain.data._jpegbox", reason="the native part is not built here: see docs/images.md"
)
LIMIT = 10**6
SAMPLINGS = ("444", "422", "420", "440")
EXIF = Image.Exif()
EXIF[0x010F] = "a camera"


def picture(generator: np.random.Generator, largest: int = 90) -> Image.Image:
    """Of a random size, with detail at the scale of chroma's filter."""
    height, width = (int(side) for side in generator.integers(1, largest, 2))
    coarse = generator.integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def saved(image: Image.Image, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "JPEG", **options)
        return file.getvalue()


def kinds(image: Image.Image, quality: int) -> Iterator[bytes]:
    for sampling in SAMPLINGS:
        yield simplejpeg.encode_jpeg(np.asarray(image), quality, colorsubsampling=sampling)
    yield saved(image.convert("L"), quality=quality)
    for subsampling in range(3):
        yield saved(image, quality=quality, subsampling=subsampling, progressive=True)
        yield saved(image, quality=quality, subsampling=subsampling, restart_marker_blocks=3)
        yield saved(image, quality=quality, subsampling=subsampling, exif=EXIF)


def boxes(generator: np.random.Generator, height: int, width: int, count: int) -> Iterator[Box]:
    for top, left, bottom, right in generator.random((count, 4)):
        rows, columns = 1 + int(bottom * height), 1 + int(right * width)
        yield Box(int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns)


def without_it(data: bytes, channels: int) -> Pixels:
    """The whole picture where the native part is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "jpegbox", None)
        return decode(data, channels, LIMIT)


def given(box: Box, height: int, width: int) -> Box:
    return box


def by_the_native_part(data: bytes, box: Box, channels: int = 3) -> Pixels | None:
    pixels = np.empty((box.height, box.width, channels), np.uint8)
    return pixels if jpegbox.decode(data, pixels, *box, channels) else None


def test_a_box_has_the_pixels_of_the_whole_picture_bit_for_bit():
    """All samplings, baseline, progressive, with restarts, with Exif, of any size; boxes anywhere."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        image = picture(generator)
        for data in kinds(image, int(generator.integers(30, 100))):
            grey = jpegbox.size_of(data)[2] == 1
            for channels in (1, 3) if grey else (3,):
                expected = without_it(data, channels)
                for box in boxes(generator, image.height, image.width, 10):
                    found = by_the_native_part(data, box, channels)
                    assert found is not None
                    np.testing.assert_array_equal(found, crop(expected, box))


def test_every_offset_of_a_box_is_exact():
    """Edges of blocks and of groups of rows, one by one."""
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (50, 50, 3), dtype=np.uint8))
    for data in kinds(image, 90):
        grey = jpegbox.size_of(data)[2] == 1
        expected = without_it(data, 1 if grey else 3)
        for offset in range(36):
            for side in (1, 2, 13):
                box = Box(offset, 35 - offset, side, side)
                found = by_the_native_part(data, box, 1 if grey else 3)
                np.testing.assert_array_equal(found, crop(expected, box))


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("stored", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_part_is_cut_out_of_the_upright_picture(stored, orientation, in_chans):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(np.random.default_rng(2)).resize((70, 50)).convert(stored), exif=exif)
    upright = without_it(data, in_chans)
    asked = []

    def part(height: int, width: int) -> Box:
        asked.append((height, width))
        return Box(3, 5, 20, 17)

    np.testing.assert_array_equal(decode(data, in_chans, LIMIT, part), crop(upright, Box(3, 5, 20, 17)))
    assert asked[-1] == upright.shape[:2]


def incomplete(data: bytes) -> bytes:
    """A progressive file of its first three scans: no warning, but libjpeg smooths."""
    at = -1
    for _ in range(4):
        at = data.index(b"\xff\xda", at + 1)
    return data[:at] + b"\xff\xd9"


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("CMYK", (40, 40))),
        saved(Image.new("RGB", (40, 40)), keep_rgb=True),
        simplejpeg.encode_jpeg(np.zeros((40, 40, 3), np.uint8), colorsubsampling="411"),
        incomplete(saved(picture(np.random.default_rng(3)).resize((40, 40)), progressive=True)),
    ],
    ids=["CMYK", "RGB", "4:1:1", "incomplete"],
)
def test_rare_kinds_are_left_to_the_whole_decoder(data):
    box = Box(4, 4, 20, 20)
    if jpegbox.size_of(data) is not None:
        assert by_the_native_part(data, box) is None
    expected = crop(without_it(data, 3), box)
    np.testing.assert_array_equal(decode(data, 3, LIMIT, partial(given, box)), expected)


def damaged(generator: np.random.Generator, data: bytes) -> bytes:
    """Flipped, overwritten, cut, lengthened; mostly in the coded data."""
    scan = data.index(b"\xff\xda") + 12
    low, high = (scan, len(data) - 2) if generator.random() < 0.7 else (2, scan)
    at, other = sorted(generator.integers(low, high, 2).tolist())
    match int(generator.integers(6)):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1 :]
        case 1:
            marker = int(
                generator.choice([0xC0, 0xC4, 0xD0, 0xD3, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFF, 1, 0])
            )
            return data[:at] + bytes([0xFF, marker]) + data[at + 2 :]
        case 2:
            return data[:other]
        case 3:
            return data[:at] + data[min(other, at + 20) :]
        case 4:
            return data + generator.bytes(30)
    return data[:at] + generator.bytes(5) + data[at:]


def outcome(make: Callable[[], Pixels]) -> Pixels | str:
    try:
        return make()
    except BadSampleError as error:
        return str(error)


def check_damage(seed: int, count: int) -> None:
    """For the same file the box is the box of the whole picture, or the error is its error; wherever the box is."""
    generator = np.random.default_rng(seed)
    bad = filled = 0
    for _ in range(count):
        image = picture(generator, 120).resize((64, 80))
        options = generator.choice([{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"exif": EXIF}])
        data = damaged(generator, saved(image, quality=80, subsampling=int(generator.integers(3)), **options))
        expected = outcome(partial(without_it, data, 3))
        height, width = (80, 64) if isinstance(expected, str) else expected.shape[:2]
        for box in (whole(height, width), *boxes(generator, height, width, 4)):
            found = outcome(partial(decode, data, 3, LIMIT, partial(given, box)))
            if isinstance(expected, str):
                bad += 1
                assert found == expected
            else:
                np.testing.assert_array_equal(found, crop(expected, box))
                filled += jpegbox.size_of(data) is not None and by_the_native_part(data, box) is not None
    assert bad > count / 4
    assert filled > count / 4


def test_damage_gives_the_verdict_of_the_whole_decoder_wherever_the_box_is():
    check_damage(0, 1500)


@pytest.mark.slow
def test_damage_gives_the_verdict_of_the_whole_decoder_wherever_the_box_is_at_length():
    for seed in range(1, 21):
        check_damage(seed, 10_000)


def test_a_file_cut_below_the_box_is_bad_all_the_same():
    data = saved(picture(np.random.default_rng(4)).resize((200, 200)), quality=90)
    for cut in (len(data) * 3 // 4, len(data) - 2):
        for top in (
            0,
            100,
            180,
        ):  # above the cut, or beyond it, where libjpeg only warns and makes up the rest
            assert by_the_native_part(data[:cut], Box(top, 0, 20, 200)) is None
    with pytest.raises(BadSampleError):
        decode(data[: len(data) * 3 // 4], 3, LIMIT, partial(given, Box(0, 0, 20, 200)))


def test_a_header_that_pillow_refuses_makes_a_file_bad_if_its_data_is_damaged_anywhere():
    """libjpeg does not mind the segment. Only when its data is damaged is Pillow asked, which does: so the rows below the
    box are looked at as well."""
    sound = saved(picture(np.random.default_rng(7)).resize((200, 200)), quality=90)
    strange = sound[:2] + b"\xff\xee\x00\x08Adobe\x00" + sound[2:]
    box, at = Box(0, 0, 20, 200), len(strange) * 3 // 4
    expected = crop(without_it(sound, 3), box)
    np.testing.assert_array_equal(by_the_native_part(strange, box), expected)
    for data in (sound, strange):
        damaged = data[:at] + b"\xff\xd5" + data[at + 2 :]
        if data is sound:
            np.testing.assert_array_equal(decode(damaged, 3, LIMIT, partial(given, box)), expected)
            continue
        assert by_the_native_part(damaged, box) is None
        with pytest.raises(BadSampleError, match="cannot identify"):
            without_it(damaged, 3)
        for part in (whole, partial(given, box)):
            with pytest.raises(BadSampleError, match="cannot identify"):
                decode(damaged, 3, LIMIT, part)


def test_too_many_pixels_are_refused_by_the_header():
    data = saved(Image.new("L", (2000, 2000)))
    with pytest.raises(BadSampleError, match=r"2000 x 2000 pixels; data\.max_pixels allows 1,000,000"):
        decode(data, 3, LIMIT, partial(given, Box(0, 0, 1, 1)))


def test_a_box_or_a_memory_that_does_not_fit_is_refused():
    data = saved(Image.new("RGB", (40, 30)))
    for top, left, height, width in [
        (0, 0, 31, 1),
        (30, 0, 1, 1),
        (0, 40, 1, 1),
        (2**32 - 1, 0, 2, 1),
        (0, 0, 0, 1),
    ]:
        with pytest.raises(ValueError, match="box is not inside"):
            jpegbox.decode(data, bytearray(height * width * 3), top, left, height, width, 3)
    with pytest.raises(ValueError, match="out is not of its size"):
        jpegbox.decode(data, bytearray(299), 0, 0, 10, 10, 3)
    with pytest.raises(ValueError, match="out is not of its size"):
        jpegbox.decode(data, bytearray(100), 0, 0, 10, 10, 1)  # a colour picture has no single channel
    with pytest.raises((TypeError, BufferError)):
        jpegbox.decode(data, bytes(300), 0, 0, 10, 10, 3)
    for other in (b"", b"\xff\xd8", b"\xff\xd8\xff\xda\x00\x02", b"\xff\xd8\xff\xe0\xff\xff", b"\x89PNG"):
        assert jpegbox.size_of(other) is None
        assert jpegbox.decode(other, bytearray(300), 0, 0, 10, 10, 3) is False


def test_threads_decode_at_a_time():
    generator = np.random.default_rng(5)
    files = [saved(picture(generator).resize((90, 70))) for _ in range(8)]
    expected = [without_it(data, 3) for data in files]
    wrong = []

    def work(seed: int) -> None:
        for _ in range(30):
            for data, pixels in zip(files, expected, strict=True):
                for box in boxes(np.random.default_rng(seed), 70, 90, 2):
                    found = by_the_native_part(data, box)
                    if found is None or not np.array_equal(found, crop(pixels, box)):
                        wrong.append(box)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_printed_of_damaged_files():
    """libjpeg's own error manager writes to stderr, and ends the process."""
    script = f"import sys; sys.path += {sys.path!r}; import test_jpeg_box as t; t.check_damage(3, 100)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_the_native_part_boxes_are_the_same_and_the_reason_is_said(monkeypatch):
    data = saved(picture(np.random.default_rng(6)).resize((50, 60)))
    box = Box(10, 20, 30, 21)
    with_it = decode(data, 3, LIMIT, partial(given, box))
    assert "only the box" in decoding.decoder()
    monkeypatch.setattr(decoding, "jpegbox", None)
    monkeypatch.setattr(decoding, "WHY_WHOLE", "No module named '_jpegbox'")
    np.testing.assert_array_equal(decode(data, 3, LIMIT, partial(given, box)), with_it)
    assert "decoded whole" in decoding.decoder()
    assert "apt-get install gcc libjpeg62-turbo-dev" in decoding.decoder()
