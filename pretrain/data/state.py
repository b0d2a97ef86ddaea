"""What a checkpoint says of the data: enough to go on at any step, on any ranks, and to refuse what would not be going on.

The state is the same on every rank and about 1 KB at most whatever the size of the data: `samples_seen` rows were computed,
each source gave so many samples, `skipped` batches were passed over, and the rest fixes the order. Nothing in it is
needed to find the place again but the step and `skipped`: it is there to be compared and to be read by people.
"""

from collections.abc import Mapping
from typing import Any

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
    """After `step` steps; JSON. sources: of each its name, its ratio, and the samples that it gave."""
    mix, next_batch = Mix([source.ratio for source in plan.sources], seed), skipped.batch(step)
    given = mix.before(next_batch * plan.distinct_samples)
    for start, stop in skipped.before(next_batch):
        given = given - mix.before(stop * plan.distinct_samples) + mix.before(start * plan.distinct_samples)
    return _fixed(plan, seed) | {
        "samples_seen": step * plan.global_batch,
        "skipped": [list(window) for window in skipped.windows],
        "sources": [[s.name, s.ratio, int(n)] for s, n in zip(plan.sources, given, strict=True)],
    }


def source_epochs(step: int, plan: Plan, seed: int, skipped: Skipped) -> dict[str, float]:
    """How often each source has been passed over after `step` steps, by name."""
    given = data_state(step, plan, seed, skipped)["sources"]
    return {s.name: samples / s.samples for s, (_, _, samples) in zip(plan.sources, given, strict=True)}


def distinct_seen(step: int, plan: Plan, seed: int, skipped: Skipped) -> int:
    """How many of the training samples have come at least once after `step` steps."""
    given = data_state(step, plan, seed, skipped)["sources"]
    return sum(min(samples, s.samples) for s, (_, _, samples) in zip(plan.sources, given, strict=True))


def check_continues(before: Mapping[str, Any], plan: Plan, seed: int, dataset: Dataset, where: str) -> None:
    """Raise where training from the state `before`, found at `where`, would not see the samples that were to follow."""
    now = data_state(0, plan, seed, Skipped())
    mixed, mixes = _mixture(before), _mixture(now)
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


def _mixture(state: Mapping[str, Any]) -> str:
    """Names and ratios, in their order: `photos 3 : web 1`."""
    return " : ".join(f"{name} {ratio}" for name, ratio, _ in state.get("sources", [("train", 1, 0)]))
