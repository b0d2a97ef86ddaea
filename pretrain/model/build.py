"""A model with its weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.vit import VisionTransformer


def build(
    config: ModelConfig, weights: Mapping[str, Tensor], *, checkpoint_every_blocks: int = 0
) -> VisionTransformer:
    """A model on the host that owns a copy of `weights`, in their dtype; every name must be there, and no other.

    Raises RuntimeError, torch's own, where names or shapes differ. Not inside `zero.Init`.
    """
    with torch.device("meta"):
        model = VisionTransformer(config, checkpoint_every_blocks)
    model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    return model
