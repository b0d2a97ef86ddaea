"""Listening to the attention of a forward pass, which the fused kernel keeps to itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.figures import numbers
from pretrain.model import VisionTransformer
from pretrain.model.vit import Attention


class Heard:
    """What was heard of a forward pass. distance: [h] in pixels by layer; `rollout` after the last layer."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.distance: dict[int, Tensor] = {}
        self._mixed: Tensor | None = None

    def add(self, layer: int, weights: Tensor) -> None:
        """Attention weights [B, h, T, T] of a layer; layers come in their order. They are not kept."""
        config = self._config
        far = numbers.attention_distance(weights, config.grid, config.patch_size, config.num_prefix_tokens)
        self.distance[layer] = far.cpu()
        self._mixed = numbers.rolled(self._mixed, weights)

    @property
    def rollout(self) -> Tensor:
        """Where the head's input comes from: [B, R, C]."""
        assert self._mixed is not None, "no forward pass was heard"
        config = self._config
        return numbers.seen_by_the_head(
            self._mixed.cpu(), config.grid, config.num_prefix_tokens, config.has_cls_token
        )


@contextmanager
def attention_of(model: VisionTransformer) -> Iterator[Heard]:
    """Hear the attention of one forward pass of `model` inside the block, compiled or not. Under ZeRO stage 3 all ranks
    do this together, as they run the pass."""
    heard = Heard(model.config)
    layers = [module for module in model.blocks.modules() if isinstance(module, Attention)]
    for number, layer in enumerate(layers):
        layer.listener = partial(heard.add, number)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield heard
    finally:
        for layer in layers:
            layer.listener = None
