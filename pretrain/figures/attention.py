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

    def add(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """Queries and keys [B, h, T, d] of a layer and what joins their logits, or none; layers come in their order.

        Image by image: at a high resolution the weights of all of them would not fit beside what training keeps.
        """
        config = self._config
        far: list[Tensor] = []
        mixed: list[Tensor] = []
        for one in (slice(image, image + 1) for image in range(len(q))):
            weights = attention_weights(q[one], k[one], None if bias is None else bias[one])
            far.append(
                numbers.attention_distance(weights, config.grid, config.patch_size, config.num_prefix_tokens)
            )
            mixed.append(numbers.rolled(None if self._mixed is None else self._mixed[one], weights))
        self.distance[layer] = torch.stack(far).mean(0).cpu()
        self._mixed = torch.cat(mixed)

    @property
    def rollout(self) -> Tensor:
        """Where the head's input comes from: [B, R, C]."""
        assert self._mixed is not None, "no forward pass was heard"
        config = self._config
        return numbers.seen_by_the_head(
            self._mixed.cpu(), config.grid, config.num_prefix_tokens, config.has_cls_token
        )


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """What the fused kernel multiplies the values by: [B, h, T, d] twice -> float32 [B, h, T, T], rows of sum 1."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        return torch.softmax(logits if bias is None else logits + bias.float(), dim=-1)


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
