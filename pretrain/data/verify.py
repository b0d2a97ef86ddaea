"""Check shards against their manifest, and every sample by the eyes of training: checksum, members, label, decode.

Nothing stops at the first problem, and nothing is changed. What is found has the form of a run's quarantine report, so
`pretrain shards repair` takes either.
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.decode import decode
from pretrain.data.index import index_path, parse_index, read_file, require_file
from pretrain.data.manifest import Manifest, Shard, read_manifest
from pretrain.data.pool import Advance, run
from pretrain.data.raw import RawShard, opened
from pretrain.data.tar import IMAGE_SUFFIXES, LABEL_SUFFIX, members, parse_sample, split_name
from pretrain.errors import DataError

_WHERE = re.compile(r"^sample( \([^)]*\))?: ")


class Problem(NamedTuple):
    """sample, key: none where it is the shard's as a whole."""

    shard: str
    sample: int | None
    key: str | None
    reason: str


@dataclass(frozen=True)
class Checks:
    """What is asked of a shard. labels: lowest and highest allowed; fast: only sizes and hashes."""

    labels: tuple[int, int]
    max_pixels: int
    fast: bool


@dataclass(frozen=True)
class Job:
    path: Path
    shard: Shard
    checks: Checks

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Checked:
    """keys: uint64 [samples], a hash of each sample's key, 0 where there is none; ignored: members of other kinds than
    image and label, by ending."""

    problems: list[Problem]
    keys: npt.NDArray[np.uint64]
    ignored: Counter[str]


@dataclass(frozen=True)
class Report:
    """samples: that were decoded; bytes: of the tars that were there."""

    shards: int
    samples: int
    bytes: int
    problems: list[Problem]
    ignored: Counter[str]


def verify_folder(
    folder: Path,
    *,
    max_pixels: int,
    num_classes: int | None = None,
    fast: bool = False,
    workers: int = 1,
    on_samples: Advance = lambda _: None,
    on_shard: Callable[[], object] = lambda: None,
) -> Report:
    """Problems in the order of shards and samples. Raises `DataError` where there is no usable manifest."""
    manifest = read_manifest(folder)
    allowed = Checks((manifest.min_label, _highest_label(manifest, num_classes)), max_pixels, fast)
    jobs = [Job(folder / shard.name, shard, allowed) for shard in manifest.shards]
    found: dict[int, Checked] = {}
    for outcome in run(check_shard, jobs, workers, on_samples):
        found[outcome.number] = outcome.result()
        on_shard()
    checked = [found[number] for number in range(len(jobs))]
    problems = [problem for one in checked for problem in one.problems]
    problems += _unlisted(folder, manifest)
    problems += _same_keys([job.path for job in jobs], [one.keys for one in checked])
    place = {shard.name: number for number, shard in enumerate(manifest.shards)}
    problems.sort(key=lambda p: (place.get(p.shard, len(place)), -1 if p.sample is None else p.sample))
    ignored = sum((one.ignored for one in checked), Counter[str]())
    return Report(len(jobs), sum(len(one.keys) for one in checked), manifest.bytes, problems, ignored)


def check_shard(job: Job, advance: Advance) -> Checked:
    """All that can be said of one shard without the others."""
    problems = [Problem(job.shard.name, None, None, reason) for reason in _check_files(job)]
    if job.checks.fast:
        advance(job.shard.samples)
        return Checked(problems, np.zeros(0, np.uint64), Counter())
    keys: list[int] = []
    ignored: Counter[str] = Counter()
    try:
        with opened(job.path) as shard:
            for number in range(len(shard)):
                key, reason = _check_sample(shard, number, job.checks, ignored)
                keys.append(_hash(key) if key else 0)
                if reason:
                    problems.append(Problem(job.shard.name, number, key or None, reason))
                advance(1)
    except DataError:
        if not problems:  # what is wrong with the files has been said, unless it was mended just now
            raise
        problems.append(Problem(job.shard.name, None, None, "its samples were not looked at"))
    return Checked(problems, np.array(keys, np.uint64), ignored)


def _highest_label(manifest: Manifest, num_classes: int | None) -> int:
    allowed = [manifest.max_label]
    allowed += [len(manifest.class_names) - 1] if manifest.class_names else []
    allowed += [num_classes - 1] if num_classes else []
    return min(allowed)


def _check_files(job: Job) -> list[str]:
    """Size and hash of the tar and of its index, against the manifest."""
    reasons = []
    try:
        require_file(job.path)
        size = job.path.stat().st_size
        with job.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if size != job.shard.bytes:
            reasons.append(f"the tar has {size:,} bytes; the manifest says {job.shard.bytes:,}")
        elif sha256 != job.shard.sha256:
            reasons.append("the tar is not the one of the manifest (sha256)")
    except OSError as error:
        reasons.append(f"the tar cannot be read: {error.strerror}")
    file_of_index = index_path(job.path)
    try:
        content = read_file(file_of_index)
        index = parse_index(content, file_of_index)
        if hashlib.sha256(content).hexdigest() != job.shard.index_sha256:
            reasons.append("the index is not the one of the manifest (sha256)")
        elif index.tar_sha256 != job.shard.sha256 or len(index.table) != job.shard.samples:
            reasons.append("the index is of another tar than the manifest says")
    except OSError as error:
        reasons.append(f"the index cannot be read: {error.strerror}")
    except DataError as error:
        reasons.append(f"the index is not usable: {_first_line(error).removeprefix(f'{file_of_index}: ')}")
    return reasons


def _check_sample(shard: RawShard, number: int, checks: Checks, ignored: Counter[str]) -> tuple[str, str]:
    """(key, what is wrong), each empty where there is none."""
    row, data = shard.index.table[number], shard.read(number)
    if len(data) < int(row["length"]):
        return "", "cut short: the tar ends before it"
    key, suffixes = _names(data)
    if zlib.crc32(data) != int(row["crc32"]):
        return key, "its bytes are not those that were indexed (checksum)"
    ignored.update(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES and suffix != LABEL_SUFFIX)
    try:
        sample = parse_sample(data, "sample")
        decode(sample.image, 3, checks.max_pixels)
    except DataError as error:
        return key, _WHERE.sub("", _first_line(error))
    lowest, highest = checks.labels
    if not lowest <= sample.label <= highest:
        return key, f"the label is {sample.label}; {lowest} to {highest} are in range"
    return key, ""


def _names(data: bytes) -> tuple[str, list[str]]:
    """Key and endings of the members of a sample; empty where they cannot be made out."""
    try:
        parts = [split_name(name) for name, _ in members(data, "")]
    except DataError:
        return "", []
    named = [part for part in parts if part is not None]
    return (named[0][0] if named else ""), [suffix for _, suffix in named]


def _unlisted(folder: Path, manifest: Manifest) -> list[Problem]:
    listed = {shard.name for shard in manifest.shards}
    return [
        Problem(path.name, None, None, "the tar is not in the manifest")
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]


def _same_keys(paths: Sequence[Path], keys: Sequence[npt.NDArray[np.uint64]]) -> list[Problem]:
    """A problem for each sample whose key an earlier one has, in its shard or another."""
    hashes = np.concatenate(keys)
    starts = np.cumsum([0, *(len(part) for part in keys)])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    suspects = np.unique(np.concatenate((order[again], order[again + 1])))
    edges = np.searchsorted(suspects, starts)
    first: dict[str, str] = {}
    problems = []
    for path, start, mine in zip(paths, starts.tolist(), np.split(suspects, edges[1:-1]), strict=False):
        if not len(mine):
            continue
        with opened(path) as raw:
            for number in (mine - start).tolist():
                key = _names(raw.read(number))[0]
                if key in first:
                    problems.append(Problem(path.name, number, key, f"{first[key]} has the same key"))
                first.setdefault(key, f"sample {number} of {path.name}")
    return problems


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
