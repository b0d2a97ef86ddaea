"""The hand-off keeps what it says it keeps, and stops before anything is half loaded."""

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from vits import EVERYTHING, KINDS, random_images, random_weights, tiny

from pretrain.config import InitConfig, ModelConfig
from pretrain.errors import CheckpointError
from pretrain.model import (
    build,
    initial_value,
    parameter_shapes,
    resize_axis,
    resize_patch_filters,
    resize_pos_embed,
    resize_relative,
)
from pretrain.transfer import Row, Transfer, transfer

SEED = 11


def model(**changes: object) -> ModelConfig:
    """2 x 3 patches of 4 x 4 pixels."""
    settings = {
        "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "img_size": (8, 12), "patch_size": (4, 4),
        "num_classes": 5, "mean": (0.5,), "std": (0.5,),
    }  # fmt: skip
    return tiny(**settings | changes)


def hand_off(old: ModelConfig, new: ModelConfig, **init: object) -> tuple[dict[str, Tensor], Transfer]:
    source = random_weights(old)
    return source, transfer(source, old, new, InitConfig(source="unused", **init), SEED)


def logits(config: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return build(config, weights)(random_images(config))


def assert_bitwise(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
@pytest.mark.parametrize("pool", ["token", "avg", "norm_avg", "map"])
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


@pytest.mark.parametrize(
    ("pool", "mean"),
    [("token", "avg"), ("map", "avg"), ("norm_avg", "avg"), ("token", "norm_avg"), ("map", "norm_avg")],
)
def test_mean_pooling_can_follow_any_other(pool: str, mean: str) -> None:
    old, new = model(global_pool=pool), model(global_pool=mean)
    source, result = hand_off(old, new)
    assert result.weights.keys() == parameter_shapes(new).keys()
    norm = "fc_norm.weight" if mean == "avg" else "norm.weight"
    assert torch.equal(result.weights[norm], source["norm.weight"])
    assert torch.equal(result.weights["pos_embed"], source["pos_embed"][:, old.num_pos_prefix :])
    assert not result.weights["head.weight"].any()
    rows = {row.name: row for row in result.report}
    assert rows["head.weight"].detail == f"{pool} -> {mean} pooling"
    gone = {name for name, row in rows.items() if row.action == "dropped"}
    assert gone == source.keys() - parameter_shapes(new).keys() - {"norm.weight", "norm.bias"} | (
        {"pos_embed[0]"} if pool == "token" else set()
    )
    assert logits(new, result.weights).shape == (3, 5)
    _, kept = hand_off(old, new, head="keep")
    assert torch.equal(kept.weights["head.weight"], source["head.weight"])


@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_hands_itself_on_bit_for_bit(kind: dict[str, object], order: str) -> None:
    config = model(**kind, **EVERYTHING, pos_embed_order=order)
    source, result = hand_off(config, config)
    assert_bitwise(result.weights, source)
    assert [row.name for row in result.report] == list(parameter_shapes(config))
    assert {row.action for row in result.report} == {"kept"}


@pytest.mark.parametrize("grid", [(20, 16), (12, 8), (4, 24)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_moves_to_another_grid_table_by_table(
    kind: dict[str, object], grid: tuple[int, int]
) -> None:
    old, new = model(**kind), model(**kind, img_size=grid)
    source, result = hand_off(old, new, resize_kernel="bicubic")
    before, after = old.grid, new.grid
    moved = f"{before[0]}x{before[1]} -> {after[0]}x{after[1]}"
    expected = dict(source)
    for name, value in source.items():
        leaf = name.rpartition(".")[2]
        if leaf == "pos_embed":
            expected[name] = resize_pos_embed(value, before, after, 1, "bicubic")
        elif leaf == "pos_embed_x":
            expected[name] = resize_axis(value, after[1], "bicubic")
        elif leaf == "pos_embed_y":
            expected[name] = resize_axis(value, after[0], "bicubic")
        elif leaf == "rel_pos":
            expected[name] = resize_relative(value, before, after, "bicubic")
    assert_bitwise(result.weights, expected)
    told = {row.name: row for row in result.report if row.action != "kept"}
    if kind["pos_embed"] in ("sincos_2d_mae", "sincos_2d_big_vision", "rope_2d"):
        assert told == {"positions": Row("positions", "recomputed", f"{moved} {kind['pos_embed']}")}
    else:
        leaves = ("pos_embed", "pos_embed_x", "pos_embed_y", "rel_pos")
        tables = [name for name in source if name.rpartition(".")[2] in leaves]
        assert list(told) == tables
        assert {row[1:] for row in told.values()} <= {("resized", f"{moved} bicubic")}
    assert logits(new, result.weights).shape == (3, 5)


def test_blocks_that_fare_alike_share_a_row_of_the_table() -> None:
    old, new = model(depth=4, layer_scale=0.1), model(depth=4, pos_embed_at="every_layer", img_size=(20, 16))
    _, result = hand_off(old, new)
    table = {row.name: row for row in result.as_table()}
    assert table["blocks.0.pos_embed"].detail == "2x3 -> 5x4 bicubic_antialias, was pos_embed"
    assert table["blocks.*.pos_embed (3)"].action == "zeroed"
    folded = Row("blocks.*.mlp.fc2.bias (4)", "folded", "times blocks.*.ls2.gamma of the source")
    assert table[folded.name] == folded
    assert len(result.as_table()) == 9


def test_stretched_rotary_coordinates_are_reported() -> None:
    old = model(pos_embed="rope_2d")
    new = model(pos_embed="rope_2d", rope_reference_grid=old.grid, img_size=(16, 24))
    _, result = hand_off(old, new)
    assert Row("positions", "recomputed", "2x3 -> 4x6 rope_2d, coordinates of 2x3") in result.report


EXACT = {
    "learned_2d as learned_1d": ({"pos_embed": "learned_2d"}, {}),
    "2d in every layer as 1d": (
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
        {"pos_embed_at": "every_layer"},
    ),
    "sincos as learned_1d": ({"pos_embed": "sincos_2d_mae"}, {}),
    "sincos as learned_1d without cls": (
        {"pos_embed": "sincos_2d_big_vision"},
        {"pos_embed_order": "pe_then_cls"},
    ),
    "stem as every layer": ({}, {"pos_embed_at": "every_layer"}),
    "shared as every layer": ({"pos_embed_at": "every_layer_shared"}, {"pos_embed_at": "every_layer"}),
    "shared 2d as every layer": (
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer_shared"},
        {"pos_embed": "learned_2d", "pos_embed_at": "every_layer"},
    ),
    "shared relative as every layer": (
        {"pos_embed": "relative", "pos_embed_at": "every_layer_shared"},
        {"pos_embed": "relative", "pos_embed_at": "every_layer"},
    ),
    "2d folds the rows of cls and registers": (
        {"pos_embed": "learned_2d", "num_registers": 2},
        {"pos_embed": "learned_2d", "num_registers": 2, "pos_embed_order": "pe_then_cls"},
    ),
    "1d folds the rows of cls and registers": (
        {"num_registers": 2},
        {"num_registers": 2, "pos_embed_order": "pe_then_cls"},
    ),
    "registers get rows": (
        {"num_registers": 2, "pos_embed_order": "pe_then_cls"},
        {"num_registers": 2},
    ),
    "every layer gets rows": (
        {"pos_embed_at": "every_layer", "pos_embed_order": "pe_then_cls"},
        {"pos_embed_at": "every_layer"},
    ),
    "LayerScale is folded": ({"layer_scale": 0.1}, {}),
    "LayerScale is added": ({}, {"layer_scale": 1e-4}),
    "LayerScale is folded under registers": (
        {"layer_scale": 0.1, "act": "swiglu", "global_pool": "avg", "num_registers": 1},
        {"act": "swiglu", "global_pool": "avg", "num_registers": 1},
    ),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_what_can_be_written_otherwise_gives_the_same_logits(
    case: tuple[dict[str, object], dict[str, object]],
) -> None:
    old, new = model(**case[0]), model(**case[1])
    source, result = hand_off(old, new)
    torch.testing.assert_close(logits(new, result.weights), logits(old, source), atol=1e-5, rtol=1e-5)
    actions = {row.action for row in result.report}
    assert actions & {"converted", "folded", "zeroed", "reset"} or any(
        "was" in row.detail for row in result.report
    )
    assert "dropped" not in actions
    assert {row.name for row in result.report} >= set(parameter_shapes(new))


@pytest.mark.parametrize("position", ["reset", "drop"])
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_positions_that_are_given_up_can_become_any_kind(
    old: dict[str, object], new: dict[str, object], position: str
) -> None:
    before, after = model(**old, num_registers=1), model(**new, num_registers=1, img_size=(20, 16))
    source, result = hand_off(before, after, position=position)
    made = dict(result.weights)
    assert made.keys() == parameter_shapes(after).keys()
    for name, value in made.items():
        leaf = name.rpartition(".")[2]
        if leaf in ("pos_embed_x", "pos_embed_y", "rel_pos"):
            drawn = initial_value(name, tuple(value.shape), after, SEED)
            assert torch.equal(value, drawn if position == "reset" else torch.zeros_like(drawn))
    lost = source.keys() - made.keys() - {row.name for row in result.report}
    assert all(name.endswith("prefix") for name in lost)
    if "pos_embed" in source and after.num_pos_prefix == 0:  # the stem's row of cls is no place on the grid
        assert torch.equal(made["cls_token"], source["cls_token"] + source["pos_embed"][:, :1]) == (
            before.pos_embed_at == "stem"
        )
    assert logits(after, made).isfinite().all()


def test_a_row_of_cls_is_folded_where_no_table_is_left_for_it() -> None:
    source, result = hand_off(model(), model(pos_embed="none"), position="drop")
    assert torch.equal(result.weights["cls_token"], source["cls_token"] + source["pos_embed"][:, :1])
    assert Row("cls_token", "folded", "pos_embed[0] of the source added") in result.report
    assert Row("pos_embed[0]", "folded", "into cls_token") in result.report
    assert Row("pos_embed", "dropped", "learned_1d stem -> none stem, init.position: drop") in result.report


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"pos_embed": "rope_2d"}, {}, "pos_embed: the source has rope_2d, this config learned_1d"),
        ({}, {"pos_embed": "none"}, "pos_embed: the source has learned_1d, this config none"),
        ({}, {"pos_embed": "learned_2d"}, "cannot be written as the other"),
        ({"pos_embed": "sincos_2d_mae"}, {"pos_embed": "sincos_2d_big_vision"}, "cannot be written"),
        ({"pos_embed_at": "every_layer"}, {}, "pos_embed_at: the source has every_layer, this config stem"),
        ({}, {"pos_embed_at": "every_layer_shared"}, "can become tables of every layer"),
        (
            {"pos_embed_at": "every_layer"},
            {"pos_embed_at": "every_layer", "pos_embed_order": "pe_then_cls"},
            "cannot be folded into the tokens; keep cls_then_pe",
        ),
        ({"num_registers": 2}, {"num_registers": 1}, "registers can be added, but"),
        ({"qk_norm": True}, {}, "qk_norm: the source has True, this config False"),
        ({}, {"act": "swiglu"}, "act: the source has gelu, this config swiglu"),
        ({}, {"patch_size": (2, 2)}, "init.patch: resize would adapt the filters"),
    ],
)
def test_what_would_not_be_the_same_model_is_refused(
    old: dict[str, object], new: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        hand_off(model(**old), model(**new))


@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
def test_registers_are_added_behind_those_that_there_are(order: str) -> None:
    old = model(num_registers=1, pos_embed_order=order)
    new = model(num_registers=3, pos_embed_order=order, img_size=(20, 16))
    source, result = hand_off(old, new)
    drawn = initial_value("reg_token", (1, 3, 16), new, SEED)
    assert torch.equal(result.weights["reg_token"][:, :1], source["reg_token"])
    assert torch.equal(result.weights["reg_token"][:, 1:], drawn[:, 1:])
    assert Row("reg_token", "reset", "2 of 3 drawn anew") in result.report
    table, was = result.weights["pos_embed"], source["pos_embed"]
    if order == "cls_then_pe":
        assert torch.equal(table[:, :2], was[:, :2])
        assert not table[:, 2:4].any()
        assert (
            Row("pos_embed[2:4]", "zeroed", "new: the source has no position for 2 registers")
            in result.report
        )
        table, was = table[:, 4:], was[:, 2:]
    assert torch.equal(table, resample_abs_pos_embed(was, [5, 4], [2, 3], 0))


def test_first_registers_and_pooling_without_cls_may_come_at_once() -> None:
    source, result = hand_off(model(), model(num_registers=2, global_pool="avg"))
    assert torch.equal(result.weights["pos_embed"][:, 2:], source["pos_embed"][:, 1:])
    assert not result.weights["pos_embed"][:, :2].any()
    rows = {row.name: row for row in result.report}
    assert rows["pos_embed[0]"] == Row("pos_embed[0]", "dropped", "there is no cls token")
    assert rows["cls_token"].action == "dropped"
    assert rows["reg_token"].detail == "2 of 2 drawn anew"


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic_antialias"])
def test_another_patch_size_resizes_filters_and_positions(kernel: str) -> None:
    old, new = model(), model(patch_size=(2, 4))  # the same images, twice the rows
    source, result = hand_off(old, new, patch="resize", resize_kernel=kernel)
    name = "patch_embed.proj.weight"
    assert torch.equal(result.weights[name], resize_patch_filters(source[name], (2, 4), kernel))
    assert result.weights["pos_embed"].shape == (1, 13, 16)
    detail = f"4x4 -> 2x4 pixels {kernel}, by pseudo-inverse"
    assert result.as_table()[:2] == [
        Row("pos_embed", "resized", f"2x3 -> 4x3 {kernel}"),
        Row(name, "resized", detail),
    ]
    assert logits(new, result.weights).shape == (3, 5)


def test_larger_patches_of_larger_images_see_what_smaller_ones_saw() -> None:
    """A model that is moved from 4 to 8 pixels a patch answers the doubled image as it answered the image."""
    old, new = (
        model(mean=(0.0,), std=(1.0,)),
        model(mean=(0.0,), std=(1.0,), img_size=(16, 24), patch_size=(8, 8)),
    )
    source, result = hand_off(old, new, patch="resize", resize_kernel="bilinear")
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(
        0, 256, (2, 3, 2, 4, 3, 4), dtype=torch.uint8, generator=generator
    )  # patch by patch
    patches = small.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4).double() / 255
    doubled = F.interpolate(patches, scale_factor=2, mode="bilinear")
    before = patches.flatten(1) @ source["patch_embed.proj.weight"].double().flatten(1).T
    after = doubled.flatten(1) @ result.weights["patch_embed.proj.weight"].double().flatten(1).T
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(result.weights["pos_embed"], source["pos_embed"])


def test_the_tanh_layer_is_kept_dropped_or_drawn() -> None:
    with_it, without = model(representation_size=6), model()
    source, result = hand_off(with_it, without)
    rows = {row.name: row for row in result.report}
    assert rows["pre_logits.weight"] == Row("pre_logits.weight", "dropped", "the head is one linear map")
    assert rows["head.weight"] == Row("head.weight", "zeroed", "a tanh layer of 6 -> no tanh layer")
    source, result = hand_off(with_it, model(representation_size=6, num_classes=9, head_bias=-6.9))
    assert torch.equal(result.weights["pre_logits.weight"], source["pre_logits.weight"])
    assert torch.equal(result.weights["head.bias"], torch.full((9,), -6.9))
    assert Row("head.bias", "reset", "5 -> 9 classes; all -6.9") in result.report
    _, result = hand_off(without, with_it)
    drawn = initial_value("pre_logits.weight", (6, 16), with_it, SEED)
    assert torch.equal(result.weights["pre_logits.weight"], drawn)
    with pytest.raises(CheckpointError, match=r"init\.head: keep, but model\.representation_size"):
        hand_off(with_it, without, head="keep")


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
        "map needs weights that a source with token lacks; possible: token, avg, norm_avg",
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
