"""Small models for every test that needs one, random weights and images for them, and timm's model of the same settings."""

import torch
from timm.layers import Mlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmViT

from pretrain.config import ModelConfig
from pretrain.model import parameter_shapes

POOLS = ("token", "avg", "norm_avg", "map")
ORDERS = ("cls_then_pe", "pe_then_cls")
KINDS: list[dict[str, str]] = [
    {"pos_embed": "none"},
    *(
        {"pos_embed": kind, "pos_embed_at": at}
        for kind in ("learned_1d", "learned_2d")
        for at in ("stem", "every_layer", "every_layer_shared")
    ),
    {"pos_embed": "relative", "pos_embed_at": "every_layer"},
    {"pos_embed": "relative", "pos_embed_at": "every_layer_shared"},
    {"pos_embed": "sincos_2d_mae"},
    {"pos_embed": "sincos_2d_big_vision"},
    {"pos_embed": "rope_2d"},
]
"""The eight cells of the paper's table 8, and the kinds that came later."""
KINDS_AND_ORDERS = [
    kind | order
    for kind in KINDS
    for order in (
        [{"pos_embed_order": o} for o in ORDERS] if kind["pos_embed"].startswith("learned") else [{}]
    )
]
EVERYTHING: dict[str, object] = {
    "num_registers": 2,
    "layer_scale": 0.1,
    "qk_norm": True,
    "act": "swiglu",
    "representation_size": 20,
}
"""Switches that are off by default, on."""


def tiny(**changes: object) -> ModelConfig:
    """Odd on every axis that code may take for another: 3 x 5 patches of 4 x 2 pixels, an MLP of no round ratio."""
    settings = {
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "mlp_dim": 100,
        "img_size": (12, 10),
        "patch_size": (4, 2),
        "num_classes": 7,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    return ModelConfig.model_validate(settings | changes)


def random_weights(config: ModelConfig, std: float = 0.3) -> dict[str, torch.Tensor]:
    """Weights under which every parameter matters to the logits: no zero head, no unit norm."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * std
        for name, shape in parameter_shapes(config).items()
    }


def random_images(config: ModelConfig, count: int = 3) -> torch.Tensor:
    shape = (count, *config.img_size, config.in_chans)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def as_timm_input(images: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


def timm_model(config: ModelConfig) -> TimmViT:
    gated = config.act == "swiglu"
    return TimmViT(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        embed_dim=config.width,
        depth=config.num_blocks,
        num_heads=config.heads,
        mlp_ratio=config.mlp_width * (2 if gated else 1) / config.width,
        class_token=config.global_pool == "token",
        no_embed_class=config.pos_embed_order == "pe_then_cls",
        global_pool="avg" if config.global_pool == "norm_avg" else config.global_pool,
        fc_norm=config.global_pool == "avg",
        reg_tokens=config.num_registers,
        pos_embed="none" if config.pos_embed == "none" else "learn",
        qk_norm=config.qk_norm,
        init_values=config.layer_scale,
        act_layer="silu" if gated else config.act,
        mlp_layer=SwiGLUPacked if gated else Mlp,
    ).eval()
