"""The Vision Transformers of other libraries, behind our names: uint8 images in, logits out, our first weights.

Each is built as its users build it and normalises a uint8 batch as they do: to float, minus mean, by std, channels
first. `named_parameters` speaks our names, so that all contenders have the same groups in the same optimizer.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import click
import torch
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.model import InitialWeights

NEEDS = "timm and transformers are the peers of this benchmark: pip install -e '.[test]'"


class Peer(nn.Module):
    """A peer's model. ours: our name of each of its parameters."""

    def __init__(self, model: nn.Module, config: ModelConfig, ours: Mapping[str, str]) -> None:
        super().__init__()
        self.model = model
        self.ours = ours
        self.mean, self.std = config.mean[0] * 255, config.std[0] * 255

    def forward(self, images: Tensor) -> Tensor:
        answer: Any = self.model(images.permute(0, 3, 1, 2).float().sub_(self.mean).div_(self.std))
        logits: Tensor = getattr(answer, "logits", answer)
        return logits

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters(*args, **kwargs):
            yield self.ours[name], parameter


def timm(config: ModelConfig) -> Peer:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise click.ClickException(NEEDS) from None
    model = VisionTransformer(
        img_size=config.img_size, patch_size=config.patch_size, in_chans=config.in_chans,
        num_classes=config.num_classes, embed_dim=config.width, depth=config.num_blocks, num_heads=config.heads,
        mlp_ratio=config.mlp_width / config.width,
    )  # fmt: skip
    model.load_state_dict(dict(InitialWeights(config, 0)))
    return Peer(model, config, {name: name for name, _ in model.named_parameters()})


def transformers(config: ModelConfig) -> Peer:
    """`ViTForImageClassification`, with the attention that it chooses itself (SDPA)."""
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError:
        raise click.ClickException(NEEDS) from None
    model = ViTForImageClassification(
        ViTConfig(
            image_size=list(config.img_size), patch_size=list(config.patch_size), num_channels=config.in_chans,
            num_labels=config.num_classes, hidden_size=config.width, num_hidden_layers=config.num_blocks,
            num_attention_heads=config.heads, intermediate_size=config.mlp_width, layer_norm_eps=config.norm_eps,
            hidden_act="gelu",
        )
    )  # fmt: skip
    ours = {name: _our_name(name) for name, _ in model.named_parameters()}
    weights = InitialWeights(config, 0)
    model.load_state_dict({name: _weight(weights, our) for name, our in ours.items()})
    return Peer(model, config, ours)


_PREFIXES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "classifier": "head",
}
_IN_A_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _our_name(name: str) -> str:
    """Our name of a parameter of transformers; a third of qkv is called q, k or v."""
    if name.startswith("vit.layers."):
        number, _, rest = name.removeprefix("vit.layers.").partition(".")
        module, _, leaf = rest.rpartition(".")
        return f"blocks.{number}.{_IN_A_BLOCK[module]}.{leaf}"
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    return _PREFIXES[prefix] + name.removeprefix(prefix)


def _weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    if module.endswith((".q", ".k", ".v")):
        third = "qkv".index(module[-1])
        return torch.chunk(weights[f"{module[:-1]}qkv.{leaf}"], 3)[third]
    return weights[name]
