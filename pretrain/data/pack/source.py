"""What a source of images is to the packer: items by split, each with a key, a label and a way to its bytes."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pretrain.data.tar import IMAGE_SUFFIXES, split_name
from pretrain.errors import DataError

SPLITS = ("train", "val")
_SPLIT_OF = {"train": "train", "val": "val", "validation": "val", "test": "val"}
_NOT_IN_A_KEY = re.compile(r"[^\w-]")
_KEY = re.compile(r"[\w-]+(/[\w-]+)*")


class Content(Protocol):
    """The bytes of an image file, where they lie. size: how many, or about how many."""

    @property
    def size(self) -> int: ...

    def read(self, unpacked: Path) -> bytes:
        """unpacked: folder of what was taken out of container files first; see `Part`."""
        ...

    def identity(self) -> str:
        """Changes where the bytes may have changed; not the bytes themselves."""
        ...


class Part(Protocol):
    """A piece of a container file whose images can be read one by one only after it was unpacked."""

    @property
    def name(self) -> str: ...

    def unpack(self, folder: Path) -> int:
        """Write what `Content.read` needs below `folder`, whole or not at all; returns the number of images."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack. suffix: of its member in the tar; "" where the bytes have to tell."""

    key: str
    label: int
    suffix: str
    content: Content

    def identity(self) -> str:
        return f"{self.key} {self.label} {self.suffix} {self.content.identity()}"


@dataclass(frozen=True)
class Source:
    """What was found. splits: items by split; a single "" where the source is not split; parts: to unpack first."""

    splits: dict[str, list[Item]]
    class_names: list[str] | None
    parts: Sequence[Part] = ()


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A whole file."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "ImageFile":
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns)

    def __str__(self) -> str:
        return self.path

    def read(self, unpacked: Path) -> bytes:
        return Path(self.path).read_bytes()

    def identity(self) -> str:
        return f"{self.path} {self.size} {self.mtime_ns}"


@dataclass
class Keys:
    """The keys of a split, each once; where names what has it."""

    taken: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, where: str) -> None:
        if _KEY.fullmatch(key) is None or split_name(f"{key}.jpg") is None:
            raise DataError(
                f"{where}: {key!a} cannot be a key: words of letters, digits, _ and -, joined by /, and none that "
                "begins with __x__ (readers skip names like that); rename it"
            )
        if key in self.taken:
            raise DataError(
                f"{where} and {self.taken[key]} would both have the key {key}; rename one of them\n"
                "  (without a key column, a key is the path without its ending; dots, blanks and the like become _)"
            )
        self.taken[key] = where


def key_of(path: Path) -> str:
    """The key of a relative path: without its ending, and without what would end a key in a tar."""
    return "/".join(_NOT_IN_A_KEY.sub("_", part) for part in path.with_suffix("").parts)


def suffix_of(path: Path) -> str:
    """Ending in lower case, of those that may be packed; else ""."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in IMAGE_SUFFIXES else ""


def is_split(name: str) -> bool:
    return name in _SPLIT_OF


def split_names(given: Iterable[str], where: str) -> dict[str, str]:
    """What each name of a split means to us: train or val. Raises `DataError` for others, and for val and test."""
    names = sorted(set(given))
    meant = {name: _SPLIT_OF.get(name, "") for name in names}
    if not all(meant.values()):
        unknown = next(name for name in names if not meant[name])
        raise DataError(f"{where}: a split is named {unknown!a}; known are {', '.join(_SPLIT_OF)}")
    if "test" in meant and list(meant.values()).count("val") > 1:
        raise DataError(f"{where}: holds both a validation and a test split; take one of them out")
    return meant


def digest(words: Iterable[str]) -> str:
    """sha256 in hex over lines of text."""
    identity = hashlib.sha256()
    for word in words:
        identity.update(f"{word}\n".encode(errors="surrogateescape"))  # a path may be no UTF-8
    return identity.hexdigest()
