"""The same function said otherwise: what has to be done to a model before a library can hold it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.config import InitConfig, ModelConfig
from pretrain.formats.files import per_channel
from pretrain.transfer import transfer

Model = tuple[Mapping[str, Tensor], ModelConfig]
"""Weights by our names, and the config that they are weights of."""


def as_table(weights: Mapping[str, Tensor], model: ModelConfig, **changes: Any) -> Model:
    """Positions written out as one row for each token (or patch), and `changes` that leave the function as it is: the
    order of prefix tokens and positions, LayerScale folded away.

    The positions are none, or of a kind that is added to tokens at the stem.
    """
    weights, model = _zero_table(weights, model) if model.pos_embed == "none" else (weights, model)
    order = model.pos_embed_order if model.has_position_table else "pe_then_cls"
    said = model.model_copy(update={"pos_embed": "learned_1d", "pos_embed_order": order, **changes})
    if said == model:
        return weights, model
    return transfer(weights, model, said, InitConfig(source="the model itself"), seed=0).weights, said


def _zero_table(weights: Mapping[str, Tensor], model: ModelConfig) -> Model:
    """No positions, as a table of zeros."""
    said = model.model_copy(update={"pos_embed": "learned_1d", "pos_embed_order": "pe_then_cls"})
    return {**weights, "pos_embed": torch.zeros(1, model.num_patches, model.width)}, said


def renormalised(
    weights: Mapping[str, Tensor], model: ModelConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> Model:
    """The model for pixels that were normalised otherwise: (p - mean) / std is folded into the patch filters.

    With x = (p - m) / s now and y = (p - mean) / std afterwards, x = y std / s + (mean - m) / s in each channel, so
    filters are scaled by std / s, and what the rest gives in a whole patch joins the bias. In float64; exact but for
    rounding.
    """
    said = model.model_copy(update={"mean": mean, "std": std})
    if per_channel(said) == per_channel(model):
        return weights, model
    before, now = (
        [torch.tensor(values, dtype=torch.float64) for values in per_channel(each)] for each in (model, said)
    )
    filters = weights["patch_embed.proj.weight"].double()  # [D, C, P, P]
    scale, shift = now[1] / before[1], (now[0] - before[0]) / before[1]
    bias = weights["patch_embed.proj.bias"].double() + filters.sum((2, 3)) @ shift
    folded = {
        "patch_embed.proj.weight": (filters * scale[:, None, None]).float(),
        "patch_embed.proj.bias": bias.float(),
    }
    return {**weights, **folded}, said
