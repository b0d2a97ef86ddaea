"""The Vision Transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1, in timm's names.

    B  images          H, W  pixels            C  channels         P  patch size (may differ by axis)
    N  patches         P     prefix tokens: cls, registers           T     P + N tokens      D  width of a token
    h  attention heads d     D / h              M  width of the MLP  K  classes

A state dict of this module loads into timm's `VisionTransformer` of the same settings, and back, where timm has them.
Positions are in `position`; docs/model.md says where each setting comes from.

Every parameter is read only in the `forward` of the module that owns it, every block runs for every sample, and no
number is drawn inside: ZeRO stage 3 gathers and frees weights around `forward`, on all ranks together.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ModelConfig
from pretrain.model.dropout import PLACES, dropout
from pretrain.model.patch import PatchEmbed
from pretrain.model.position import (
    add_table,
    learned_table,
    register_tables,
    relative_logits,
    rotate,
    rotation,
    sincos_2d,
)


class Attention(nn.Module):
    """Multi-head self-attention (appendix A)."""

    listener: Callable[[Tensor, Tensor, Tensor | None], None] | None
    """Is given queries and keys [B, h, T, d] of each pass, and what joins their logits; see `pretrain.figures`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.listener = None  # the module's own: one of the class would be compiled anew once it has been set
        head_norm = partial(nn.LayerNorm, config.width // config.heads, config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.q_norm = head_norm() if config.qk_norm else nn.Identity()
        self.k_norm = head_norm() if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, position: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D].

        position  `rotation`'s [2, T, d] for rope_2d, the table [2N - 1, d] for relative, else none
        key       int32 [B, 2] of the dropout, or none
        """
        config = self.config
        q, k, v = by_head(self.qkv(x), 3, config.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None
        if position is not None and config.pos_embed == "rope_2d":
            q, k = rotate(q, position), rotate(k, position)
        elif position is not None:
            bias = relative_logits(q, position)
        if self.listener is not None:
            self.listener(q, k, bias)
        x = F.scaled_dot_product_attention(q, k, v, bias)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return dropout(x, key, config.dropout_rate)


def by_head(x: Tensor, num_maps: int, num_heads: int) -> tuple[Tensor, ...]:
    """What several linear maps gave side by side, cut into maps and heads: [B, T, maps * D] -> each [B, h, T, d].

    Cut along an axis in the middle, so that their gradients are put together in the layout of x, without a copy.
    """
    maps = torch.unflatten(x, -1, (num_maps, num_heads, -1)).unbind(2)  # each [B, T, h, d]
    return tuple(part.transpose(1, 2) for part in maps)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "elu": F.elu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """Two layers with a GELU (section 3.1) or another activation; swiglu: SiLU(a) * b of one layer's two halves a, b
    (Shazeer 2020, arXiv 2002.05202), which timm calls SwiGLUPacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.width, config.mlp_width * (2 if config.act == "swiglu" else 1))
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D]; keys: int32 [B, 2, 2] of the dropout after the activation and at the end, or none."""
        inner, outer = (None, None) if keys is None else keys.unbind(1)
        x = self._activate(self.fc1(x))
        x = self.fc2(dropout(x, inner, self.config.dropout_rate))
        return dropout(x, outer, self.config.dropout_rate)

    def _activate(self, x: Tensor) -> Tensor:
        if self.config.act == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        return _ACTIVATIONS[self.config.act](x)


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma


class Block(nn.Module):
    """Equations 2 and 3, with stochastic depth (Huang et al. 2016, arXiv 1603.09382) per sample and branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        if config.pos_embed_at == "every_layer":
            register_tables(self, config)
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config.width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config.width) if config.layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        position: Tensor | None = None,
        keep: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        position  what all blocks share: a table of `learned_table`, or a rotation; none where there is none
        keep      [B, 2]  factors of the attention branch and of the MLP branch
        keys      int32 [B, 3, 2]  of the dropout: in the attention branch, then two in the MLP branch
        """
        if self.config.pos_embed_at == "every_layer":
            position = learned_table(partial(getattr, self), self.config)
        if position is not None and self.config.has_position_table:
            x, position = add_table(x, position), None
        of_attn, of_mlp = (None, None) if keys is None else (keys[:, 0], keys[:, 1:])
        attn_factor, mlp_factor = (
            (None, None) if keep is None else keep.to(x.dtype)[:, :, None, None].unbind(1)
        )
        x = _add_branch(x, self.ls1(self.attn(self.norm1(x), position, of_attn)), attn_factor)
        x = _add_branch(x, self.ls2(self.mlp(self.norm2(x), of_mlp)), mlp_factor)
        return x


def _add_branch(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    return x + branch if factor is None else x + factor * branch


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
        (q,) = by_head(self.q(self.latent.expand(x.shape[0], -1, -1)), 1, self.num_heads)  # [B, h, 1, d]
        k, v = by_head(self.kv(x), 2, self.num_heads)  # each [B, h, T, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, h, 1, d]
        x = self.proj(x.flatten(1))
        x = x + self.mlp(self.norm(x))
        return x


class VisionTransformer(nn.Module):
    """Images to logits. `build` makes one with given weights; the bare constructor leaves placeholders in them.

    config: sizes and variants. checkpoint_every_blocks: block i is recomputed in the backward pass where
    i is a multiple of this; 0: none is.
    """

    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None

    def __init__(self, config: ModelConfig, checkpoint_every_blocks: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every_blocks = checkpoint_every_blocks
        width, pool, registers = config.width, config.global_pool, config.num_registers
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.has_cls_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        if config.pos_embed_at != "every_layer":
            register_tables(self, config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        # timm's names: the mean of the patches is normalised after pooling, the rest before.
        self.norm = nn.Identity() if pool == "avg" else nn.LayerNorm(width, config.norm_eps)
        self.attn_pool = AttentionPool(config) if pool == "map" else None
        self.fc_norm = nn.LayerNorm(width, config.norm_eps) if pool == "avg" else nn.Identity()
        hidden = config.representation_size
        self.pre_logits = nn.Linear(width, hidden) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or width, config.num_classes)

    def forward(
        self,
        images: Tensor,
        drop_path_keep: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        own_share: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, K], in the dtype of the weights.

        images          uint8   [B, H, W, C]
        drop_path_keep  float32 [B, depth, 2]          from `keep_factors`; none: no stochastic depth
        dropout_keys    int32   [B, 1 + 3 * depth, 2]  from `dropout_keys`; none: no dropout
        own_share       float32 [B, H, W]              mixes normalised images 2i and 2i + 1: what each pixel keeps of
                                                       its own, in [0, 1], the rest is its partner's; none: no mixing
        """
        return self.forward_head(self.forward_features(images, drop_path_keep, dropout_keys, own_share))

    def forward_features(
        self,
        images: Tensor,
        drop_path_keep: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        own_share: Tensor | None = None,
    ) -> Tensor:
        """uint8 [B, H, W, C] -> tokens [B, T, D] after the last block, and after `norm` unless the pool is avg."""
        self._check(images)
        patches = self.patch_embed(images, own_share)
        x: Tensor = self._with_prefix(patches.to(self.patch_embed.proj.weight.dtype))
        if self.config.pos_embed_at == "stem" and self.config.has_position_table:
            x = add_table(x, learned_table(partial(getattr, self), self.config))
        elif self.config.pos_embed.startswith("sincos"):
            x = add_table(x, sincos_2d(self.config, x.device).to(x.dtype))
        if dropout_keys is not None:
            x = dropout(x, dropout_keys[:, 0], self.config.dropout_rate)
        position = self._shared_position(x.device)
        for i, block in enumerate(self.blocks):
            keep = None if drop_path_keep is None else drop_path_keep[:, i]
            first = 1 + PLACES * i
            keys = None if dropout_keys is None else dropout_keys[:, first : first + PLACES]
            if self._recomputes(i):
                # Nothing is drawn in a block, so there is no generator state to keep for the second pass.
                x = checkpoint(block, x, position, keep, keys, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, position, keep, keys)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, T, D] -> logits [B, K], or with `pre_logits` the vector that the head sees: [B, D], or behind the
        tanh layer [B, representation_size]."""
        if self.config.has_cls_token:
            x = x[:, 0]
        else:
            patches = x[:, self.config.num_prefix_tokens :]
            x = patches.mean(1) if self.attn_pool is None else self.attn_pool(patches)
        x = self.fc_norm(x)
        if self.config.representation_size:
            x = torch.tanh(self.pre_logits(x))
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def compile_blocks(self) -> None:
        """Let torch.compile fuse each block's small operations. All blocks share one compilation, so that it takes as
        long for 48 of them as for one; names and weights stay as they are."""
        for block in self.blocks:
            block.compile(dynamic=False)

    def _with_prefix(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, T, D]: cls token, registers, patches."""
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not prefix:
            return patches
        return torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)

    def _shared_position(self, device: torch.device) -> Tensor | None:
        """What every block is told of positions."""
        if self.config.pos_embed == "rope_2d":
            return rotation(self.config, device)
        if self.config.pos_embed_at == "every_layer_shared":
            return learned_table(partial(getattr, self), self.config)
        return None

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
