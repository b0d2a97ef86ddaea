"""A folder that timm loads by `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.errors import ExportError
from pretrain.export.files import Preprocess, Provenance, per_channel
from pretrain.transfer import transfer

_ARCHITECTURE = "vit_base_patch16_224"
_GATED_ARCHITECTURE = "vit_giant_patch14_reg4_dinov2"
"""timm builds from a registered name; `model_args` overrides each of its defaults but the class of the MLP, so any
plain ViT's would do, and any with a gated MLP."""

_NORM_EPS = 1e-6


def adapt(weights: Mapping[str, Tensor], model: ModelConfig) -> tuple[Mapping[str, Tensor], ModelConfig]:
    """The same function as timm can say it: timm's one position embedding is a row for each token.

    Raises `ExportError` with all that timm cannot express.
    """
    if reasons := list(_inexpressible(model)):
        raise ExportError(
            "timm's plain ViT cannot express this model; use --format safetensors:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    if model.pos_embed in ("none", "learned_1d"):
        return weights, model
    order = model.pos_embed_order if model.has_position_table else "pe_then_cls"
    written_out = model.model_copy(update={"pos_embed": "learned_1d", "pos_embed_order": order})
    init = InitConfig(source="the model itself")
    return transfer(weights, model, written_out, init, seed=0).weights, written_out


def _inexpressible(model: ModelConfig) -> Iterator[str]:
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


def describe(model: ModelConfig, preprocess: Preprocess, provenance: Provenance) -> dict[str, Any]:
    gated = model.act == "swiglu"
    mean, std = per_channel(model)
    return {
        "architecture": _GATED_ARCHITECTURE if gated else _ARCHITECTURE,
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
            "class_token": model.has_cls_token,
            "reg_tokens": model.num_registers,
            "pos_embed": "none" if model.pos_embed == "none" else "learn",
            "no_embed_class": model.pos_embed_order == "pe_then_cls",
            "global_pool": model.global_pool,
            "fc_norm": model.global_pool == "avg",
            "act_layer": "silu" if gated else model.act,
            "qk_norm": model.qk_norm,
            "init_values": model.layer_scale,
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
    """A ratio from which timm's int(embed_dim * ratio) finds the rows of fc1; the quotient may round to one too few."""
    rows = model.mlp_width * (2 if model.act == "swiglu" else 1)
    ratio = rows / model.width
    return ratio if int(model.width * ratio) == rows else (rows + 0.5) / model.width
