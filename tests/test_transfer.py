"""The hand-off keeps what it says it keeps, and stops before anything is half loaded."""

import math
from collections.abc import Mapping

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.errors import CheckpointError
from pretrain.model import build, initial_value, parameter_shapes
from pretrain.transfer import Row, Transfer, transfer

SEED = 11


def model(**changes: object) -> ModelConfig:
    settings = {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 24,
        "img_size": (8, 12),
        "patch_size": (4, 4),
        "num_classes": 5,
    }
    return ModelConfig.model_validate(settings | changes)


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def hand_off(old: ModelConfig, new: ModelConfig, **init: str) -> tuple[dict[str, Tensor], Transfer]:
    source = random_weights(old)
    return source, transfer(source, old, new, InitConfig(source="unused", **init), SEED)


def logits(config: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (3, *config.img_size, config.in_chans), dtype=torch.uint8, generator=generator
    )
    with torch.no_grad():
        return build(config, weights)(images)


def assert_bitwise(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_same_model_gets_the_same_bits_and_logits(pool: str, order: str) -> None:
    config = model(global_pool=pool, pos_embed_order=order)
    source, result = hand_off(config, config)
    assert_bitwise(result.weights, source)
    assert torch.equal(logits(config, result.weights), logits(config, source))
    assert {row.action for row in result.report} == {"kept"}
    assert [row.name for row in result.report] == list(parameter_shapes(config))
    assert result.as_table() == [Row(f"{len(source)} parameters", "kept", "bit for bit")]


@pytest.mark.parametrize(
    ("kernel", "mode", "antialias"), [("bicubic_antialias", "bicubic", True), ("bilinear", "bilinear", False)]
)
def test_a_new_grid_resizes_the_table_and_nothing_else(kernel: str, mode: str, antialias: bool) -> None:
    old, new = model(), model(img_size=(20, 16))
    source, result = hand_off(old, new, resize_kernel=kernel)
    table = resample_abs_pos_embed(
        source["pos_embed"], [5, 4], [2, 3], 1, interpolation=mode, antialias=antialias
    )
    assert_bitwise(result.weights, source | {"pos_embed": table})
    assert result.as_table()[0] == Row("pos_embed", "resized", f"2x3 -> 5x4 {kernel}")
    assert result.as_table()[1:] == [Row(f"{len(source) - 1} parameters", "kept", "bit for bit")]
    assert logits(new, result.weights).shape == (3, 5)


def test_a_grid_of_as_many_tokens_is_resized_too() -> None:
    source, result = hand_off(model(img_size=(8, 24)), model(img_size=(12, 16)))
    assert result.weights["pos_embed"].shape == source["pos_embed"].shape
    assert not torch.allclose(result.weights["pos_embed"], source["pos_embed"], atol=0.1)


def test_other_classes_get_a_head_of_zeros() -> None:
    source, result = hand_off(model(), model(num_classes=9))
    zeros = {"head.weight": torch.zeros(9, 16), "head.bias": torch.zeros(9)}
    assert_bitwise(result.weights, source | zeros)
    assert Row("head.weight", "zeroed", "5 -> 9 classes") in result.report


def test_head_zero_resets_the_head_of_equal_classes() -> None:
    _, result = hand_off(model(), model(), head="zero")
    assert not result.weights["head.weight"].any()
    assert Row("head.bias", "zeroed", "init.head: zero") in result.report


@pytest.mark.parametrize("img_size", [(8, 12), (20, 16)])
@pytest.mark.parametrize("position", ["reset", "drop"])
def test_reset_and_drop_replace_the_grid_and_keep_the_row_of_cls(
    position: str, img_size: tuple[int, int]
) -> None:
    new = model(img_size=img_size)
    source, result = hand_off(model(), new, position=position)
    table = result.weights["pos_embed"]
    drawn = initial_value("pos_embed", (1, 1 + new.num_patches, 16), new, SEED)[:, 1:]
    assert torch.equal(table[:, 1:], drawn if position == "reset" else torch.zeros_like(drawn))
    assert torch.equal(table[:, :1], source["pos_embed"][:, :1])
    actions = {row.name: row.action for row in result.report}
    assert actions.pop("pos_embed") == {"reset": "reset", "drop": "zeroed"}[position]
    assert set(actions.values()) == {"kept"}


@pytest.mark.parametrize(
    ("before", "after"), [("cls_then_pe", "pe_then_cls"), ("pe_then_cls", "cls_then_pe")]
)
def test_the_order_of_cls_and_position_converts_exactly(before: str, after: str) -> None:
    old, new = model(pos_embed_order=before), model(pos_embed_order=after)
    source, result = hand_off(old, new)
    assert torch.equal(logits(new, result.weights), logits(old, source))
    table = {row.name: row for row in result.as_table()}
    if before == "cls_then_pe":
        assert torch.equal(result.weights["pos_embed"], source["pos_embed"][:, 1:])
        assert table["cls_token"].action == table["pos_embed[0]"].action == "folded"
    else:
        assert torch.equal(result.weights["cls_token"], source["cls_token"])
        assert not result.weights["pos_embed"][:, 0].any()
        assert table["pos_embed[0]"].action == "zeroed"


def test_order_and_grid_may_change_at_once() -> None:
    source, result = hand_off(model(), model(pos_embed_order="pe_then_cls", img_size=(20, 16)))
    expected = resample_abs_pos_embed(source["pos_embed"][:, 1:], [5, 4], [2, 3], 0)
    assert torch.equal(result.weights["pos_embed"], expected)
    assert torch.equal(result.weights["cls_token"], source["cls_token"] + source["pos_embed"][:, :1])


@pytest.mark.parametrize("pool", ["token", "map"])
def test_mean_pooling_can_follow_any_other(pool: str) -> None:
    old, new = model(global_pool=pool), model(global_pool="avg")
    source, result = hand_off(old, new)
    assert result.weights.keys() == parameter_shapes(new).keys()
    assert torch.equal(result.weights["fc_norm.weight"], source["norm.weight"])
    assert torch.equal(result.weights["pos_embed"], source["pos_embed"][:, old.num_pos_prefix :])
    assert not result.weights["head.weight"].any()
    rows = {row.name: row for row in result.report}
    assert rows["head.weight"].detail == f"{pool} -> avg pooling"
    gone = {name for name, row in rows.items() if row.action == "dropped"}
    assert gone == source.keys() - parameter_shapes(new).keys() - {"norm.weight", "norm.bias"} | (
        {"pos_embed[0]"} if pool == "token" else set()
    )
    assert logits(new, result.weights).shape == (3, 5)
    _, kept = hand_off(old, new, head="keep")
    assert torch.equal(kept.weights["head.weight"], source["head.weight"])


def test_weights_are_float32_whatever_the_source() -> None:
    config = model()
    source = {name: value.bfloat16() for name, value in random_weights(config).items()}
    result = transfer(source, config, model(img_size=(20, 16)), InitConfig(source="unused"), SEED)
    assert {value.dtype for value in result.weights.values()} == {torch.float32}


def test_weights_are_made_only_when_asked_for() -> None:
    class Counting(dict[str, Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> Tensor:
            self.reads += 1
            return super().__getitem__(name)

    config = model()
    source = Counting(random_weights(config))
    result = transfer(source, config, config, InitConfig(source="unused"), SEED)
    checked = source.reads
    assert checked == len(source)
    assert list(result.weights)
    assert source.reads == checked
    assert result.weights["norm.bias"] is not None
    assert source.reads == checked + 1


def test_every_reason_is_given_at_once() -> None:
    old = model(num_classes=7, in_chans=3)
    source = random_weights(old)
    del source["norm.bias"]
    source["decoder.weight"] = torch.zeros(1)
    source["head.bias"] = torch.zeros(8)
    source["blocks.0.norm1.weight"][3] = math.nan
    new = model(
        embed_dim=32,
        depth=3,
        num_heads=4,
        mlp_dim=48,
        patch_size=(2, 2),
        in_chans=1,
        act="gelu_tanh",
        norm_eps=1e-5,
        global_pool="map",
        mean=(0.1,),
        std=(0.2,),
    )
    with pytest.raises(CheckpointError) as caught:
        transfer(source, old, new, InitConfig(source="unused", head="keep"), SEED)
    message = str(caught.value)
    for part in (
        "nothing was loaded",
        "model.embed_dim: the source has 16, this config 32",
        "model.depth: the source has 2, this config 3",
        "model.num_heads: the source has 2, this config 4",
        "model.mlp_dim: the source has 24, this config 48",
        "model.patch_size: the source has (4, 4), this config (2, 2)",
        "model.in_chans: the source has 3, this config 1",
        "model.act: the source has gelu, this config gelu_tanh",
        "model.norm_eps: the source has 1e-06, this config 1e-05",
        "model.mean: the source has [0.5], this config [0.1]",
        "model.std: the source has [0.5], this config [0.2]",
        "map needs weights that a source with token lacks; possible: token, avg",
        "init.head: keep, but the source has 7 classes and this config 5",
        "missing in the source: norm.bias",
        "not part of the source's model: decoder.weight",
        "of another shape: head.bias [8] instead of [7]",
        "with values that are not finite: blocks.0.norm1.weight",
    ):
        assert part in message


def test_one_mean_for_all_channels_equals_the_same_for_each() -> None:
    hand_off(model(), model(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))


def test_a_long_list_of_names_stays_on_the_screen() -> None:
    config = model()
    with pytest.raises(CheckpointError, match=r"missing in the source: .*, .* and \d+ more") as caught:
        transfer({}, config, config, InitConfig(source="unused"), SEED)
    assert len(str(caught.value)) < 400
