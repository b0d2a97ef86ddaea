"""What a checkpoint says of the data: enough to go on at any step, on any ranks, and to refuse what would not be going on.

The state is the same on every rank and below 1 KB whatever the size of the data and however often the run went back:
`samples_seen` rows were computed, each source gave so many samples, `distinct` of them in its first epoch, `skipped`
batches were passed over, and the rest fixes the order. Nothing in it is needed to find the place again but the step and
`skipped`: it is there to be compared, to be counted on, and to be read by people.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.config import Plan
from pretrain.data.dataset import Dataset
from pretrain.data.mixing import Mix
from pretrain.data.order import VERSION, Order, Share
from pretrain.data.skipped import Skipped
from pretrain.errors import CheckpointError, DataError


def planned_order(dataset: Dataset, plan: Plan, seed: int) -> Order:
    """The order of a run, from its plan."""
    shards = dataset.source_shards or (len(dataset.shards),)
    return Order(
        dataset.shard_samples,
        seed=seed,
        global_batch=plan.global_batch,
        lanes=plan.lanes,
        block_samples=plan.block_samples,
        window_blocks=plan.window_blocks,
        sources=[Share(n, source.ratio) for n, source in zip(shards, plan.sources, strict=True)],
        repeats=plan.repeats,
    )


def data_state(step: int, plan: Plan, seed: int, skipped: Skipped) -> dict[str, Any]:
    """After `step` steps; JSON. sources: of each, by its name and its ratio, the samples that it gave."""
    given, distinct = _came(step, plan, seed, skipped)
    return _fixed(plan, seed) | {
        "samples_seen": step * plan.global_batch,
        "distinct": distinct,
        "skipped": skipped.batches,
        "sources": {f"{s.name} {s.ratio}": n for s, n in zip(plan.sources, given, strict=True)},
    }


def source_epochs(step: int, plan: Plan, seed: int, skipped: Skipped) -> dict[str, float]:
    """How often each source has been passed over after `step` steps, by name."""
    given, _ = _came(step, plan, seed, skipped)
    return {s.name: samples / s.samples for s, samples in zip(plan.sources, given, strict=True)}


def distinct_seen(step: int, plan: Plan, seed: int, skipped: Skipped) -> int:
    """How many training samples have come after `step` steps in the first epoch of their source.

    Each of them once, and none of those that were passed over then, which a later epoch brings for the first time: just
    the samples of which `quarantine` counts the bad ones.
    """
    return _came(step, plan, seed, skipped)[1]


def _came(step: int, plan: Plan, seed: int, skipped: Skipped) -> tuple[list[int], int]:
    """What came after `step` steps: samples of each source, and those of first epochs of all."""
    mix = Mix([source.ratio for source in plan.sources], seed)
    samples = np.array([source.samples for source in plan.sources])
    then, now = (mix.before(skipped.batch(s) * plan.distinct_samples) for s in (skipped.step, step))
    given = np.array(skipped.given or [0] * len(samples)) + now - then
    first = np.minimum(now, samples) - np.minimum(then, samples)
    return given.tolist(), skipped.distinct + int(first.sum())


def check_continues(before: Mapping[str, Any], plan: Plan, seed: int, dataset: Dataset, where: str) -> None:
    """Raise where training from the state `before`, found at `where`, would not see the samples that were to follow."""
    if not isinstance(before.get("sources"), dict):
        raise CheckpointError(
            f"{where} was written by an earlier release, and this one does not read how far its data had come.\n"
            "  Finish the run with that release, or begin another one with init.from."
        )
    now = data_state(0, plan, seed, Skipped())
    mixed, mixes = " : ".join(before["sources"]), " : ".join(now["sources"])
    if mixed != mixes:
        raise CheckpointError(
            f"{where} was trained on the mixture {mixed}; this config gives {mixes}.\n"
            "  Take the old sources and weights in their order to resume it, or begin another run with init.from."
        )
    if before["digest"] != now["digest"]:
        raise DataError(
            f"{where} was trained on the data set {before['digest']}, but {dataset.source} is {now['digest']}: "
            "shards were added, removed or changed. Bring the data set back, or begin another run with init.from."
        )
    changed = [
        f"{key} {before.get(key, 'unknown')} -> {value}"
        for key, value in _fixed(plan, seed).items()
        if before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{where} has another sample order than this config gives: {', '.join(changed)}.\n"
            "  Restore the old values to resume it, or begin another run with init.from."
        )


def _fixed(plan: Plan, seed: int) -> dict[str, Any]:
    """All that the sample order is a function of, next to the step and the mixture."""
    return {
        "order": VERSION,
        "seed": seed,
        "digest": plan.train_digest,
        "global_batch": plan.global_batch,
        "repeats": plan.repeats,
        "lanes": plan.lanes,
        "block_samples": plan.block_samples,
        "window_blocks": plan.window_blocks,
    }
