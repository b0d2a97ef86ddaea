"""A checkpoint goes on at any number of ranks and any ZeRO stage: the same losses over the twenty steps that follow.

With everything on that draws or weighs by sample: mixup, CutMix, drop path, repeated augmentation, layer-wise decay;
and with a global batch that most worlds do not divide.
"""

import itertools
import shutil
from pathlib import Path

import pytest
from ranks import Ranks, on_ranks
from test_resume import config, journal, train

from pretrain.config import Config

SAVED, TOTAL = 5, 25
WORLDS = STAGES = (1, 2, 3, 4)
Place = tuple[int, int]
"""World size, ZeRO stage."""

PLACES: list[Place] = [(world, stage - 1) for world in WORLDS for stage in STAGES]
TOLERANCE = 1e-5


def settings(run: Path, shards: Path, stage: int) -> Config:
    return config(
        run,
        shards,
        stage,
        data={"train": {"shards": str(shards / "train")}, "decode_threads": 0, "augment": {"repeats": 2}, "val": None},
        model={"in_chans": 1, "num_classes": 10, "drop_path_rate": 0.2},
        objective={"mixup_alpha": 0.4, "cutmix_alpha": 0.4},
        optim={"lr": 3e-3, "weight_decay": 0.1, "warmup_steps": 5, "layer_decay": 0.8},
        train={"global_batch": 64, "micro_batch": 10, "total_steps": TOTAL, "log_every_steps": 1, "eval_every_steps": None},
    )  # fmt: skip


def start(ranks: Ranks, folder: Path, shards: Path, stages: list[int]) -> None:
    for stage in stages:
        run = folder / f"{ranks.size}-{stage}"
        assert train(ranks, settings(run, shards, stage), SAVED) == ("interrupted", SAVED)


def go_on(ranks: Ranks, folder: Path, shards: Path, moves: list[tuple[Place, int]]) -> None:
    for (world, saved), stage in moves:
        run = folder / f"{world}-{saved}-to-{ranks.size}-{stage}"
        if ranks.is_main:
            shutil.copytree(folder / f"{world}-{saved}", run)
        ranks.barrier()
        assert train(ranks, settings(run, shards, stage)) == ("finished", TOTAL)


def losses(run: Path) -> dict[int, float]:
    return {step: value for (name, step), value in journal(run).items() if name == "train/loss"}


def largest_difference(moves: list[tuple[Place, Place]], folder: Path, shards: Path) -> float:
    """Over all moves and steps, against a run on one rank that nothing interrupted."""
    golden = settings(folder / "golden", shards, 0)
    on_ranks(1, train, golden)
    expected = losses(Path(golden.run.dir))
    for size in WORLDS:
        from_here = sorted({stage for (world, stage), _ in moves if world == size})
        on_ranks(size, start, folder, shards, from_here, timeout=600)
    for size in WORLDS:
        to_here = [(source, stage) for source, (world, stage) in moves if world == size]
        on_ranks(size, go_on, folder, shards, to_here, timeout=1800)
    worst = 0.0
    for (world, saved), (size, stage) in moves:
        found = losses(folder / f"{world}-{saved}-to-{size}-{stage}")
        assert found.keys() == expected.keys()
        worst = max(worst, max(abs(found[step] - expected[step]) for step in expected))
    print(f"\n{len(moves)} moves: largest difference of a loss {worst:.1e}")
    return worst


def test_a_checkpoint_goes_on_at_another_world_and_stage(digits: Path, tmp_path: Path) -> None:
    """Every world and every stage once on either side."""
    moves = [((1, 0), (3, 1)), ((3, 2), (4, 0)), ((4, 3), (2, 2)), ((2, 1), (1, 3))]
    assert largest_difference(moves, tmp_path, digits) < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_checkpoint_goes_on_at_every_world_and_stage(digits: Path, tmp_path: Path) -> None:
    moves = list(itertools.product(PLACES, PLACES))
    assert largest_difference(moves, tmp_path, digits) < TOLERANCE
