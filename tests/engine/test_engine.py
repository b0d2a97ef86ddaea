"""Every ZeRO stage, precision, accumulation and checkpointing against a plain single-process loop; and skips."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from engines import STAGES, STEPS, config, losses_of, make_engine, weights
from ranks import Ranks, on_ranks

from pretrain.config import Config
from pretrain.engine import private_api
from pretrain.model import InitialWeights, build
from pretrain.objective import Objective
from pretrain.optim import build_optimizer, lr_at, parameter_groups, set_lr

VARIANTS = (
    {"micro": None, "every": 0},
    {"micro": 2, "every": 0},
    {"micro": None, "every": 1},
    {"micro": 2, "every": 2},
)
TOLERANCE = {"fp32": 1e-6, "bf16": 6e-3}
"""Largest difference of a loss of about 1.6. bf16 has 8 bits of mantissa: 1.6 * 2^-8 = 6e-3."""


def all_variants(ranks: Ranks, precision: str, folder: Path) -> dict[str, list[float]]:
    results = {}
    for stage in STAGES:
        for variant in VARIANTS:
            engine, plan = make_engine(config(stage, precision, **variant), ranks, folder)
            results[f"stage {stage}, {variant}"] = losses_of(engine, plan, ranks)
    return results


def plain_torch(precision: str) -> list[float]:
    """The same training in a loop that a reader can check: fp32 masters, products in the given precision."""
    cfg = config(0, "fp32", None, 0)
    plan = tiny.plan(cfg, 1)
    masters = build(cfg.model, InitialWeights(cfg.model, 0))
    groups = parameter_groups(masters.named_parameters(), cfg.optim, cfg.model.num_blocks)
    optimizer = build_optimizer(groups, cfg.optim)
    objective = Objective(cfg.objective, cfg.model.num_classes)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    losses = []
    for step in range(STEPS):
        batch = tiny.global_batch(cfg, step)
        model = build(cfg.model, {n: p.detach().to(dtype) for n, p in masters.named_parameters()})
        loss = objective.losses(model(batch.images), batch.labels).mean()
        loss.backward()
        for mine, theirs in zip(masters.parameters(), model.parameters(), strict=True):
            mine.grad = theirs.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), plan.clip_grad_norm)
        set_lr(optimizer.param_groups, lr_at(step, plan))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_trains_as_a_plain_loop_does(precision: str, tmp_path: Path) -> None:
    expected = plain_torch(precision)
    assert expected[-1] != pytest.approx(
        expected[0], abs=1e-3
    )  # something is learnt, so that equality means something
    for name, losses in on_ranks(2, all_variants, precision, tmp_path)[0].items():
        assert losses == pytest.approx(expected, abs=TOLERANCE[precision]), name


def test_uneven_slices_give_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    for stage, losses in on_ranks(3, uneven, tmp_path)[0].items():
        assert losses == pytest.approx(plain_torch("fp32"), abs=TOLERANCE["fp32"]), f"stage {stage}"


def uneven(ranks: Ranks, folder: Path) -> dict[int, list[float]]:
    results = {}
    for stage in STAGES:
        engine, plan = make_engine(config(stage, "fp32", 2, 0), ranks, folder)
        assert plan.smallest_slice < plan.largest_slice
        results[stage] = losses_of(engine, plan, ranks)
    return results


def test_masters_are_the_source_and_what_we_touch_is_there_at_every_stage_and_precision(
    tmp_path: Path,
) -> None:
    on_ranks(2, masters_equal_source, tmp_path)


def masters_equal_source(ranks: Ranks, folder: Path) -> None:
    import deepspeed.ops

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            cfg = config(stage, precision, None, 0)
            engine, _ = make_engine(cfg, ranks, folder)
            assert private_api.missing(engine._engine) == [], (precision, stage)
            source = InitialWeights(cfg.model, 7)
            engine.write(source)
            held = dict.fromkeys(source, 0)
            for name, start, stop, kinds in engine.slices():
                assert kinds["weight"].dtype == torch.float32
                assert torch.equal(kinds["weight"], source[name].reshape(-1)[start:stop]), (
                    precision,
                    stage,
                    name,
                )
                held[name] += stop - start
            for name, total in zip(held, ranks.sum(list(held.values())), strict=True):
                assert total == source[name].numel(), (precision, stage, name)
            used = forward_weights(cfg, precision, source)
            batch = tiny.global_batch(cfg, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=stage == 0 and precision == "bf16"):
                expected = used(batch.images).float()
            assert torch.allclose(engine.forward(batch).float(), expected, atol=1e-6), (precision, stage)


def forward_weights(cfg: Config, precision: str, source: InitialWeights) -> torch.nn.Module:
    rounded = precision == "bf16" and cfg.engine.zero_stage > 0
    return build(cfg.model, {n: w.bfloat16() if rounded else w for n, w in source.items()})


def test_a_non_finite_gradient_is_skipped_by_all_ranks_at_every_stage(tmp_path: Path) -> None:
    on_ranks(2, poisoned, tmp_path)


def poisoned(ranks: Ranks, folder: Path) -> None:
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            cfg = config(stage, precision, 2, 0)
            engine, plan = make_engine(cfg, ranks, folder)
            losses_of(engine, plan, ranks, 0, 2)
            before = weights(engine)
            batches = tiny.micro_batches(cfg, plan, 2, ranks.rank)
            if ranks.rank == 1:
                batches[-1].weights[0] = math.nan
            out = engine.step(batches, lr=1e-2)
            assert not out.applied, (precision, stage)
            assert engine.steps_taken == 2
            for name, value in weights(engine).items():
                assert torch.equal(value, before[name]), (precision, stage, name)
            assert engine.step(tiny.micro_batches(cfg, plan, 3, ranks.rank), lr=1e-2).applied


def test_a_non_finite_loss_with_finite_gradients_is_skipped_too(tmp_path: Path) -> None:
    on_ranks(2, overflowing_loss, tmp_path)


def overflowing_loss(ranks: Ranks, folder: Path) -> None:
    for stage in STAGES:
        engine, plan = make_engine(config(stage, "fp32", None, 0), ranks, folder)
        source = dict(InitialWeights(engine.config.model, 0))
        source["head.bias"] = torch.tensor(
            [-3e38, 3e38, 0.0, 0.0, 0.0]
        )  # class 0: log of its softmax is -inf
        engine.write(source)
        batches = tiny.micro_batches(engine.config, plan, 0, ranks.rank)
        batches[0].labels[:] = 1
        if ranks.rank == 1:
            batches[0].labels[0] = 0
        before = weights(engine)
        out = engine.step(batches, lr=1e-2)
        assert math.isinf(float(out.loss_sum)) == (ranks.rank == 1), stage
        assert not out.applied, stage
        assert all(torch.equal(value, before[name]) for name, value in weights(engine).items()), stage


def test_gradient_norm_is_that_of_the_global_batch_before_clipping(tmp_path: Path) -> None:
    norms = on_ranks(2, grad_norms, tmp_path)
    cfg = config(0, "fp32", None, 0)
    model = build(cfg.model, InitialWeights(cfg.model, 0))
    batch = tiny.global_batch(cfg, 0)
    Objective(cfg.objective, cfg.model.num_classes).losses(
        model(batch.images), batch.labels
    ).mean().backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    for rank in norms:
        assert rank == pytest.approx([expected] * len(STAGES), rel=1e-4)


def grad_norms(ranks: Ranks, folder: Path) -> list[float]:
    norms = []
    for stage in STAGES:
        engine, plan = make_engine(config(stage, "fp32", 2, 0, optim={"clip_grad_norm": 0.01}), ranks, folder)
        norms.append(
            float(engine.step(tiny.micro_batches(engine.config, plan, 0, ranks.rank), 1e-3).grad_norm)
        )
    return norms
