"""Sizes as arithmetic on a config; nothing is allocated."""

from pretrain.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Trained numbers of the model."""
    D, M = config.width, config.mlp_width
    area = config.patch_size[0] * config.patch_size[1]
    norm, mlp = 2 * D, 2 * D * M + M + D
    total = (config.in_chans * area + 1) * D  # patch_embed
    total += config.num_prefix_tokens * D  # cls_token
    total += (config.num_pos_prefix + config.num_patches) * D  # pos_embed
    total += config.num_blocks * (2 * norm + _linear(D, 3 * D) + _linear(D, D) + mlp)
    total += norm  # norm or fc_norm
    if config.global_pool == "map":
        total += D + 2 * _linear(D, D) + _linear(D, 2 * D) + norm + mlp
    return total + _linear(D, config.num_classes)


def forward_flops(config: ModelConfig) -> int:
    """Floating-point operations of one forward pass for one image, a multiply-add counted as two.

    Matrix products only, as in the usual model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B): with T tokens of width D, N patches of C*P*P pixels, and an MLP of width M

        2 N C P^2 D  +  depth * (8 T D^2 + 4 T^2 D + 4 T D M)  +  2 D K

    and for attention pooling another 4 D^2 + 4 T D^2 + 4 T D + 4 D M. A training step costs three times this;
    recomputation of activations does not count.
    """
    D, M = config.width, config.mlp_width
    N, T = config.num_patches, config.num_patches + config.num_prefix_tokens
    pixels = config.in_chans * config.patch_size[0] * config.patch_size[1]
    block = 8 * T * D * D + 4 * T * T * D + 4 * T * D * M
    total = 2 * N * pixels * D + config.num_blocks * block + 2 * D * config.num_classes
    if config.global_pool == "map":
        total += 4 * D * D + 4 * T * D * D + 4 * T * D + 4 * D * M
    return total


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
