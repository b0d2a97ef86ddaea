"""Shards without their bad samples, in a new folder: what is left is copied byte for byte, the original stays."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.index import BLOCK
from pretrain.data.manifest import Manifest, Shard, read_manifest
from pretrain.data.pool import Advance, run
from pretrain.data.raw import RawShard, opened
from pretrain.data.scan import Indexed, index_tar, write_manifest
from pretrain.data.tar import members, split_name
from pretrain.errors import DataError

_RECORD = 20 * BLOCK
"""A tar ends with two blocks of zeros and is filled up to a record, as `tarfile` and GNU tar do."""


class Bad(NamedTuple):
    """A sample to leave out. where: the line of the report that names it."""

    where: str
    number: int | None
    key: str | None
    reason: str


@dataclass(frozen=True)
class Job:
    path: Path
    out: Path
    bad: tuple[Bad, ...]

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Dropped:
    """A sample that was left out."""

    shard: str
    sample: int
    key: str
    reason: str


@dataclass(frozen=True)
class Mended:
    """indexed: none where no sample is left, and so no shard."""

    indexed: Indexed | None
    dropped: list[Dropped]


@dataclass(frozen=True)
class Repaired:
    """emptied: shards that had only bad samples; notes: lines of the reports that are about shards as a whole."""

    manifest: Manifest
    dropped: list[Dropped]
    emptied: list[str]
    notes: list[str] = field(default_factory=list)


def repair_folder(
    folder: Path,
    out: Path,
    reports: Iterable[Path],
    *,
    workers: int = 1,
    on_shard: Callable[[], object] = lambda: None,
) -> Repaired:
    """Write the shards of `folder` to `out` under their names, without the samples that the reports name.

    reports: JSON lines with `shard` (name or path), `sample` (number) and `key`, one of the two at least, and `reason`;
    lines without both are about a shard as a whole, and only noted. Every sample that is kept is compared with its
    checksum.

    Raises `DataError` where `out` exists, where a report is about other shards, and where a sample that is to be kept
    is damaged; `out` is there whole or not at all.
    """
    manifest = read_manifest(folder)
    bad, notes = read_reports(reports, manifest)
    if out.exists():
        raise DataError(f"{out} exists; shards are never repaired in place\n  Choose another folder.")
    out = out.resolve()
    aside = out.with_name(f".{out.name}.partial")
    jobs = [
        Job(folder / shard.name, aside / shard.name, tuple(bad.get(shard.name, ())))
        for shard in manifest.shards
    ]
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        mended: dict[int, Mended] = {}
        for outcome in run(mend, jobs, workers):
            mended[outcome.number] = outcome.result()
            on_shard()
        done = [mended[number] for number in range(len(jobs))]
        left = [one.indexed for one in done if one.indexed is not None]
        if not left:
            raise DataError(f"the reports name every sample of {folder}")
        repaired = write_manifest(aside, left, manifest.class_names)
        aside.rename(out)
    except (OSError, DataError) as error:
        raise DataError(f"repairing stopped, nothing was changed: {error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    emptied = [job.path.name for job, one in zip(jobs, done, strict=True) if one.indexed is None]
    return Repaired(repaired, [bad for one in done for bad in one.dropped], emptied, notes)


def read_reports(paths: Iterable[Path], manifest: Manifest) -> tuple[dict[str, list[Bad]], list[str]]:
    """Bad samples by shard, and what the reports say of shards as a whole."""
    shards = {shard.name: shard for shard in manifest.shards}
    bad: dict[str, list[Bad]] = {}
    notes: list[str] = []
    for path in paths:
        for where, line in _lines(path):
            name = str(line["shard"]).rpartition("/")[2]
            if name not in shards:
                raise DataError(f"{where}: {name!a} is not one of these shards; the report is about others")
            one = _bad(line, where, shards[name])
            if one.number is None and one.key is None:
                notes.append(f"{name}: {one.reason}")
            else:
                bad.setdefault(name, []).append(one)
    return bad, notes


def mend(job: Job, advance: Advance) -> Mended:
    """Copy a shard without its bad samples, and index the copy."""
    dropped: list[Dropped] = []
    with opened(job.path) as shard, job.out.open("wb") as out:
        by_number = {bad.number: bad for bad in job.bad if bad.number is not None}
        by_key = {bad.key: bad for bad in job.bad if bad.number is None}
        for number in range(len(shard)):
            data = shard.read(number)
            key = _key(data) if job.bad else ""
            bad = by_number.get(number) or by_key.pop(key, None)
            if bad is not None:
                _check_key(bad, key)
                dropped.append(Dropped(job.path.name, number, key, bad.reason))
            else:
                _check_bytes(shard, number, data)
                out.write(data)
        if by_key:
            missing = next(iter(by_key.values()))
            raise DataError(f"{missing.where}: {job.path.name} has no sample of the key {missing.key!a}")
        end = out.tell() + 2 * BLOCK
        out.truncate(-(-end // _RECORD) * _RECORD)
        out.flush()
        os.fsync(out.fileno())
    if len(dropped) == len(shard):
        job.out.unlink()
        return Mended(None, dropped)
    return Mended(index_tar(job.out), dropped)


def _lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                where = f"{path}, line {number}"
                line = json.loads(text)
                if not isinstance(line, dict) or not isinstance(line.get("shard"), str):
                    raise DataError(f"{where}: an object with shard, sample, key and reason is needed")
                yield where, line
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a report of bad samples, JSON lines are needed: {error}") from None


def _bad(line: dict[str, Any], where: str, shard: Shard) -> Bad:
    number, key = line.get("sample"), line.get("key")
    if not (key is None or isinstance(key, str)) or not (number is None or type(number) is int):
        raise DataError(f"{where}: sample is a number and key is a text, or null")
    if number is not None and not 0 <= number < shard.samples:
        raise DataError(f"{where}: {shard.name} has no sample {number}; the report is about another shard")
    return Bad(where, number, key or None, str(line.get("reason", "")))


def _check_key(bad: Bad, key: str) -> None:
    if bad.key is not None and key and bad.key != key:
        raise DataError(
            f"{bad.where}: it calls the sample {bad.key!a}, but it is {key!a}; the report is about another shard"
        )


def _check_bytes(shard: RawShard, number: int, data: bytes) -> None:
    row = shard.index.table[number]
    if len(data) < int(row["length"]) or zlib.crc32(data) != int(row["crc32"]):
        raise DataError(
            f"{shard.path}, sample {number}: its bytes are not those that were indexed, and no report names it\n"
            "  Bring the shard back from its source, or leave the sample out too: `pretrain shards verify` finds all."
        )


def _key(data: bytes) -> str:
    try:
        return next((parts[0] for name, _ in members(data, "") if (parts := split_name(name))), "")
    except DataError:
        return ""
