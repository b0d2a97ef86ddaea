"""Engines of tiny models for tests that run on several ranks."""

from pathlib import Path
from typing import Any

import tiny
from ranks import Ranks
from torch import Tensor

from pretrain.config import Config, Plan
from pretrain.engine import Engine
from pretrain.model import InitialWeights
from pretrain.optim import lr_at

STEPS = 6
STAGES = (0, 1, 2, 3)


def config(stage: int, precision: str, micro: int | None, every: int, **more: dict[str, Any]) -> Config:
    engine = {"zero_stage": stage, "precision": precision, "checkpoint_every_blocks": every}
    return tiny.config(engine=engine, train={"micro_batch": micro}, **more)


def make_engine(cfg: Config, ranks: Ranks, folder: Path) -> tuple[Engine, Plan]:
    plan = tiny.plan(cfg, ranks.size)
    engine = Engine(cfg, plan, ranks, folder / f"rank_{ranks.rank}.log")
    engine.write(InitialWeights(cfg.model, 0))
    return engine, plan


def losses_of(engine: Engine, plan: Plan, ranks: Ranks, first: int = 0, last: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, last):
        out = engine.step(tiny.micro_batches(engine.config, plan, step, ranks.rank), lr_at(step, plan))
        losses.append(ranks.sum([float(out.loss_sum)])[0] / plan.global_batch)
    return losses


def weights(engine: Engine) -> dict[tuple[str, int], Tensor]:
    return {(name, start): kinds["weight"].clone() for name, start, _, kinds in engine.slices()}
