"""Pictures and tars that somebody made to hurt. As a program: decodes every bomb and says what it cost."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

from PIL import Image

SIDE, MAX_PIXELS = 2000, 2**22
"""Pictures of this side are just under the cap that the bombs are decoded with."""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, depth: int, colour: int, pixels: bytes, *extra: bytes) -> bytes:
    """A PNG by its specification: the header says what it likes, `pixels` is the compressed content."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    parts = _chunk(b"IHDR", header), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    """So many zeros, compressed to a thousandth."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(count // 2**20)) + (
        packer.compress(bytes(count % 2**20)) + packer.flush()
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def jpeg_of_size(side: int) -> bytes:
    """A JPEG of 16x16 pixels whose header says otherwise."""
    data = bytearray(saved(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True, quality=10)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def pictures() -> dict[str, bytes]:
    """Each is small as a file and huge as what it claims or unpacks to."""
    ten = zlib.compress(bytes(110))
    return {
        "png without its pixels": png(SIDE, 8, 6, zlib.compress(bytes(100))),
        "png beyond the cap": png(60_000, 8, 2, zlib.compress(bytes(100))),
        "png of 2^31 pixels a side": png(2**31 - 1, 8, 2, zlib.compress(bytes(100))),
        "png of one bit": png(SIDE, 1, 0, zeros(SIDE * (1 + SIDE // 8))),
        "png colour profile": png(10, 8, 0, ten, _chunk(b"iCCP", b"x\0\0" + zeros(2**28))),
        "png text": png(10, 8, 0, ten, _chunk(b"zTXt", b"x\0\0" + zeros(2**28))),
        "png international text": png(10, 8, 0, ten, _chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**28))),
        "png many texts": png(10, 8, 0, ten, *[_chunk(b"zTXt", b"x\0\0" + zeros(2**20 - 1))] * 200),
        "png more pixels than it says": png(10, 8, 0, zeros(2**28)),
        "jpeg header": jpeg_of_size(65_500),
        "jpeg header below the cap": jpeg_of_size(SIDE),
        "jpeg scans": jpeg_of_scans(SIDE, 5000),
        "webp": saved(Image.new("L", (16_000, 1_000)), "WEBP", quality=0, method=0),
        "webp below the cap": saved(Image.new("L", (SIDE, SIDE)), "WEBP", quality=0, method=0),
        "tiff": saved(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"),
        "gif": saved(Image.new("P", (3_000, 3_000)), "GIF"),
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 58, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "ico": b"\0\0\1\0\1\0\0\0\0\0\1\0\x20\0" + struct.pack("<II", 2**31, 22),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90000 90000\n(%pipe%touch executed) (w) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="90000" height="90000"/>',
    }


def raw_member(name: str, kind: bytes, size: int, content: bytes = b"", linkname: str = "") -> bytes:
    """A header that says `size` and what follows it, whatever that is."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def peaks() -> dict[str, tuple[str, float]]:
    """What became of each picture, and MiB that decoding it took at its peak."""
    from pretrain.data.decode import decode
    from pretrain.errors import BadSampleError

    found = {}
    for name, data in pictures().items():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _status("VmRSS")
        try:
            outcome = str(decode(data, 3, MAX_PIXELS).shape)
        except BadSampleError as error:
            outcome = f"refused: {error}"
        found[name] = outcome, (_status("VmHWM") - before) / 1024
    return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(json.dumps(peaks(), indent=1))
