"""Which split and which shard each image goes to, and in which order: by hashes of (seed, key), of nothing else."""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pretrain.data.pack.source import Item
from pretrain.errors import DataError


@dataclass(frozen=True)
class ShardSize:
    """Shards of one split: `count` of them, or as many as hold `num_bytes` each, as the source holds the images."""

    count: int | None
    num_bytes: int


def assign(splits: dict[str, list[Item]], val_share: float, seed: int) -> dict[str, list[Item]]:
    """Items by split, each in the order in which they are written. Raises `DataError` where a share cannot be taken."""
    if "" not in splits:
        if val_share:
            raise DataError(f"the source is already split ({', '.join(splits)}); leave --val-share out")
        return {split: _shuffled(items, seed) for split, items in splits.items() if items}
    if len(splits) > 1:
        raise DataError("the source says of some images which split they are in, and of others nothing")
    items = _shuffled(splits[""], seed)
    chosen = {item.key for item in items if _draw(seed, item.key)[1] < val_share}
    if val_share and not 0 < len(chosen) < len(items):
        raise DataError(
            f"--val-share {val_share} of {len(items)} images leaves train or val empty; choose another share"
        )
    parts = {
        "train": [item for item in items if item.key not in chosen],
        "val": [item for item in items if item.key in chosen],
    }
    return {split: part for split, part in parts.items() if part}


def cut(items: list[Item], size: ShardSize) -> Iterator[list[Item]]:
    """The items of each shard."""
    if size.count is not None:
        count = min(size.count, len(items))
        edges = [i * len(items) // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            yield items[start:stop]
        return
    start = held = 0
    for i, item in enumerate(items):
        held += item.content.size
        if held >= size.num_bytes or i == len(items) - 1:
            yield items[start : i + 1]
            start, held = i + 1, 0


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    return sorted(items, key=lambda item: (_draw(seed, item.key)[0], item.key))


def _draw(seed: int, key: str) -> tuple[int, float]:
    """A place in the order, and a number in [0, 1), of one key."""
    place, share = struct.unpack(">QQ", hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16])
    return place, share / 2**64
