"""A position table moved to another grid: "2D interpolation of the pre-trained position embeddings" (section 3.2).

Four conventions are in use and they differ by far more than rounding, so each has a name:

    bicubic_antialias   timm, open_clip     half-pixel centres, a = -0.5, low-pass when shrinking
    bicubic             DeiT, MAE, EVA, HF  half-pixel centres, a = -0.75
    bilinear            FlexiViT, enlarging half-pixel centres
    align_corners       the paper's code, big_vision: scipy.ndimage.zoom(order=1); corners map to corners
                        (scipy's own last row or column is 0 at sizes where its coordinate rounds past the edge,
                        such as 32 -> 16; ours is the edge)
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ResizeKernel

Grid = tuple[int, int]


class _Kernel(NamedTuple):
    mode: Literal["bicubic", "bilinear"]
    align_corners: bool = False
    antialias: bool = False


_KERNELS: dict[ResizeKernel, _Kernel] = {
    "bicubic_antialias": _Kernel("bicubic", antialias=True),
    "bicubic": _Kernel("bicubic"),
    "bilinear": _Kernel("bilinear"),
    "align_corners": _Kernel("bilinear", align_corners=True),
}


def resize_pos_embed(
    table: Tensor, old_grid: Grid, new_grid: Grid, num_prefix: int, kernel: ResizeKernel
) -> Tensor:
    """Interpolate the rows of a position table from one grid to another.

    table       [..., num_prefix + rows*columns, D], leading axes of size 1 or none; rows of the grid row by row
    num_prefix  rows at the head that belong to no patch; they are kept as they are
    Returns the same layout for `new_grid`, in the dtype of the table; computed in float32. The same grid gives the
    same numbers bit for bit. Raises ValueError where the table does not have `old_grid` (a grid is never guessed
    from a square root).
    """
    length, width = table.shape[-2:]
    if length != num_prefix + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"a position table of {length} rows is not a grid of {old_grid[0]}x{old_grid[1]} "
            f"and {num_prefix} prefix rows"
        )
    if old_grid == new_grid:
        return table
    mode, align_corners, antialias = _KERNELS[kernel]
    flat = table.reshape(length, width)
    grid = flat[num_prefix:].float().reshape(*old_grid, width).permute(2, 0, 1)  # [D, rows, columns]
    grid = F.interpolate(
        grid[None], size=new_grid, mode=mode, align_corners=align_corners, antialias=antialias
    )[0]
    rows = grid.permute(1, 2, 0).reshape(-1, width).to(table.dtype)
    return torch.cat([flat[:num_prefix], rows]).reshape(*table.shape[:-2], -1, width)
