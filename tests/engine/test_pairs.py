"""Training with mixup and CutMix is the same on any topology and at any ZeRO stage as in a plain loop."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engines import STEPS, config, losses_of, make_engine
from ranks import Ranks, on_ranks

from pretrain.model import InitialWeights, build
from pretrain.objective import Objective, draw_mix
from pretrain.optim import build_optimizer, lr_at, parameter_groups, set_lr

OBJECTIVE = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 0.9, "label_smoothing": 0.1}
BATCH = 10
SETTINGS: dict[int, list[tuple[int, int | None, int]]] = {
    1: [(1, 4, 0)],
    2: [(0, 2, 1), (1, None, 0), (2, 4, 0), (3, 3, 1)],
    3: [(3, None, 0)],
    4: [(2, 2, 0)],
}
"""World: (ZeRO stage, micro-batch, checkpoint_every_blocks). Five pairs: every world above 1 has uneven slices."""


def settings(name: str, stage: int, micro: int | None, every: int) -> Any:
    more: dict[str, Any] = {"objective": OBJECTIVE | {"name": name}}
    cfg = config(stage, "fp32", micro, every, **more)
    return cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch": BATCH})})


def plain_torch(name: str, mixes: bool = True) -> list[float]:
    """The whole batch in one process."""
    cfg = settings(name, 0, None, 0)
    plan = tiny.plan(cfg, 1)
    model = build(cfg.model, InitialWeights(cfg.model, 0))
    groups = parameter_groups(model.named_parameters(), cfg.optim, cfg.model.num_blocks)
    optimizer = build_optimizer(groups, cfg.optim)
    losses = []
    for step in range(STEPS):
        batch = tiny.global_batch(cfg, step)
        mix = draw_mix(cfg.objective, cfg.run.seed, batch.positions, cfg.model.img_size)
        pixels, label = (mix.pixels(cfg.model.img_size), mix.label) if mixes else (None, None)
        logits = model(batch.images, own_share=pixels)
        loss = Objective(cfg.objective, 5).losses(logits, batch.labels, label).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_grad_norm)
        set_lr(optimizer.param_groups, lr_at(step, plan))
        optimizer.step()
        losses.append(loss.item())
    return losses


def mixed(ranks: Ranks, name: str, folder: Path) -> dict[str, list[float]]:
    results = {}
    for stage, micro, every in SETTINGS[ranks.size]:
        engine, plan = make_engine(settings(name, stage, micro, every), ranks, folder)
        if ranks.size > 1:
            assert plan.smallest_slice < plan.largest_slice
        results[f"stage {stage}, micro {micro}, every {every}"] = losses_of(engine, plan, ranks)
    return results


@pytest.mark.parametrize(("world", "name"), [(1, "softmax"), (2, "sigmoid"), (3, "softmax"), (4, "softmax")])
def test_mixing_is_the_same_on_any_topology(world: int, name: str, tmp_path: Path) -> None:
    expected = plain_torch(name)
    for what, losses in on_ranks(world, mixed, name, tmp_path)[0].items():
        assert losses == pytest.approx(expected, abs=1e-6 if name == "softmax" else 5e-6), what


def test_mixing_changes_what_is_learnt() -> None:
    assert plain_torch("softmax")[-1] != pytest.approx(plain_torch("softmax", mixes=False)[-1], abs=1e-3)
