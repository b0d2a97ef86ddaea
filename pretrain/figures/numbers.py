"""What the figures show, as arrays: pure functions.

N = R * C  patches in rows and columns    p  prefix tokens    T = p + N    D  width    L  layers    h  heads
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_COMPONENTS = 28
"""As many as figure 7 of the paper shows."""


class Neighbours(NamedTuple):
    """Mean cosine similarity over pairs of different patches, in [-1, 1]: of one row, of one column, of neither."""

    same_row: float
    same_column: float
    elsewhere: float


def similarity(table: Tensor) -> Tensor:
    """Cosine similarity of each pair of rows: [N, D] -> [N, N], in [-1, 1] (figure 7, centre). A row of zeros is
    similar to none."""
    unit = F.normalize(table.float(), dim=-1)
    return (unit @ unit.t()).clamp(-1, 1)


def neighbours(similar: Tensor, grid: tuple[int, int]) -> Neighbours:
    """What the figure shows to the eye, as numbers: patches of a row or a column are alike. `similar`: [N, N].

    A mean over no pair at all, on a grid of one row or column, is nan.
    """
    row, column = _places(grid)
    other = ~torch.eye(len(row), dtype=torch.bool)
    rows, columns = row[:, None] == row, column[:, None] == column
    chosen = (rows & other, columns & other, ~rows & ~columns)
    return Neighbours(*(float(similar[pairs].mean()) for pairs in chosen))


def principal_components(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of the patch embedding's filters (figure 7, left).

    filters [D, C, P, P] -> the first components [k, C, P, P], each stretched to [0, 1], and the share of the variance
    that each explains [k]; k is at most `MOST_COMPONENTS`.
    """
    flat = filters.float().flatten(1)
    _, strengths, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    shares = strengths.square() / strengths.square().sum().clamp(min=1e-30)
    kept = components[:MOST_COMPONENTS]
    low, high = kept.amin(1, keepdim=True), kept.amax(1, keepdim=True)
    stretched = (kept - low) / (high - low).clamp(min=1e-12)
    return stretched.unflatten(1, filters.shape[1:]), shares[: len(kept)]


def attention_distance(
    weights: Tensor, grid: tuple[int, int], patch_size: tuple[int, int], num_prefix: int
) -> Tensor:
    """How far, in pixels, a head looks on average: [B, h, T, T] -> [h] (figure 7, right; appendix D.7).

    For each patch as a query the distance from its centre to the others' centres, weighted by the attention that they
    get; prefix tokens have no place and are left out of queries and keys.
    """
    row, column = (place.to(weights) for place in _places(grid))
    down, across = patch_size
    distance = torch.hypot((row[:, None] - row) * down, (column[:, None] - column) * across)
    among = weights[..., num_prefix:, num_prefix:]
    among = among / among.sum(-1, keepdim=True).clamp(min=1e-12)
    return (among * distance).sum(-1).mean((0, 2))


def rolled(before: Tensor | None, weights: Tensor) -> Tensor:
    """One more layer of attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928; appendix D.8): [B, T, T].

    The mean of the heads' weights [B, h, T, T], half of it, and half the identity for the residual path, times what the
    layers before have mixed.
    """
    mean = weights.mean(1)
    layer = 0.5 * (mean + torch.eye(mean.shape[-1], device=mean.device, dtype=mean.dtype))
    return layer if before is None else layer @ before


def seen_by_the_head(mixed: Tensor, grid: tuple[int, int], num_prefix: int, has_cls_token: bool) -> Tensor:
    """Where the head's input comes from: rollout [B, T, T] -> [B, R, C], summing to 1 for each image.

    The row of the cls token; without one, the mean over the patches, which the head sees pooled.
    """
    rows = mixed[:, 0] if has_cls_token else mixed[:, num_prefix:].mean(1)
    patches = rows[:, num_prefix:]
    return (patches / patches.sum(-1, keepdim=True).clamp(min=1e-12)).reshape(-1, *grid)


def _places(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, row by row: int64 [N] each."""
    rows, columns = grid
    number = torch.arange(rows * columns)
    return number // columns, number % columns
