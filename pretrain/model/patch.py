"""The model's door: decoded pixels in, one token per patch out. Shapes are named as in `vit`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig


class PatchProjection(nn.Module):
    """E of equation 1: a linear map of flattened patches. Its weight has the shape of timm's convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.width, config.in_chans, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.width))

    def forward(self, patches: Tensor) -> Tensor:
        """float32 [B, N, P*P*C] -> [B, N, D] in the dtype of the weight, which is small and so the one to be reordered."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P*P*C]
        return F.linear(patches.to(self.weight.dtype), weight, self.bias)


class PatchEmbed(nn.Module):
    """Pixels to patches, normalised on the device, projected by one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = PatchProjection(config)

    def forward(self, images: Tensor, own_share: Tensor | None = None) -> Tensor:
        """uint8 [B, H, W, C] -> [B, N, D]; `own_share` as in `VisionTransformer.forward`."""
        patches = self.normalize(self.patchify(images))
        if own_share is not None:
            others = patches.reshape(-1, 2, *patches.shape[1:]).flip(1).reshape(patches.shape)
            share = self.patchify(own_share[..., None]).repeat_interleave(self.config.in_chans, dim=-1)
            patches = torch.lerp(others, patches, share)
        tokens: Tensor = self.proj(patches)
        return tokens

    def patchify(self, images: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, N, P*P*C] of the same dtype, patches by rows, each in the order of its pixels."""
        (rows, columns), (height, width) = self.config.grid, self.config.patch_size
        x = images.reshape(-1, rows, height, columns, width, images.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(images.shape[0], rows * columns, -1)

    def normalize(self, patches: Tensor) -> Tensor:
        """(x / 255 - mean) / std per channel: uint8 [B, N, P*P*C] -> float32 of that shape.

        The constants are made here, on the device: as buffers they would be rounded by `module.bfloat16()`.
        """
        config = self.config
        channels = range(config.in_chans)
        mean, std = ([v[c % len(v)] for c in channels] for v in (config.mean, config.std))
        area = config.patch_size[0] * config.patch_size[1]
        one = torch.ones(
            1, dtype=torch.float32, device=patches.device
        )  # filled there: a copy from the host waits
        scale = torch.cat([one * (1 / (255 * std[c])) for c in channels]).repeat(area)
        shift = torch.cat([one * (-mean[c] / std[c]) for c in channels]).repeat(area)
        return torch.addcmul(shift, patches.float(), scale)
