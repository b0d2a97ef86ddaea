"""Learning rates, parameter groups, optimizers."""

import dataclasses
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.optim import param_groups_weight_decay
from torch import nn

from pretrain.config import Config, ModelConfig, OptimConfig, Plan, resolve
from pretrain.config.plan import DataFacts, Hardware
from pretrain.model import InitialWeights, VisionTransformer, build
from pretrain.optim import build_optimizer, lr_at, parameter_groups, set_lr
from pretrain.optim.groups import decays, layer_id


def plan(**changes: object) -> Plan:
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"shards": "unused"}},
            "model": model_settings(),
            "optim": {"lr": 0.4, "warmup_steps": 4},
            "train": {"global_batch": 4, "total_steps": 15},
        }
    )
    facts = DataFacts(samples=100, shards=1, bytes=1000, digest="0")
    return dataclasses.replace(resolve(config, 1, facts, Hardware("cpu", "test", False)), **changes)


def model_settings(pool: str = "token") -> dict[str, object]:
    return {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 32,
        "img_size": (8, 8),
        "patch_size": (4, 4),
        "num_classes": 3,
        "global_pool": pool,
    }


def vit(pool: str = "token") -> VisionTransformer:
    config = ModelConfig.model_validate(model_settings(pool))
    return build(config, InitialWeights(config, 0))


def test_warmup_is_linear_from_zero_to_the_peak() -> None:
    assert [lr_at(step, plan()) for step in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert lr_at(0, plan(warmup_steps=0)) == 0.4


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_ends_at_min_lr_on_the_last_step_and_stays(schedule: str) -> None:
    p = plan(schedule=schedule, min_lr=0.1)
    rates = [lr_at(step, p) for step in range(4, 15)]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.25)  # half way
    assert rates == sorted(rates, reverse=True)
    assert lr_at(15, p) == lr_at(1000, p) == rates[-1]


def test_cosine_equals_torch() -> None:
    p = plan(warmup_steps=0, min_lr=0.05)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=p.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=p.total_steps - 1, eta_min=0.05)
    for step in range(p.total_steps):
        assert lr_at(step, p) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_constant_stays_at_the_peak() -> None:
    assert {lr_at(step, plan(schedule="constant")) for step in range(4, 20)} == {0.4}


@pytest.mark.parametrize(("warmup", "last"), [(14, 0.4), (15, 0.4 * 14 / 15)])
def test_a_warmup_to_the_end_leaves_no_decay(warmup: int, last: float) -> None:
    assert lr_at(14, plan(warmup_steps=warmup)) == pytest.approx(last)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_every_parameter_is_in_one_group(pool: str, layer_decay: float) -> None:
    model = vit(pool)
    groups = parameter_groups(model.named_parameters(), OptimConfig(lr=1.0, layer_decay=layer_decay), 2)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
    assert len(groups) == (2 if layer_decay == 1.0 else 8)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_weight_decay_falls_on_what_timm_gives_it_but_the_latent(pool: str) -> None:
    timm = TimmViT(
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=3,
        global_pool=pool,
        class_token=pool == "token",
    )
    exempt = timm.no_weight_decay() | {"attn_pool.latent"}
    of_timm = param_groups_weight_decay(timm, 0.1, no_weight_decay_list=exempt)[-1]["params"]
    names = {name for name, p in timm.named_parameters() if any(p is q for q in of_timm)}
    assert {name for name, _ in vit(pool).named_parameters() if decays(name)} == names


def variant() -> VisionTransformer:
    """A model with a parameter of every kind that is not in the plain one."""
    more = {
        "pos_embed": "learned_2d",
        "pos_embed_at": "every_layer",
        "num_registers": 2,
        "layer_scale": 0.1,
        "qk_norm": True,
        "act": "swiglu",
        "representation_size": 8,
    }
    config = ModelConfig.model_validate(model_settings() | more)
    return build(config, InitialWeights(config, 0))


def test_tables_tokens_norms_and_scales_do_not_decay_and_the_new_matrices_do() -> None:
    names = [name for name, _ in variant().named_parameters()]
    matrices = {"patch_embed.proj", "pre_logits", "head"} | {
        f"blocks.{i}.{module}" for i in range(2) for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {name for name in names if decays(name)} == {f"{module}.weight" for module in matrices}
    assert not any(decays(name) for name in ("rel_pos", "blocks.0.attn.q_norm.weight", "blocks.1.ls2.gamma"))


def test_new_parameters_have_the_layer_of_what_they_act_on() -> None:
    groups = parameter_groups(variant().named_parameters(), OptimConfig(lr=1.0, layer_decay=0.5), 2)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["pre_logits.weight"] == scale["head.bias"] == 1.0
    assert scale["blocks.1.pos_embed_x"] == scale["blocks.1.ls1.gamma"] == 0.5
    assert scale["blocks.0.pos_embed_prefix"] == scale["blocks.0.attn.q_norm.weight"] == 0.25
    assert scale["reg_token"] == scale["cls_token"] == 0.125
    assert {layer_id(name, 2) for name in ("pos_embed", "pos_embed_x", "pos_embed_prefix", "rel_pos")} == {0}


def test_groups_need_no_shape_as_under_zero_3() -> None:
    model = vit()
    before = parameter_groups(model.named_parameters(), OptimConfig(lr=1.0, layer_decay=0.5), 2)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    after = parameter_groups(model.named_parameters(), OptimConfig(lr=1.0, layer_decay=0.5), 2)
    assert [g["names"] for g in after] == [g["names"] for g in before]
    assert [g["weight_decay"] for g in after] == [g["weight_decay"] for g in before]


def test_order_of_parameters_does_not_change_the_groups() -> None:
    named = list(vit().named_parameters())
    config = OptimConfig(lr=1.0, layer_decay=0.5)
    assert [g["names"] for g in parameter_groups(named, config, 2)] == [
        g["names"] for g in parameter_groups(reversed(named), config, 2)
    ]


def test_layers_are_scaled_from_the_head_down() -> None:
    config = OptimConfig(lr=2.0, layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(vit().named_parameters(), config, 2)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["head.weight"] == scale["norm.bias"] == 1.0
    assert scale["blocks.1.mlp.fc1.weight"] == scale["blocks.1.norm1.weight"] == 0.5
    assert scale["blocks.0.attn.qkv.bias"] == 0.25
    assert scale["pos_embed"] == scale["cls_token"] == scale["patch_embed.proj.weight"] == 0.125
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_a_shared_repeated_or_unknown_parameter_is_refused() -> None:
    shared, config = nn.Parameter(torch.zeros(1)), OptimConfig(lr=1.0, layer_decay=0.5)
    with pytest.raises(ValueError, match=r"'head.bias' and 'head.weight' are one and the same"):
        parameter_groups([("head.weight", shared), ("head.bias", shared)], config, 2)
    other = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"'head.weight' is listed twice"):
        parameter_groups([("head.weight", shared), ("head.weight", other)], config, 2)
    for name in ("blocks.2.norm1.weight", "blocks.x.norm1.weight", "decoder.weight"):
        with pytest.raises(ValueError, match="belongs to no layer of a model with 2 blocks"):
            layer_id(name, 2)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_step_equals_the_plain_loop_of_torch(name: str) -> None:
    config = OptimConfig(
        name=name, lr=0.1, weight_decay=0.2, layer_decay=0.5, betas=(0.8, 0.95), momentum=0.7
    )
    ours, reference = vit(), vit()
    optimizer = build_optimizer(parameter_groups(ours.named_parameters(), config, 2), config)
    assert all(group["fused"] for group in optimizer.param_groups)
    plain = [
        {**g, "params": [reference.get_parameter(n) for n in g["names"]]} for g in optimizer.param_groups
    ]
    for group in plain:
        group |= {"fused": False, "foreach": False}
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    loop = kind(plain)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter, twin in zip(ours.parameters(), reference.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            twin.grad = parameter.grad.clone()
        for each in (optimizer, loop):
            set_lr(each.param_groups, 0.1 * (step + 1))
            each.step()
    for parameter, twin in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, twin)


def test_set_lr_gives_each_group_its_share() -> None:
    groups = parameter_groups(vit().named_parameters(), OptimConfig(lr=1.0, layer_decay=0.5), 2)
    set_lr(groups, 0.8)
    assert {round(math.log2(0.8 / group["lr"])) for group in groups} == {0, 1, 2, 3}
