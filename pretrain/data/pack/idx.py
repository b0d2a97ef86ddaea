"""MNIST's and Fashion-MNIST's idx files: unsigned bytes with a header, gzipped or not."""

import gzip
import hashlib
import io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data.pack.source import Item, Source
from pretrain.errors import DataError

_SPLITS = {"train": "train", "t10k": "val"}
_IMAGES, _LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"


@dataclass(frozen=True, slots=True)
class _Pixels:
    """A greyscale picture [H, W] of uint8, packed as PNG."""

    image: npt.NDArray[np.uint8]

    def __str__(self) -> str:
        return "a picture of an idx file"

    @property
    def size(self) -> int:
        return self.image.size

    def read(self, unpacked: Path) -> bytes:
        with io.BytesIO() as file:
            Image.fromarray(self.image).save(file, "PNG")
            return file.getvalue()

    def identity(self) -> str:
        return hashlib.sha256(self.image.tobytes()).hexdigest()


def has_idx(folder: Path) -> bool:
    return any(folder.glob(f"*{_IMAGES}*"))


def open_idx(folder: Path, label_map: dict[str, int] | None) -> Source:
    """Both files of train and of t10k, which becomes val."""
    if label_map is not None:
        raise DataError(f"{folder}: idx files hold class indexes, not names; leave --label-map out")
    return Source({split: _items(folder, name) for name, split in _SPLITS.items()}, None)


def _items(folder: Path, name: str) -> list[Item]:
    images, labels = (_read(folder, name + suffix) for suffix in (_IMAGES, _LABELS))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{folder}: {name} has images {images.shape} and labels {labels.shape}; they do not match"
        )
    return [
        Item(f"{name}/{i:06d}", int(label), "png", _Pixels(image))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def _read(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """The values of a file: magic 0, 0, 8, dimensions; their sizes; the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: {name}[.gz] is missing; both train-* and t10k-* files are needed")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    dimensions = data[3] if len(data) > 3 else 0
    start = 4 + 4 * dimensions
    if not data.startswith(b"\0\0\x08") or not 1 <= dimensions <= 3 or len(data) < start:
        raise DataError(f"{path}: not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path}: {len(data) - start:,} bytes of values, but its header says {shape}: cut short?"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
