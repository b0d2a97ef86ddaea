"""A folder that timm loads by `timm.create_model("local-dir:FOLDER", pretrained=True)`. Our names are timm's own."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import ExportError
from pretrain.formats.adapt import as_table
from pretrain.formats.files import CONFIG, WEIGHTS, About, per_channel

HOW_TO_LOAD = "timm.create_model('local-dir:{folder}', pretrained=True)"

_ARCHITECTURE = "vit_base_patch16_224"
_GATED_ARCHITECTURE = "vit_giant_patch14_reg4_dinov2"
"""timm builds from a registered name; `model_args` overrides each of its defaults but the class of the MLP, so any
plain ViT's would do, and any with a gated MLP."""

_NORM_EPS = 1e-6


def inexpressible(model: ModelConfig) -> Iterator[str]:
    if model.norm_eps != _NORM_EPS:
        yield f"model.norm_eps {model.norm_eps:g}: a folder cannot say it, and timm's own is {_NORM_EPS:g}"
    if model.pos_embed in ("relative", "rope_2d"):
        yield f"model.pos_embed {model.pos_embed}: there are only positions that are added to tokens"
    elif model.pos_embed_at != "stem":
        yield f"model.pos_embed_at {model.pos_embed_at}: positions are added at the stem alone"
    if model.representation_size is not None:
        yield f"model.representation_size {model.representation_size}: the head is one linear map"
    if model.act == "swiglu" and model.global_pool == "map":
        yield "model.act swiglu with model.global_pool map: the pool's own MLP is not gated"


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """timm's one position embedding is a row for each token."""
    return (weights, model) if model.pos_embed == "none" else as_table(weights, model)


def write(folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, about: About) -> None:
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(describe(model, about)))


def describe(model: ModelConfig, about: About) -> dict[str, Any]:
    """timm's config.json."""
    mean, std = per_channel(model)
    names = {"label_names": list(about.class_names)} if about.class_names else {}
    return {
        "architecture": _GATED_ARCHITECTURE if model.act == "swiglu" else _ARCHITECTURE,
        "num_classes": model.num_classes,
        "num_features": model.width,
        **names,
        "model_args": settings(model),
        "pretrained_cfg": {
            "input_size": [model.in_chans, *model.img_size],
            "fixed_input_size": True,
            "crop_pct": about.preprocess.crop,
            "crop_mode": "center",
            "interpolation": about.preprocess.interpolation,
            "mean": mean,
            "std": std,
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def settings(model: ModelConfig) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer`, but for the class of a gated MLP."""
    gated = model.act == "swiglu"
    return {
        "img_size": list(model.img_size),
        "patch_size": list(model.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "embed_dim": model.width,
        "depth": model.num_blocks,
        "num_heads": model.heads,
        "mlp_ratio": _mlp_ratio(model),
        "class_token": model.has_cls_token,
        "reg_tokens": model.num_registers,
        "pos_embed": "none" if model.pos_embed == "none" else "learn",
        "no_embed_class": model.pos_embed_order == "pe_then_cls",
        "global_pool": "avg" if model.global_pool == "norm_avg" else model.global_pool,
        "fc_norm": model.global_pool == "avg",
        "act_layer": "silu" if gated else model.act,
        "qk_norm": model.qk_norm,
        "init_values": model.layer_scale,
    }


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    timm = library()
    from timm.data import resolve_model_data_config

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = resolve_model_data_config(model)
    return lambda images: run(model, images, data["mean"], data["std"])


def run(
    net: Callable[[Tensor], Tensor], images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What a network of timm's or of transformers' answers to uint8 images [B, H, W, C]."""
    pixels = (images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        return net(pixels.permute(0, 3, 1, 2))


def library() -> Any:
    try:
        import timm
    except ImportError:
        raise ExportError(
            "timm is not installed, so what it makes of this cannot be proven: pip install 'timm>=1.0.31', "
            "or --no-verify"
        ) from None
    return timm


def _mlp_ratio(model: ModelConfig) -> float:
    """A ratio from which timm's int(embed_dim * ratio) finds the rows of fc1; the quotient may round to one too few."""
    rows = model.mlp_width * (2 if model.act == "swiglu" else 1)
    ratio = rows / model.width
    return ratio if int(model.width * ratio) == rows else (rows + 0.5) / model.width
