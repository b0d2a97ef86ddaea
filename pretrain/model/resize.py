"""Position tables moved to another grid, and patch filters to another patch size.

"2D interpolation of the pre-trained position embeddings" (section 3.2 of the ViT paper), and its like for the kinds of
`position` whose table is no grid. A grid is (rows, columns) and always given: none is guessed from a square root.

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


def resize_axis(table: Tensor, length: int, kernel: ResizeKernel) -> Tensor:
    """Interpolate one axis of `learned_2d`, its X or its Y table: [1, n, D/2] -> [1, length, D/2].

    Each axis for itself is the same as the whole grid at once, since X does not change along Y, nor Y along X.
    """
    return resize_pos_embed(table, (1, table.shape[-2]), (1, length), 0, kernel)


def resize_relative(rel_pos: Tensor, old_grid: Grid, new_grid: Grid, kernel: ResizeKernel) -> Tensor:
    """Interpolate the offset embeddings of `relative`: [2 N - 1, d] -> [2 N' - 1, d], in the dtype of the table.

    An offset i - j of patches numbered row by row stands for steps (dr, dc) on the grid with dr * columns + dc = i - j.
    The table is laid out over all steps [2 rows - 1, 2 columns - 1, d], where no step at all is the centre; that is
    interpolated; and each new offset takes the mean of the steps that it stands for, each counted as often as the new
    grid has pairs of patches so far apart. Raises ValueError where the table does not have `old_grid`.
    """
    if len(rel_pos) != 2 * old_grid[0] * old_grid[1] - 1:
        raise ValueError(
            f"{len(rel_pos)} offset embeddings do not belong to a grid of {old_grid[0]}x{old_grid[1]}"
        )
    if old_grid == new_grid:
        return rel_pos
    (old_steps, _), (new_steps, pairs) = _steps(old_grid), _steps(new_grid)
    by_step = rel_pos.float()[old_steps.flatten()]
    by_step = resize_pos_embed(by_step, _shape(old_steps), _shape(new_steps), 0, kernel)
    weight = pairs.flatten()[:, None]
    index, length = new_steps.flatten(), 2 * new_grid[0] * new_grid[1] - 1
    total = torch.zeros(length, rel_pos.shape[1]).index_add_(0, index, by_step * weight)
    mean = total / torch.zeros(length, 1).index_add_(0, index, weight)
    return mean.to(rel_pos.dtype)


def resize_patch_filters(weight: Tensor, new_size: Grid, kernel: ResizeKernel) -> Tensor:
    """Patch filters for another patch size by pseudo-inverse (Beyer et al. 2022, FlexiViT, arXiv 2212.08013, 3.4).

    weight: [D, C, height, width] -> [D, C, *new_size], in its dtype; computed in float64. With B the matrix that
    resizes an image patch x by the kernel, the new filters w' = pinv(B^T) w are those whose answers <B x, w'> are
    nearest to <x, w> over patches of white noise; where the patch grows they are equal.
    """
    height, width = old_size = (weight.shape[2], weight.shape[3])
    if old_size == new_size:
        return weight
    mode, align_corners, antialias = _KERNELS[kernel]
    basis = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    resized = F.interpolate(
        basis, size=new_size, mode=mode, align_corners=align_corners, antialias=antialias
    ).flatten(1)  # B^T [old pixels, new pixels]
    inverse: Tensor = torch.linalg.pinv(resized)  # [new pixels, old pixels]
    filters = weight.double().flatten(2) @ inverse.t()
    return filters.reshape(*weight.shape[:2], *new_size).to(weight.dtype)


def _steps(grid: Grid) -> tuple[Tensor, Tensor]:
    """For each step (dr, dc) on a grid its row in the offset table, and how many pairs of patches are that far apart.

    Both [2 rows - 1, 2 columns - 1], int64 and float32.
    """
    rows, columns = grid
    dr, dc = torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)
    offsets = dr[:, None] * columns + dc + rows * columns - 1
    return offsets, ((rows - dr.abs())[:, None] * (columns - dc.abs())).float()


def _shape(steps: Tensor) -> Grid:
    return steps.shape[0], steps.shape[1]
