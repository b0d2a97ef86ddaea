"""Sizes as arithmetic on a config; nothing is allocated."""

import math

from pretrain.config import ModelConfig
from pretrain.model.position import table_shapes


def num_parameters(config: ModelConfig) -> int:
    """Trained numbers of the model."""
    D, M = config.width, config.mlp_width
    area = config.patch_size[0] * config.patch_size[1]
    norm, mlp = 2 * D, _linear(D, 2 * M if config.act == "swiglu" else M) + _linear(M, D)
    block = 2 * norm + _linear(D, 3 * D) + _linear(D, D) + mlp
    block += 4 * (D // config.heads) if config.qk_norm else 0  # q_norm, k_norm
    block += 2 * D if config.layer_scale else 0  # ls1, ls2
    table = sum(math.prod(shape) for shape in table_shapes(config).values())
    total = (config.in_chans * area + 1) * D  # patch_embed
    total += config.num_prefix_tokens * D  # cls_token, reg_token
    total += table * (config.num_blocks if config.pos_embed_at == "every_layer" else 1)
    total += config.num_blocks * block
    total += norm  # norm or fc_norm
    if config.global_pool == "map":
        total += D + 2 * _linear(D, D) + _linear(D, 2 * D) + norm + mlp
    if config.representation_size:
        return (
            total
            + _linear(D, config.representation_size)
            + _linear(config.representation_size, config.num_classes)
        )
    return total + _linear(D, config.num_classes)


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of one forward pass for one image, a multiply-add counted as two.

    Matrix products only, as in the usual model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B): with T tokens of width D, N patches of C*P*P pixels, and an MLP of width M

        2 N C P^2 D  +  depth * (8 T D^2 + 4 T^2 D + 4 T D M)  +  2 D K

    with 6 T D M for swiglu, 2 N (2N - 1) D more in each block for relative positions, 2 D R + 2 R K in the place of
    2 D K for a tanh layer of width R, and for attention pooling another 4 D^2 + 4 N D^2 + 4 N D + 4 D M (swiglu: 6).
    A training step costs three times this; recomputation of activations does not count.
    """
    D, M = config.width, config.mlp_width
    N, T = config.num_patches, config.num_tokens
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    mlp = (6 if config.act == "swiglu" else 4) * D * M
    block = 8 * T * D * D + 4 * T * T * D + T * mlp
    if config.pos_embed == "relative":
        block += 2 * N * (2 * N - 1) * D
    total = 2 * N * pixels * D + config.num_blocks * block
    if config.global_pool == "map":
        total += 4 * D * D + 4 * N * D * D + 4 * N * D + mlp
    if config.representation_size:
        return total + 2 * config.representation_size * (D + config.num_classes)
    return total + 2 * D * config.num_classes


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
