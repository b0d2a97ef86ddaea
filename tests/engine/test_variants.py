"""Models of every position kind, with dropout and drop path, train alike on any topology, stage and recomputation."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import STEPS, config, losses_of, make_engine
from ranks import Ranks, on_ranks

from pretrain.model import InitialWeights, build, drop_path_rates, dropout_keys, keep_factors
from pretrain.objective import Objective
from pretrain.optim import build_optimizer, lr_at, parameter_groups, set_lr

CHANCE = {"drop_path_rate": 0.2, "dropout_rate": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "tables in every block": CHANCE
    | {"pos_embed": "learned_2d", "pos_embed_at": "every_layer", "num_registers": 2, "layer_scale": 0.5},
    "one table for all blocks": CHANCE | {"pos_embed_at": "every_layer_shared", "qk_norm": True},
    "relative": CHANCE | {"pos_embed": "relative", "pos_embed_at": "every_layer", "global_pool": "avg"},
    "relative, one table": CHANCE | {"pos_embed": "relative", "pos_embed_at": "every_layer_shared"},
    "rotary": CHANCE
    | {"pos_embed": "rope_2d", "act": "swiglu", "representation_size": 8, "global_pool": "map"},
}


def plain(model: dict[str, Any]) -> list[float]:
    cfg = config(0, "fp32", None, 0, model=model)
    plan = tiny.plan(cfg, 1)
    vit = build(cfg.model, InitialWeights(cfg.model, 0))
    optimizer = build_optimizer(parameter_groups(vit.named_parameters(), cfg.optim, 2), cfg.optim)
    objective = Objective(cfg.objective, cfg.model.num_classes)
    losses = []
    for step in range(STEPS):
        batch = tiny.global_batch(cfg, step)
        keep = keep_factors(0, batch.positions, drop_path_rates(cfg.model))
        keys = dropout_keys(0, batch.positions, 2)
        loss = objective.losses(vit(batch.images, keep, keys), batch.labels).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vit.parameters(), plan.clip_grad_norm)
        set_lr(optimizer.param_groups, lr_at(step, plan))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def on_every_stage(ranks: Ranks, folder: Path) -> dict[tuple[str, int, int], list[float]]:
    results = {}
    for name, model in MODELS.items():
        for stage, every in ((1, 0), (3, 1)):
            engine, plan = make_engine(config(stage, "fp32", 2, every, model=model), ranks, folder)
            results[name, stage, every] = losses_of(engine, plan, ranks)
    return results


def test_every_model_trains_as_in_a_plain_loop(tmp_path: Path) -> None:
    expected = {name: plain(model) for name, model in MODELS.items()}
    for (name, stage, every), losses in on_ranks(2, on_every_stage, tmp_path)[0].items():
        assert losses == pytest.approx(expected[name], abs=1e-5), (name, stage, every)
