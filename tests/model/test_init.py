"""First weights are a pure function of seed and name, with the paper's distributions."""

import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.model import InitialWeights, VisionTransformer, build, initial_value, parameter_shapes

CONFIG = ModelConfig(
    embed_dim=96,
    depth=2,
    num_heads=3,
    mlp_dim=384,
    img_size=(16, 16),
    patch_size=(4, 4),
    num_classes=5,
    global_pool="map",
)


def test_names_and_shapes_are_the_module_s() -> None:
    expected = {name: tuple(value.shape) for name, value in VisionTransformer(CONFIG).state_dict().items()}
    assert parameter_shapes(CONFIG) == expected
    assert {name: tuple(value.shape) for name, value in InitialWeights(CONFIG, 0).items()} == expected


def test_a_value_depends_on_seed_and_name_and_on_nothing_else() -> None:
    weights = InitialWeights(CONFIG, 1)
    name = "blocks.1.mlp.fc1.weight"
    before = weights[name]
    torch.manual_seed(99)
    assert torch.equal(weights[name], before)
    assert torch.equal(initial_value(name, (384, 96), CONFIG, 1), before)
    assert not torch.equal(initial_value(name, (384, 96), CONFIG, 2), before)
    assert not torch.equal(weights["blocks.0.mlp.fc1.weight"], before)
    assert before.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.0.attn.qkv.weight", (288, 96), [0.11216174, 0.07727498, -0.04712663]),
        ("patch_embed.proj.weight", (96, 3, 4, 4), [-0.06629365, 0.19233900, 0.14876689]),
        ("pos_embed", (1, 17, 96), [-0.02405527, 0.00755704, -0.02043980]),
    ],
)
def test_values_are_pinned(name: str, shape: tuple[int, ...], expected: list[float]) -> None:
    """A repeated run starts from these numbers: a change here changes every run."""
    value = initial_value(name, shape, CONFIG, 0).flatten()[:3]
    torch.testing.assert_close(value, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("pos_embed", (1, 17, 96), 0.02),
        ("patch_embed.proj.weight", (96, 3, 4, 4), 48**-0.5),
        ("blocks.0.attn.qkv.weight", (288, 96), (2 / 192) ** 0.5),
        ("attn_pool.kv.weight", (192, 96), (2 / 192) ** 0.5),
        ("attn_pool.q.weight", (96, 96), (2 / 192) ** 0.5),
        ("blocks.0.attn.proj.weight", (96, 96), (2 / 192) ** 0.5),
        ("blocks.0.mlp.fc1.weight", (384, 96), (2 / 480) ** 0.5),
        ("attn_pool.mlp.fc2.weight", (96, 384), (2 / 480) ** 0.5),
        ("attn_pool.latent", (1, 1, 96), (2 / 97) ** 0.5),
    ],
)
def test_spread_is_that_of_the_paper_s_code(name: str, shape: tuple[int, ...], std: float) -> None:
    value = initial_value(name, shape, CONFIG, 0)
    sampling_error = 4 / value.numel() ** 0.5
    assert value.std().item() == pytest.approx(std, rel=max(0.03, sampling_error / 2))
    assert abs(value.mean().item()) < std * sampling_error


def test_norms_are_one_and_biases_tokens_and_head_are_zero() -> None:
    for name, value in InitialWeights(CONFIG.model_copy(update={"global_pool": "token"}), 0).items():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("bias") or name == "cls_token" or name.startswith("head."):
            assert not value.any(), name
        else:
            assert value.any(), name


def test_new_parameters_start_as_documented() -> None:
    more = {
        "layer_scale": 1e-4,
        "qk_norm": True,
        "num_registers": 4,
        "act": "swiglu",
        "representation_size": 64,
        "head_bias": -6.9,
        "pos_embed": "relative",
        "pos_embed_at": "every_layer_shared",
    }
    config = CONFIG.model_copy(update=more)
    weights = dict(InitialWeights(config, 0))
    assert set(weights["blocks.0.ls1.gamma"].tolist()) == {torch.tensor(1e-4).item()}
    assert torch.equal(weights["blocks.1.attn.k_norm.weight"], torch.ones(32))
    assert torch.equal(weights["head.bias"], torch.full((5,), -6.9))
    assert not weights["head.weight"].any()
    assert weights["reg_token"].std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.allclose(weights["reg_token"][0, 0], weights["reg_token"][0, 1])
    assert weights["rel_pos"].std().item() == pytest.approx(1.0, rel=0.1)
    assert weights["pre_logits.weight"].std().item() == pytest.approx(96**-0.5, rel=0.05)
    gate, value = weights["blocks.0.mlp.fc1.weight"].split(384)
    for half in (gate, value):  # each is drawn as the map it is, not as one of twice the fan
        assert half.std().item() == pytest.approx((2 / 480) ** 0.5, rel=0.03)
    two = InitialWeights(CONFIG.model_copy(update={"pos_embed": "learned_2d"}), 0)
    assert {name: two[name].std().item() for name in ("pos_embed_x", "pos_embed_y")} == pytest.approx(
        {"pos_embed_x": 0.02, "pos_embed_y": 0.02}, rel=0.2
    )


def test_an_offset_s_embedding_is_as_large_as_a_content_s_key() -> None:
    config = CONFIG.model_copy(update={"pos_embed": "relative", "pos_embed_at": "every_layer_shared"})
    weights = InitialWeights(config, 0)
    token = torch.nn.functional.layer_norm(
        torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), (96,)
    )
    key = token @ weights["blocks.0.attn.qkv.weight"][96:192].T
    assert weights["rel_pos"].std().item() == pytest.approx(key.std().item(), rel=0.1)


def test_build_refuses_weights_that_are_not_the_model_s() -> None:
    weights = dict(InitialWeights(CONFIG, 0))
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        build(CONFIG, {name: value for name, value in weights.items() if name != "head.bias"})
    with pytest.raises(RuntimeError, match="stranger"):
        build(CONFIG, weights | {"stranger": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(CONFIG, weights | {"head.bias": torch.zeros(6)})


def test_build_copies_the_weights() -> None:
    weights = dict(InitialWeights(CONFIG, 0))
    model = build(CONFIG, weights)
    with torch.no_grad():
        model.head.bias += 1
    assert not weights["head.bias"].any()
    assert all(p.requires_grad for p in model.parameters())
