"""A look into a model: everything that the figures draw, and the numbers behind them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.errors import CheckpointError
from pretrain.figures import numbers
from pretrain.figures.attention import Heard
from pretrain.model import learned_table, sincos_2d, table_shapes

FILTERS = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Look:
    """similarity [N, N] of position embeddings, none where the kind has no table; components [k, C, P, P] of the patch
    filters in [0, 1] with the shares [k] of the variance they explain; of the images [B, H, W, C] that were shown, if
    any: distance [L, h] in pixels, rollout [B, R, C]."""

    model: ModelConfig
    similarity: Tensor | None
    components: Tensor
    shares: Tensor
    images: Tensor | None
    distance: Tensor | None
    rollout: Tensor | None

    def metrics(self) -> dict[str, float]:
        """The numbers behind the figures, as MLflow gets them; without means over no pair at all."""
        found: dict[str, float] = {}
        if self.similarity is not None:
            near = numbers.neighbours(self.similarity, self.model.grid)
            found |= {
                f"figures/pe_similarity/{name}": value
                for name, value in near._asdict().items()
                if value == value
            }
        if self.distance is not None:
            digits = len(str(len(self.distance) - 1))
            for layer, heads in enumerate(self.distance):
                found[f"figures/attention_distance/layer_{layer:0{digits}}"] = float(heads.mean())
        return found


def needed_weights(config: ModelConfig) -> tuple[str, ...]:
    """Names of the weights that `look` reads."""
    return (FILTERS, *(_owner(config) + name for name in table_shapes(config)))


def look(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    images: Tensor | None = None,
    heard: Heard | None = None,
) -> Look:
    """weights: those of `needed_weights`, fp32; images and heard: what was shown to the model, and what it attended to.

    Raises `CheckpointError` where a weight is not finite.
    """
    if odd := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"there is nothing to draw: {', '.join(odd)} has values that are not finite")
    table = _patch_table(config, weights)
    components, shares = numbers.principal_components(weights[FILTERS])
    distance = None if heard is None else torch.stack([heard.distance[i] for i in sorted(heard.distance)])
    return Look(
        model=config,
        similarity=None if table is None else numbers.similarity(table),
        components=components,
        shares=shares,
        images=images,
        distance=distance,
        rollout=None if heard is None else heard.rollout,
    )


def _patch_table(config: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor | None:
    """The rows that are added to the patches [N, D], before block 0 or in it; none where nothing is added."""
    if config.pos_embed.startswith("sincos"):
        return sincos_2d(config, torch.device("cpu"))[0]
    if not config.has_position_table:
        return None
    owner = _owner(config)
    table = learned_table(partial(_read, weights, owner), config)
    return table[0, -config.num_patches :]


def _read(weights: Mapping[str, Tensor], owner: str, name: str) -> Tensor:
    return weights[owner + name]


def _owner(config: ModelConfig) -> str:
    """Of tables in every layer the first one is shown."""
    return "blocks.0." if config.pos_embed_at == "every_layer" else ""
