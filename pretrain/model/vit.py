"""The Vision Transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1, in timm's names.

    B  images          H, W  pixels            C  channels         P  patch size (may differ by axis)
    N  patches         T     tokens: N, or N + 1 with a cls token   D  width of a token
    h  attention heads d     D / h              M  width of the MLP  K  classes

A state dict of this module loads into timm's `VisionTransformer` of the same settings, and back.

Every parameter is read only in the `forward` of the module that owns it, every block runs for every sample, and no
number is drawn inside: ZeRO stage 3 gathers and frees weights around `forward`, on all ranks together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.model.position import add_learned_1d


class PatchProjection(nn.Module):
    """E of equation 1: a linear map of flattened patches. Its weight has the shape of timm's convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.width, config.in_chans, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, patches: Tensor) -> Tensor:
        """float32 [B, N, C*P*P] -> [B, N, D] in the dtype of the weight."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """The model's door: decoded pixels in, one token per patch out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = PatchProjection(config)

    def forward(self, images: Tensor, own_share: Tensor | None = None) -> Tensor:
        """uint8 [B, H, W, C] -> [B, N, D]; `own_share` as in `VisionTransformer.forward`."""
        patches = self.normalize(self.patchify(images))
        if own_share is not None:
            others = patches.reshape(-1, 2, *patches.shape[1:]).flip(1).reshape(patches.shape)
            share = self.patchify(own_share[..., None]).repeat(1, 1, self.config.in_chans)  # [B, N, C*P*P]
            patches = torch.lerp(others, patches, share)
        tokens: Tensor = self.proj(patches)
        return tokens

    def patchify(self, images: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, N, C*P*P] of the same dtype, patches by rows, each in the order of the weight."""
        (rows, columns), (height, width) = self.config.grid, self.config.patch_size
        x = images.reshape(-1, rows, height, columns, width, images.shape[-1])
        return x.permute(0, 1, 3, 5, 2, 4).reshape(len(images), rows * columns, -1)

    def normalize(self, patches: Tensor) -> Tensor:
        """(x / 255 - mean) / std per channel: uint8 [B, N, C*P*P] -> float32 of that shape.

        The constants are made here, on the device: as buffers they would be rounded by `module.bfloat16()`.
        """
        config = self.config
        channels = range(config.in_chans)
        mean, std = ([v[c % len(v)] for c in channels] for v in (config.mean, config.std))
        area = config.patch_size[0] * config.patch_size[1]
        ones = torch.ones(area, dtype=torch.float32, device=patches.device)
        scale = torch.cat([ones * (1 / (255 * std[c])) for c in channels])
        shift = torch.cat([ones * (-mean[c] / std[c]) for c in channels])
        return torch.addcmul(shift, patches.float(), scale)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, h, T, d]
        x = F.scaled_dot_product_attention(q, k, v)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return x


class Mlp(nn.Module):
    """Two layers with a GELU (section 3.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.act = nn.GELU("tanh" if config.act == "gelu_tanh" else "none")
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.fc2(self.act(self.fc1(x)))
        return x


class Block(nn.Module):
    """Equations 2 and 3, with stochastic depth (Huang et al. 2016, arXiv 1603.09382) per sample and branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `keep` [B, 2]: factors of the attention branch and of the MLP branch."""
        if keep is None:
            x = x + self.attn(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
            return x
        keep = keep.to(x.dtype)[:, :, None, None]  # [B, 2, 1, 1]
        x = x + keep[:, 0] * self.attn(self.norm1(x))
        x = x + keep[:, 1] * self.mlp(self.norm2(x))
        return x


class AttentionPool(nn.Module):
    """Multi-head attention pooling: one learned query over all tokens (Zhai et al. 2021, arXiv 2106.04560)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        q = self.q(self.latent.expand(len(x), -1, -1)).unflatten(-1, (self.num_heads, -1))  # [B, 1, h, d]
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, -1))  # [B, T, 2, h, d]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, h, T, d]
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k, v)  # [B, h, 1, d]
        x = self.proj(x.flatten(1))
        x = x + self.mlp(self.norm(x))
        return x


class VisionTransformer(nn.Module):
    """Images to logits. `build` makes one with given weights; the bare constructor leaves placeholders in them.

    config: sizes and variants. checkpoint_every_blocks: block i is recomputed in the backward pass where
    i is a multiple of this; 0: none is.
    """

    cls_token: nn.Parameter | None

    def __init__(self, config: ModelConfig, checkpoint_every_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every_blocks = checkpoint_every_blocks
        width, pool = config.width, config.global_pool
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "token" else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_pos_prefix + config.num_patches, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        # timm's names: the mean of the patches is normalised after pooling, the rest before.
        self.norm = nn.Identity() if pool == "avg" else nn.LayerNorm(width, config.norm_eps)
        self.attn_pool = AttentionPool(config) if pool == "map" else None
        self.fc_norm = nn.LayerNorm(width, config.norm_eps) if pool == "avg" else nn.Identity()
        self.head = nn.Linear(width, config.num_classes)

    def forward(
        self, images: Tensor, drop_path_keep: Tensor | None = None, own_share: Tensor | None = None
    ) -> Tensor:
        """Logits [B, K], in the dtype of the weights.

        images          uint8   [B, H, W, C]
        drop_path_keep  float32 [B, depth, 2]  from `keep_factors`; none: no stochastic depth
        own_share       float32 [B, H, W]      mixes normalised images 2i and 2i + 1: what each pixel keeps of its own,
                                               in [0, 1], the rest is its partner's; none: nothing is mixed
        """
        return self.forward_head(self.forward_features(images, drop_path_keep, own_share))

    def forward_features(
        self, images: Tensor, drop_path_keep: Tensor | None = None, own_share: Tensor | None = None
    ) -> Tensor:
        """uint8 [B, H, W, C] -> tokens [B, T, D] after the last block, and after `norm` unless the pool is avg."""
        self._check(images)
        patches = self.patch_embed(images, own_share)
        x: Tensor = add_learned_1d(patches, self.cls_token, self.pos_embed, self.config.pos_embed_order)
        for i, block in enumerate(self.blocks):
            keep = None if drop_path_keep is None else drop_path_keep[:, i]
            if self._recomputes(i):
                # Nothing is drawn in a block, so there is no generator state to keep for the second pass.
                x = checkpoint(block, x, keep, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, keep)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, T, D] -> logits [B, K], or with `pre_logits` the vector [B, D] that the head sees."""
        if self.attn_pool is not None:
            x = self.attn_pool(x)
        else:
            x = x[:, 0] if self.config.global_pool == "token" else x.mean(1)
        x = self.fc_norm(x)
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def _recomputes(self, block: int) -> bool:
        every = self.checkpoint_every_blocks
        return every > 0 and block % every == 0 and torch.is_grad_enabled()

    def _check(self, images: Tensor) -> None:
        expected = (*self.config.img_size, self.config.in_chans)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; the model takes torch.uint8 [B, H, W, C] "
                f"with (H, W, C) = {expected}"
            )
