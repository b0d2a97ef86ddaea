"""A folder that timm loads by `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import ExportError
from pretrain.export.files import Preprocess, Provenance, per_channel

_ARCHITECTURE = "vit_base_patch16_224"
"""timm builds from a registered name; `model_args` overrides each of its defaults, so any plain ViT's would do."""

_NORM_EPS = 1e-6


def describe(model: ModelConfig, preprocess: Preprocess, provenance: Provenance) -> dict[str, Any]:
    if model.norm_eps != _NORM_EPS:
        raise ExportError(
            f"a timm folder cannot say model.norm_eps {model.norm_eps:g}: timm's plain ViT has {_NORM_EPS:g}; "
            "use --format safetensors"
        )
    mean, std = per_channel(model)
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": model.num_classes,
        "num_features": model.width,
        "model_args": {
            "img_size": list(model.img_size),
            "patch_size": list(model.patch_size),
            "in_chans": model.in_chans,
            "num_classes": model.num_classes,
            "embed_dim": model.width,
            "depth": model.num_blocks,
            "num_heads": model.heads,
            "mlp_ratio": _mlp_ratio(model),
            "class_token": model.num_prefix_tokens == 1,
            "no_embed_class": model.pos_embed_order == "pe_then_cls",
            "global_pool": model.global_pool,
            "fc_norm": model.global_pool == "avg",
            "act_layer": model.act,
        },
        "pretrained_cfg": {
            "input_size": [model.in_chans, *model.img_size],
            "fixed_input_size": True,
            "crop_pct": preprocess.crop,
            "crop_mode": "center",
            "interpolation": preprocess.interpolation,
            "mean": mean,
            "std": std,
            "num_classes": model.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        Provenance.KEY: provenance.as_dict(),
    }


def logits(folder: Path, images: Tensor) -> Tensor:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError:
        raise ExportError(
            "timm is not installed, so its folder cannot be proven: pip install 'timm>=1.0.31', or --no-verify"
        ) from None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = resolve_model_data_config(model)
    mean, std = torch.tensor(data["mean"]), torch.tensor(data["std"])
    with torch.no_grad():
        answer: Tensor = model(((images.float() / 255 - mean) / std).permute(0, 3, 1, 2))
    return answer


def _mlp_ratio(model: ModelConfig) -> float:
    """A ratio from which timm's int(embed_dim * ratio) finds mlp_dim; the quotient may round to one too few."""
    ratio = model.mlp_width / model.width
    return ratio if int(model.width * ratio) == model.mlp_width else (model.mlp_width + 0.5) / model.width
