"""Seeded damage to files, and what stock `tarfile` makes of a tar."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.data.tar import IMAGE_SUFFIXES

Files = dict[str, bytes]
"""A folder of files by name."""
Found = tuple[str, bytes, int] | tuple[str, None, None]
"""(key, image, label) of a sample; without the two where it has not exactly one image and a readable label."""

BLOCK, PAGE = 512, 4096


def cut(data: bytes, random: np.random.Generator) -> bytes:
    length = int(random.integers(len(data)))
    return data[: length - length % BLOCK] if random.integers(2) else data[:length]


def extend(data: bytes, random: np.random.Generator) -> bytes:
    more = bytes(BLOCK), random.bytes(int(random.integers(1, 2000))), data, bytes(10_240)
    return data + more[random.integers(len(more))]


def flip(data: bytes, random: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for at in random.integers(len(data), size=random.integers(1, 4)):
        damaged[at] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def zero(data: bytes, random: np.random.Generator) -> bytes:
    """A block or a page that was never written."""
    size = (16, BLOCK, PAGE)[random.integers(3)]
    at = int(random.integers(len(data))) // size * size
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def swap(data: bytes, random: np.random.Generator) -> bytes:
    """Two blocks in each other's place."""
    size = _piece(data, random)
    a, b = sorted(random.integers(len(data) // size, size=2) * size)
    if a == b:
        return data
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def repeat(data: bytes, random: np.random.Generator) -> bytes:
    """A block that holds what another one holds."""
    size = _piece(data, random)
    a, b = random.integers(len(data) // size, size=2) * size
    return data[:b] + data[a : a + size] + data[b + size :]


def drop(data: bytes, random: np.random.Generator) -> bytes:
    size = _piece(data, random)
    at = int(random.integers(len(data) // size)) * size
    return data[:at] + data[at + size :]


def insert(data: bytes, random: np.random.Generator) -> bytes:
    size = _piece(data, random)
    at, source = random.integers(len(data) // size, size=2) * size
    return data[:at] + data[source : source + size] + data[at:]


def retype(data: bytes, random: np.random.Generator) -> bytes:
    """A character for another of its kind: what keeps JSON valid and a number a number."""
    digits = [i for i, byte in enumerate(data) if chr(byte).isalnum()]
    at = digits[random.integers(len(digits))]
    other = (b"0123456789" if chr(data[at]).isdigit() else b"abcdefABCDEF")[random.integers(10)]
    return data[:at] + bytes([other]) + data[at + 1 :]


def _piece(data: bytes, random: np.random.Generator) -> int:
    sizes = [size for size in (4, 12, BLOCK, 3 * BLOCK) if size <= len(data)]
    return int(sizes[random.integers(len(sizes))])


KINDS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    f.__name__: f for f in (cut, extend, flip, zero, swap, repeat, drop, insert, retype)
}


def damage(files: Files, random: np.random.Generator) -> tuple[str, Files]:
    """(what was done, the files that are other now; an empty one may be meant to be missing): one file or a pair."""
    names = sorted(files)
    name = names[random.integers(len(names))]
    alike = [other for other in names if other != name and Path(other).suffix == Path(name).suffix]
    kinds = [*KINDS, "remove", *(["exchange", "overwrite"] if alike else [])]
    kind = kinds[random.integers(len(kinds))]
    if kind == "remove":
        return f"{kind} {name}", {name: b""}
    if kind in ("exchange", "overwrite"):
        other = alike[random.integers(len(alike))]
        changed = {name: files[other]}
        return f"{kind} {name} {other}", changed | ({other: files[name]} if kind == "exchange" else {})
    return f"{kind} {name}", {name: KINDS[kind](files[name], random)}


def by_tarfile(path: Path) -> list[Found]:
    """The samples that stock `tarfile` sees: runs of regular members of one key, webdataset's rule."""
    runs: list[tuple[str, list[tuple[str, bytes]]]] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not member.isreg() or not stem or not dot or _is_meta(member.name):
                continue
            file = tar.extractfile(member)
            assert file is not None
            if not runs or runs[-1][0] != folder + slash + stem:
                runs.append((folder + slash + stem, []))
            runs[-1][1].append((suffix.lower(), file.read()))
    return [_sample(key, parts) for key, parts in runs]


def _is_meta(name: str) -> bool:
    first, _, _ = name.partition("/")
    return len(first) > 4 and first.startswith("__") and first.endswith("__")


def _sample(key: str, parts: list[tuple[str, bytes]]) -> Found:
    images = [content for suffix, content in parts if suffix in IMAGE_SUFFIXES]
    labels = [content.strip() for suffix, content in parts if suffix == "cls"]
    if len(images) != 1 or len(labels) != 1 or not (labels[0].isdigit() and len(labels[0]) <= 9):
        return key, None, None
    return key, images[0], int(labels[0])
