"""What a data set holds: images by class, sizes, bytes, formats. Headers are read, pixels are not decoded."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.data.header import read_header
from pretrain.data.manifest import read_manifest
from pretrain.data.pool import Advance, run
from pretrain.data.raw import opened
from pretrain.data.tar import parse_sample
from pretrain.errors import DataError

MOST_CLASSES = 2**20
"""That are counted where the manifest does not name them: a stray label may be anything."""

_FIELDS = np.dtype([("label", "<i8"), ("width", "<i8"), ("height", "<i8"), ("bytes", "<i8")])


@dataclass(frozen=True)
class Job:
    """numbers: of the samples to look at."""

    path: Path
    numbers: npt.NDArray[np.int64]
    max_pixels: int

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Seen:
    """table: structured [images] of label, width and height as stored, bytes of the image file; kinds: images by
    (format, mode); bad: samples that have no image we can read."""

    table: npt.NDArray[np.void]
    kinds: Counter[tuple[str, str]]
    bad: int


@dataclass(frozen=True)
class Stats:
    """samples, shards, bytes: of the whole set, from its manifest; looked_at: samples that `seen` is about."""

    samples: int
    shards: int
    bytes: int
    looked_at: int
    class_names: list[str] | None
    num_classes: int
    seen: Seen

    @property
    def per_class(self) -> npt.NDArray[np.int64]:
        """Images of each class among those looked at: [classes]."""
        labels = self.seen.table["label"]
        return np.bincount(labels[labels < self.num_classes], minlength=self.num_classes)

    @property
    def beyond(self) -> int:
        """Images among those looked at whose label is none of the classes."""
        return int((self.seen.table["label"] >= self.num_classes).sum())

    def name(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)


def describe_folder(
    folder: Path,
    *,
    sample: int,
    max_pixels: int,
    workers: int = 1,
    on_samples: Advance = lambda _: None,
) -> Stats:
    """Look at all samples, or at `sample` of them in even steps. Raises `DataError` where shards cannot be read."""
    manifest = read_manifest(folder)
    count = min(sample, manifest.samples)
    numbers = (2 * np.arange(count) + 1) * manifest.samples // (2 * count)
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    edges = np.searchsorted(numbers, starts)
    jobs = [
        Job(folder / shard.name, numbers[edges[i] : edges[i + 1]] - starts[i], max_pixels)
        for i, shard in enumerate(manifest.shards)
        if edges[i + 1] > edges[i]
    ]
    parts = [outcome.result() for outcome in run(look_at, jobs, workers, on_samples)]
    seen = Seen(
        np.concatenate([part.table for part in parts]),
        sum((part.kinds for part in parts), Counter[tuple[str, str]]()),
        sum(part.bad for part in parts),
    )
    if not len(seen.table):
        raise DataError(
            f"{folder}: none of {count:,} samples has an image; `pretrain shards verify` says why"
        )
    num_classes = len(manifest.class_names or ()) or min(manifest.max_label + 1, MOST_CLASSES)
    return Stats(
        manifest.samples, len(manifest.shards), manifest.bytes, count, manifest.class_names, num_classes, seen
    )


def look_at(job: Job, advance: Advance) -> Seen:
    """Labels and headers of some samples of a shard."""
    rows: list[tuple[int, int, int, int]] = []
    kinds: Counter[tuple[str, str]] = Counter()
    bad = 0
    with opened(job.path) as shard:
        for number in job.numbers.tolist():
            advance(1)
            data = shard.read(number)
            try:
                sample = parse_sample(data, f"{job.path}, sample {number}")
                header = read_header(sample.image, job.max_pixels)
            except DataError:  # `verify` says what is wrong with it
                bad += 1
                continue
            rows.append((sample.label, header.width, header.height, len(sample.image)))
            kinds[header.format, header.mode] += 1
    return Seen(np.array(rows, _FIELDS), kinds, bad)
