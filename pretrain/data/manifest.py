"""The manifest of a folder of shards, `manifest.json`: all that everyone needs to know before a sample is read."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.data.index import read_file, remedy
from pretrain.errors import DataError

NAME = "manifest.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: samples and bytes in it, sha256 of it and of its index. Slots: there may be 100,000 of them."""

    __pydantic_config__ = _STRICT

    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*\.tar$")]
    samples: Annotated[int, Field(ge=1, lt=2**32)]
    bytes: Annotated[int, Field(ge=1, lt=2**42)]
    sha256: Sha256
    index_sha256: Sha256


class Manifest(BaseModel):
    """min_label, max_label: the range found in the shards. digest: see `digest`; checksum: see `_checksum`."""

    model_config = _STRICT

    version: Literal[1] = 1
    digest: Sha256
    samples: int
    bytes: int
    min_label: Annotated[int, Field(ge=0)]
    max_label: int
    class_names: list[str] | None = None
    checksum: Sha256 | None = None
    """None in a manifest that an older release wrote."""
    shards: Annotated[list[Shard], Field(min_length=1)]

    @classmethod
    def of(cls, shards: list[Shard], labels: tuple[int, int], class_names: list[str] | None) -> Self:
        """The manifest of shards whose labels lie in [labels[0], labels[1]]."""
        identity = digest(shards)
        return cls(
            digest=identity,
            samples=sum(s.samples for s in shards),
            bytes=sum(s.bytes for s in shards),
            min_label=labels[0],
            max_label=labels[1],
            class_names=class_names,
            checksum=_checksum(identity, labels, class_names),
            shards=shards,
        )

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("it lists a shard twice")
        if self.samples != sum(s.samples for s in self.shards) or self.bytes != sum(
            s.bytes for s in self.shards
        ):
            raise ValueError("its totals are not the sums over its shards")
        if self.digest != digest(self.shards):
            raise ValueError("its digest does not match its shards: it was edited or damaged")
        if self.max_label < self.min_label:
            raise ValueError(f"max_label {self.max_label} is below min_label {self.min_label}")
        labels = self.min_label, self.max_label
        if self.checksum not in (None, _checksum(self.digest, labels, self.class_names)):
            raise ValueError(
                "its checksum does not match its labels or class names: it was edited or damaged"
            )
        return self


def digest(shards: Iterable[Shard]) -> str:
    """Identity of a list of shards: sha256 over name, samples and sha256 of each, in order.

    It fixes the samples and their numbers. Paths and indexes do not enter: the same shards elsewhere are the same.
    """
    identity = hashlib.sha256(b"shards 1\n")
    for shard in shards:
        identity.update(f"{shard.name} {shard.samples} {shard.sha256}\n".encode())
    return identity.hexdigest()


def digest_of_sources(digests: Iterable[str]) -> str:
    """Identity of several lists of shards and of where each ends."""
    return hashlib.sha256("\n".join(["sources 1", *digests]).encode()).hexdigest()


def _checksum(identity: str, labels: tuple[int, int], class_names: list[str] | None) -> str:
    """sha256 over what the digest leaves out and nothing else would notice: label range and names of classes."""
    return hashlib.sha256(json.dumps([identity, *labels, class_names]).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`; raises `DataError`."""
    path = folder / NAME
    try:
        content = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "there is no such folder" if not folder.is_dir() else f"there is no {NAME} beside the shards"
        raise DataError(f"{folder}: {what}\n  {_advice(folder)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, folder: str) -> Manifest:
    """Check the content of `folder/manifest.json`; raises `DataError`."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise DataError(f"{folder}/{NAME}: not a usable manifest: {reason}\n  {remedy(folder)}") from None


def _advice(folder: Path) -> str:
    if folder.is_dir():
        return remedy(folder)
    return "Check the path; `pretrain shards pack` makes shards from images."
