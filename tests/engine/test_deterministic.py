"""`engine.deterministic`: the same bits after a restart, on the CPU always and on CUDA where there is one."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import losses_of, weights
from ranks import Ranks, on_ranks

from pretrain.config.plan import Hardware
from pretrain.engine import Engine
from pretrain.model import InitialWeights

SAVED, TOTAL = 3, 6


def stop_and_go(ranks: Ranks, folder: Path, device: str, stage: int, precision: str) -> None:
    """Train through; train, keep what a checkpoint keeps, go on with a new engine from it; compare bits."""
    sections: dict[str, dict[str, Any]] = {
        "engine": {
            "zero_stage": stage,
            "precision": precision,
            "deterministic": True,
            "checkpoint_every_blocks": 2,
        },
        "model": {"drop_path_rate": 0.3},
        "train": {"micro_batch": 4},
    }
    cfg = tiny.config(**sections)
    plan = tiny.plan(cfg, ranks.size, hardware=Hardware("cuda" if device == "cuda" else "cpu", "test", True))

    def new_engine() -> Engine:
        return Engine(cfg, plan, ranks, folder / "log")

    first = new_engine()
    first.write(InitialWeights(cfg.model, 0))
    losses_of(first, plan, ranks, 0, SAVED)
    kept = {
        (kind, name): t.cpu().clone() for name, _, _, kinds in first.slices() for kind, t in kinds.items()
    }
    losses = losses_of(first, plan, ranks, SAVED, TOTAL)

    second = new_engine()
    second.restore(lambda kind, name, start, stop: kept[kind, name].reshape(-1)[start:stop], SAVED)
    assert losses_of(second, plan, ranks, SAVED, TOTAL) == losses
    expected = weights(first)
    assert all(torch.equal(value, expected[key]) for key, value in weights(second).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.gpu
def test_deterministic_restart_on_cuda(stage: int, precision: str, tmp_path: Path) -> None:
    on_ranks(1, stop_and_go, tmp_path, "cuda", stage, precision, device="cuda")


def on_cpu(ranks: Ranks, folder: Path) -> None:
    for stage in (0, 3):
        stop_and_go(ranks, folder, "cpu", stage, "fp32")


def test_deterministic_restart_on_the_cpu(tmp_path: Path) -> None:
    on_ranks(1, on_cpu, tmp_path)
