"""The Vision Transformer: the network, its first weights, its position embeddings, its size in numbers."""

from pretrain.model.build import build
from pretrain.model.count import forward_flops, num_parameters
from pretrain.model.drop_path import drop_path_rates, keep_factors
from pretrain.model.dropout import dropout_keys
from pretrain.model.init import InitialWeights, LazyWeights, initial_value, parameter_shapes
from pretrain.model.position import learned_table, sincos_2d, table_shapes
from pretrain.model.resize import resize_axis, resize_patch_filters, resize_pos_embed, resize_relative
from pretrain.model.vit import VisionTransformer

__all__ = [
    "InitialWeights",
    "LazyWeights",
    "VisionTransformer",
    "build",
    "drop_path_rates",
    "dropout_keys",
    "forward_flops",
    "initial_value",
    "keep_factors",
    "learned_table",
    "num_parameters",
    "parameter_shapes",
    "resize_axis",
    "resize_patch_filters",
    "resize_pos_embed",
    "resize_relative",
    "sincos_2d",
    "table_shapes",
]
