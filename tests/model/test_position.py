"""Each kind of position embedding against another implementation, or the paper's words spelt out in loops."""

import math

import numpy as np
import pytest
import torch
from timm.layers import AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from torch import Tensor, nn
from transformers.models.wav2vec2_bert.configuration_wav2vec2_bert import Wav2Vec2BertConfig
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention
from vits import KINDS_AND_ORDERS, as_timm_input, random_images, random_weights, timm_model, tiny

from pretrain.config import OptimConfig
from pretrain.model import InitialWeights, build, parameter_shapes
from pretrain.model.position import learned_table, relative_logits, rotate, rotation, sincos_2d
from pretrain.model.vit import Attention, VisionTransformer
from pretrain.optim import build_optimizer, parameter_groups

CPU = torch.device("cpu")


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(images)
    return answer


@pytest.mark.parametrize("kind", KINDS_AND_ORDERS)
def test_patches_are_told_apart_by_their_place_unless_the_kind_is_none(kind: dict[str, str]) -> None:
    config = tiny(global_pool="avg", **kind)
    model, images = build(config, random_weights(config)), random_images(config)
    swapped = images.clone()
    swapped[:, :4, :2], swapped[:, 4:8, 4:6] = images[:, 4:8, 4:6], images[:, :4, :2]
    same = torch.allclose(logits(model, images), logits(model, swapped), atol=1e-4)
    assert same == (kind["pos_embed"] == "none")


@pytest.mark.parametrize("at", ["stem", "every_layer", "every_layer_shared"])
@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
def test_learned_2d_is_learned_1d_with_x_and_y_side_by_side(at: str, order: str) -> None:
    two = tiny(pos_embed="learned_2d", pos_embed_at=at, pos_embed_order=order, num_registers=1)
    one = two.model_copy(update={"pos_embed": "learned_1d"})
    weights = random_weights(two)
    written_out = {name: value for name, value in weights.items() if "pos_embed" not in name}
    for owner in [f"blocks.{i}." for i in range(3)] if at == "every_layer" else [""]:
        x, y = weights[f"{owner}pos_embed_x"], weights[f"{owner}pos_embed_y"]
        assert (x.shape, y.shape) == ((1, 5, 24), (1, 3, 24))
        rows = [torch.cat([x[0, column], y[0, row]]) for row in range(3) for column in range(5)]
        prefix = list(weights.get(f"{owner}pos_embed_prefix", torch.zeros(1, 0, 48))[0])
        written_out[f"{owner}pos_embed"] = torch.stack(prefix + rows)[None]
    images = random_images(two)
    assert torch.equal(logits(build(two, weights), images), logits(build(one, written_out), images))


@pytest.mark.parametrize("order", ["cls_then_pe", "pe_then_cls"])
def test_every_layer_adds_at_the_beginning_of_each_block(order: str) -> None:
    config = tiny(pos_embed_at="every_layer", pos_embed_order=order)
    weights, images = random_weights(config), random_images(config)
    timm = timm_model(config)
    first = {"pos_embed": weights.pop("blocks.0.pos_embed")}
    later = [weights.pop(f"blocks.{i}.pos_embed") for i in (1, 2)]
    timm.load_state_dict(weights | first, strict=True)
    for block, table in zip(list(timm.blocks)[1:], later, strict=True):
        padded = torch.cat([torch.zeros(1, 16 - table.shape[1], 48), table], dim=1)
        block.register_forward_pre_hook(lambda _, args, padded=padded: (args[0] + padded, *args[1:]))
    expected = logits(timm, as_timm_input(images, config))
    got = logits(build(config, random_weights(config)), images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_shared_is_every_layer_with_equal_tables() -> None:
    for kind, names in (("learned_1d", ["pos_embed"]), ("relative", ["rel_pos"])):
        shared = tiny(pos_embed=kind, pos_embed_at="every_layer_shared")
        each = tiny(pos_embed=kind, pos_embed_at="every_layer")
        weights, images = random_weights(shared), random_images(shared)
        copied = {
            n: weights[n.rpartition(".")[2] if n.endswith(tuple(names)) else n]
            for n in parameter_shapes(each)
        }
        assert torch.equal(logits(build(shared, weights), images), logits(build(each, copied), images))


def test_relative_logits_are_those_of_the_paper_s_words() -> None:
    """D.4: every pair of patches has an offset p_q - p_k, whose embedding is a key for the content's query."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 2 + 6, 4, generator=generator)
    table = torch.randn(11, 4, generator=generator)
    got = relative_logits(q, table)
    assert got.shape == (2, 3, 8, 8)
    for i in range(6):
        for j in range(6):
            expected = (q[:, :, 2 + i] * table[i - j + 5]).sum(-1) / math.sqrt(4)
            torch.testing.assert_close(got[:, :, 2 + i, 2 + j], expected)
    assert not got[:, :, :2].any()
    assert not got[..., :2].any()


def test_one_patch_has_one_offset() -> None:
    q, table = torch.randn(2, 3, 2, 4), torch.randn(1, 4)
    expected = (q[:, :, 1] * table[0]).sum(-1) / 2
    torch.testing.assert_close(relative_logits(q, table)[:, :, 1, 1], expected)


def test_relative_attention_equals_the_one_of_transformers() -> None:
    """Its `relative_key` (Shaw et al. 2018) is the same; its offsets count the other way round."""
    config = tiny(pos_embed="relative", pos_embed_at="every_layer", global_pool="avg")
    ours, rel_pos = Attention(config), torch.randn(29, 16)
    theirs = Wav2Vec2BertSelfAttention(
        Wav2Vec2BertConfig(
            hidden_size=48, num_attention_heads=3, attention_dropout=0.0,
            left_max_position_embeddings=14, right_max_position_embeddings=14,
        )
    )  # fmt: skip
    with torch.no_grad():
        for part, name in zip(range(3), ("linear_q", "linear_k", "linear_v"), strict=True):
            getattr(theirs, name).weight.copy_(ours.qkv.weight[48 * part : 48 * (part + 1)])
            getattr(theirs, name).bias.copy_(ours.qkv.bias[48 * part : 48 * (part + 1)])
        theirs.linear_out.load_state_dict(ours.proj.state_dict())
        theirs.distance_embedding.weight.copy_(rel_pos.flip(0))
        x = torch.randn(2, 15, 48)
        torch.testing.assert_close(ours(x, rel_pos), theirs(x)[0], atol=1e-5, rtol=1e-5)


def test_relative_logits_and_their_gradients_equal_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 1 + 6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 7, 7, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((relative_logits(q, table) * weight).sum(), (q, table))
    looped = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            logit = (q[:, :, 1 + i] * table[i - j + 5]).sum(-1) / 2
            looped = looped + (logit * weight[:, :, 1 + i, 1 + j]).sum()
    torch.testing.assert_close(got, torch.autograd.grad(looped, (q, table)))


def rows_of_patches(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of eight grey patches in a row but for a bright and a dark one; the class says which of them comes first."""
    images = torch.full((count, 4, 8, 4, 1), 128, dtype=torch.uint8)
    bright, dark = torch.rand(count, 8, generator=generator).argsort(1)[:, :2].unbind(1)
    images[torch.arange(count), :, bright] = 255
    images[torch.arange(count), :, dark] = 0
    return images.flatten(2, 3), (bright < dark).long()


def test_which_of_two_patches_comes_first_is_learnt_by_relative_and_never_by_none() -> None:
    right = {}
    for kind, at in (("relative", "every_layer"), ("none", "stem")):
        config = tiny(
            embed_dim=32, num_heads=2, mlp_dim=64, depth=2, img_size=(4, 32), patch_size=(4, 4), in_chans=1,
            num_classes=2, mean=(0.5,), std=(0.5,), global_pool="avg", pos_embed=kind, pos_embed_at=at,
        )  # fmt: skip
        model, optim = build(config, InitialWeights(config, 0)), OptimConfig(lr=3e-3)
        groups = parameter_groups(model.named_parameters(), optim, config.num_blocks)
        optimizer, generator = build_optimizer(groups, optim), torch.Generator().manual_seed(0)
        for _ in range(150):
            images, labels = rows_of_patches(64, generator)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        images, labels = rows_of_patches(256, generator)
        right[kind] = (logits(model, images).argmax(1) == labels).float().mean().item()
    assert right["relative"] > 0.95
    assert right["none"] < 0.65


def mae_table(dim: int, rows: int, columns: int) -> np.ndarray:
    """facebookresearch/mae, util/pos_embed.py, written again from its description: width first, sin before cos."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    grid_w, grid_h = np.meshgrid(np.arange(columns), np.arange(rows))
    halves = []
    for coordinate in (grid_w, grid_h):
        out = np.outer(coordinate.reshape(-1), omega)
        halves.append(np.concatenate([np.sin(out), np.cos(out)], axis=1))
    return np.concatenate(halves, axis=1)


def big_vision_table(dim: int, rows: int, columns: int) -> np.ndarray:
    """google-research/big_vision, posemb_sincos_2d, written again: the last frequency is 1 / 10000 exactly."""
    y, x = np.mgrid[:rows, :columns]
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim // 4 - 1))
    y, x = np.outer(y.flatten(), omega), np.outer(x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def test_the_two_sincos_tables_are_those_of_mae_and_of_big_vision() -> None:
    tables = {}
    for kind, peer in (("sincos_2d_mae", mae_table), ("sincos_2d_big_vision", big_vision_table)):
        table = sincos_2d(tiny(pos_embed=kind), CPU)
        assert table.dtype == torch.float32
        assert table.shape == (1, 15, 48)
        np.testing.assert_allclose(table[0].numpy(), peer(48, 3, 5), atol=1e-6)
        tables[kind] = table
    assert (tables["sincos_2d_mae"] - tables["sincos_2d_big_vision"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["sincos_2d_mae", "sincos_2d_big_vision"])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_sincos_equals_timm_with_that_table(kind: str, pool: str) -> None:
    config = tiny(pos_embed=kind, global_pool=pool)
    weights, images = random_weights(config), random_images(config)
    learned = config.model_copy(update={"pos_embed": "learned_1d", "pos_embed_order": "pe_then_cls"})
    timm = timm_model(learned)
    timm.load_state_dict(weights | {"pos_embed": sincos_2d(config, CPU)}, strict=True)
    got, expected = logits(build(config, weights), images), logits(timm, as_timm_input(images, config))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reference", [None, (7, 7)])
@pytest.mark.parametrize("prefix", [0, 3])
def test_rotation_equals_timm(reference: tuple[int, int] | None, prefix: int) -> None:
    config = tiny(pos_embed="rope_2d", rope_reference_grid=reference, global_pool="avg", num_registers=prefix)
    peer = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 5], ref_feat_shape=reference)
    q = torch.randn(2, 3, prefix + 15, 16, generator=torch.Generator().manual_seed(0))
    got = rotate(q, rotation(config, CPU))
    assert torch.equal(got[:, :, :prefix], q[:, :, :prefix])
    torch.testing.assert_close(got[:, :, prefix:], apply_rot_embed_cat(q[:, :, prefix:], peer.get_embed()))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_attention_equals_timm(qk_norm: bool) -> None:
    config = tiny(pos_embed="rope_2d", qk_norm=qk_norm, num_registers=2)
    ours = Attention(config)
    peer = AttentionRope(
        48, 3, num_prefix_tokens=3, qk_norm=qk_norm, norm_layer=lambda d, **_: nn.LayerNorm(d, 1e-6)
    )
    if qk_norm:
        for norm in (ours.q_norm, ours.k_norm):
            nn.init.normal_(norm.weight)
    peer.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 18, 48)
    rope = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 5]).get_embed()
    with torch.no_grad():
        got, expected = ours(x, rotation(config, CPU)), peer.eval()(x, rope=rope)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_rotary_attention_sees_depends_on_the_distance_alone() -> None:
    config = tiny(pos_embed="rope_2d", global_pool="avg")
    q, k = torch.randn(2, 16).double()
    cos_sin = rotation(config, CPU).double()
    turned_q, turned_k = (rotate(x.expand(1, 1, 15, 16), cos_sin)[0, 0] for x in (q, k))
    scores = (turned_q @ turned_k.T).reshape(3, 5, 3, 5)
    torch.testing.assert_close(scores[0, 1, 1, 3], scores[1, 0, 2, 2], atol=1e-6, rtol=0)
    assert abs(scores[0, 1, 1, 3] - scores[0, 1, 1, 2]) > 1e-3


@pytest.mark.parametrize("kind", KINDS_AND_ORDERS)
def test_bfloat16_and_autocast_agree_with_float32(kind: dict[str, str]) -> None:
    config = tiny(num_registers=1, **kind)
    weights = {name: value / 3 for name, value in random_weights(config).items()}
    model, images = build(config, weights), random_images(config)
    expected = logits(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, images)
        assert model.forward_features(images).dtype == torch.float32
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)
    low = logits(model.bfloat16(), images)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", KINDS_AND_ORDERS)
def test_each_table_is_owned_by_the_module_that_reads_it_and_learns(kind: dict[str, str]) -> None:
    config = tiny(
        **kind, global_pool="avg"
    )  # a cls token would be all that the last block's answer depends on
    model = build(config, random_weights(config))
    model(random_images(config)).logsumexp(1).sum().backward()
    names = {name for name, _ in model.named_parameters() if "pos" in name}
    prefixes = {name.rpartition("pos_embed" if "pos_embed" in name else "rel_pos")[0] for name in names}
    at = kind.get("pos_embed_at", "stem")
    learned = kind["pos_embed"] in ("learned_1d", "learned_2d", "relative")
    assert prefixes == (
        {f"blocks.{i}." for i in range(3)} if at == "every_layer" else {""} if learned else set()
    )
    assert all(model.get_parameter(name).grad.any() for name in names)


def test_a_table_is_read_by_name() -> None:
    config = tiny(pos_embed="learned_2d")
    model = VisionTransformer(config)
    assert learned_table(model.get_parameter, config).shape == (1, 16, 48)
