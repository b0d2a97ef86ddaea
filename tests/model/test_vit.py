"""The network against timm's, the paper's sizes, and itself under recomputation."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vits import (
    EVERYTHING,
    KINDS_AND_ORDERS,
    ORDERS,
    POOLS,
    as_timm_input,
    random_images,
    random_weights,
    timm_model,
    tiny,
)

from pretrain.config import ModelConfig
from pretrain.model import (
    InitialWeights,
    VisionTransformer,
    build,
    dropout_keys,
    forward_flops,
    keep_factors,
    num_parameters,
    parameter_shapes,
)

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "gelu_tanh": {"act": "gelu_tanh"},
    "registers": {"num_registers": 2},
    "layer_scale, qk_norm": {"layer_scale": 0.1, "qk_norm": True},
    "no positions": {"pos_embed": "none"},
    "all at once": {"num_registers": 3, "layer_scale": 0.1, "qk_norm": True, "act": "swiglu"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pool", POOLS)
def test_features_and_logits_equal_timm(pool: str, order: str, variant: dict[str, object]) -> None:
    if pool == "map" and variant.get("act") == "swiglu":
        variant = variant | {"act": "silu"}  # timm gates the blocks' MLPs alone
    config = tiny(global_pool=pool, pos_embed_order=order, **variant)
    weights, images = random_weights(config), random_images(config)
    ours, timm = build(config, weights), timm_model(config)
    timm.load_state_dict(weights, strict=True)
    with torch.no_grad():
        features = ours.forward_features(images)
        torch.testing.assert_close(
            features, timm.forward_features(as_timm_input(images, config)), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            ours.forward_head(features, pre_logits=True), timm.forward_head(features, pre_logits=True)
        )
        logits = ours(images)
        torch.testing.assert_close(logits, timm(as_timm_input(images, config)), atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("act", ["relu", "elu", "silu", "swiglu"])
def test_every_activation_equals_timm(act: str) -> None:
    config = tiny(act=act)
    weights, images = random_weights(config), random_images(config)
    timm = timm_model(config)
    timm.load_state_dict(weights, strict=True)
    with torch.no_grad():
        expected = timm(as_timm_input(images, config))
        torch.testing.assert_close(build(config, weights)(images), expected, atol=1e-5, rtol=1e-5)


def test_the_tanh_layer_stands_between_the_pooled_vector_and_the_head() -> None:
    config, plain = tiny(representation_size=20), tiny()
    weights, images = random_weights(config), random_images(config)
    rest = {name: value for name, value in weights.items() if not name.startswith(("pre_logits", "head"))}
    body = build(plain, rest | {"head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)})
    with torch.no_grad():
        pooled = body.forward_head(body.forward_features(images), pre_logits=True)
        hidden = torch.tanh(pooled @ weights["pre_logits.weight"].T + weights["pre_logits.bias"])
        expected = hidden @ weights["head.weight"].T + weights["head.bias"]
        model = build(config, weights)
        torch.testing.assert_close(model(images), expected)
        features = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), hidden)


def test_one_channel_equals_timm() -> None:
    config = tiny(in_chans=1, mean=(0.3,), std=(0.2,))
    weights, images = random_weights(config), random_images(config)
    timm = timm_model(config)
    timm.load_state_dict(weights, strict=True)
    with torch.no_grad():
        expected = timm(as_timm_input(images, config))
        torch.testing.assert_close(build(config, weights)(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ("Ti", 16, 5_717_416),
        ("S", 16, 22_050_664),
        ("S", 32, 22_878_952),
        ("B", 16, 86_567_656),
        ("B", 32, 88_224_232),
        ("L", 16, 304_326_632),
        ("L", 32, 306_535_400),
        ("L", 14, 304_203_752),
        ("H", 14, 632_045_800),
        ("g", 14, 1_012_611_432),
        ("G", 14, 1_844_440_680),
        ("So400m", 14, 413_597_656),
    ],
)
def test_parameter_counts_are_the_published_ones(size: str, patch: int, expected: int) -> None:
    config = ModelConfig(size=size, img_size=(224, 224), patch_size=(patch, patch), num_classes=1000)
    assert num_parameters(config) == expected
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == expected


def test_the_published_recipe_of_big_vision_has_its_size() -> None:
    config = ModelConfig(
        size="S", img_size=(224, 224), patch_size=(16, 16), num_classes=1000, global_pool="avg",
        pos_embed="sincos_2d_big_vision", representation_size=384,
    )  # fmt: skip
    assert num_parameters(config) == 22_122_472


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("kind", KINDS_AND_ORDERS)
@pytest.mark.parametrize("pool", POOLS)
def test_counts_equal_the_module(pool: str, kind: dict[str, str], more: dict[str, object]) -> None:
    config = tiny(global_pool=pool, **kind, **more)
    model = build(config, InitialWeights(config, 0)).requires_grad_(False)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    # torch counts no attention kernel of the CPU's; as plain matrix products it does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(random_images(config, 2))
    assert 2 * forward_flops(config) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS_AND_ORDERS)
def test_recomputation_changes_neither_output_nor_gradient(kind: dict[str, str]) -> None:
    config = tiny(drop_path_rate=0.4, dropout_rate=0.3, depth=4, **kind)
    weights, images = random_weights(config), random_images(config, 8)
    keep = keep_factors(3, torch.arange(8), (0.0, 0.2, 0.4, 0.6))
    keys = dropout_keys(3, torch.arange(8), 4)
    results = []
    for every in (0, 1, 3):
        model = build(config, weights, checkpoint_every_blocks=every)
        calls = count_calls(model)
        logits = model(images, keep, keys)
        logits.logsumexp(1).sum().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
        assert calls == [2 if every and i % every == 0 else 1 for i in range(4)]
    for logits, gradients in results[1:]:
        assert torch.equal(logits, results[0][0])
        for got, expected in zip(gradients, results[0][1], strict=True):
            assert torch.equal(got, expected)


def count_calls(model: VisionTransformer) -> list[int]:
    calls = [0] * len(model.blocks)
    for i, block in enumerate(model.blocks):

        def count(*_: object, i: int = i) -> None:
            calls[i] += 1

        block.register_forward_pre_hook(count)
    return calls


def test_a_dropped_block_is_the_identity_for_its_sample_alone() -> None:
    config = tiny(depth=1)
    model, images = build(config, random_weights(config)), random_images(config, 3)
    keep = torch.ones(3, 1, 2)
    keep[1] = 0
    with torch.no_grad():
        plain, dropped = (model.forward_features(images, k) for k in (None, keep))
        model.blocks = torch.nn.ModuleList()
        without = model.forward_features(images)
    assert torch.equal(dropped[[0, 2]], plain[[0, 2]])
    assert torch.equal(dropped[1], without[1])
    assert not torch.allclose(plain[1], without[1])


def test_each_branch_is_scaled_by_its_own_factor() -> None:
    config = tiny(depth=1)
    model, images = build(config, random_weights(config)), random_images(config, 2)
    block = model.blocks[0]
    x = torch.randn(2, 16, 48)
    keep = torch.tensor([[0.0, 2.0], [3.0, 0.5]])
    y = x + keep[:, :1, None] * block.attn(block.norm1(x))
    y = y + keep[:, 1:, None] * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x, keep=keep), y)
    assert model(images, keep[:, None]).shape == (2, 7)


def test_bfloat16_does_not_round_the_normalisation() -> None:
    config = tiny()
    model = build(config, random_weights(config))
    images = random_images(config)
    expected = model.patch_embed.normalize(model.patch_embed.patchify(images))
    model = model.bfloat16()
    got = model.patch_embed.normalize(model.patch_embed.patchify(images))
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    assert model(images).dtype == torch.bfloat16
    assert set(dict(model.named_buffers())) == set()


def test_autocast_keeps_weights_in_float32_and_agrees() -> None:
    config = tiny()
    model, images = build(config, random_weights(config)), random_images(config)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(images)
    torch.testing.assert_close(got.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 12, 10, 3),
        torch.zeros(2, 10, 12, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 12, 10, dtype=torch.uint8),
        torch.zeros(2, 12, 10, 1, dtype=torch.uint8),
    ],
    ids=["float", "transposed", "channels first", "grey"],
)
def test_images_of_another_kind_are_refused(images: torch.Tensor) -> None:
    config = tiny()
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, C\] with \(H, W, C\) = \(12, 10, 3\)"):
        build(config, random_weights(config))(images)
