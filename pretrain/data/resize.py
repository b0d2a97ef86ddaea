"""Antialiased resizing and mirroring of uint8 pixels, straight into the memory that the result is for.

torch's own kernels of `interpolate(antialias=True)` do it: their filters widen with the scale like Pillow's, and they
release the GIL. `docs/loading.md` says what they were measured against.
"""

import torch

from pretrain.data.box import Pixels

_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


def resize(pixels: Pixels, out: Pixels, interpolation: str) -> None:
    """All of `pixels` [h, w, C] at the size of `out` [H, W, C], written there. interpolation: bilinear or bicubic."""
    if pixels.shape == out.shape:
        out[...] = pixels
    else:
        _KERNELS[interpolation](_planes(pixels), list(out.shape[:2]), False, out=_planes(out))


def mirror(pixels: Pixels) -> None:
    """Swap left and right in place."""
    planes = _planes(pixels)
    planes.copy_(planes.flip(3))


def _planes(pixels: Pixels) -> torch.Tensor:
    """The same memory as torch's kernels see it: [1, C, H, W], the channels innermost."""
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
