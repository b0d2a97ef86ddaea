"""mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899) of pairs of samples.

Rows 2i and 2i + 1 of a global batch are mixed with each other, each in the same share, as timm's `Mixup(mode="pair")`
does. No slice and no micro-batch parts them (`Plan.row_unit`), and what is drawn depends on the pair alone: the same
on any topology. What a row keeps is one number for its label and one for each of its pixels; the pixels are mixed by
the model, on the device, after normalisation. b rows, H W pixels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ObjectiveConfig
from pretrain.draws import FloatArray, IntArray, Stream, split64, symmetric_beta, uniform


class Mix(NamedTuple):
    """What each row of a batch keeps of its own; equal for both rows of a pair.

    label    float32 [b]     share of the own label
    outside  float32 [b]     share of the own pixels outside the box: the label's with mixup, 1 with CutMix
    box      int64   [b, 4]  top, bottom, left, right: pixels that are the partner's; empty with mixup
    """

    label: Tensor
    outside: Tensor
    box: Tensor

    def to(self, device: torch.device) -> "Mix":
        return Mix(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """Share of the own pixels: float32 [b, H, W], on the device of the mix."""
        top, bottom, left, right = self.box.unbind(1)
        row, column = (torch.arange(n, device=self.box.device) for n in size)
        in_rows = (row >= top[:, None]) & (row < bottom[:, None])  # [b, H]
        in_columns = (column >= left[:, None]) & (column < right[:, None])  # [b, W]
        inside = in_rows[:, :, None] & in_columns[:, None, :]
        return torch.where(inside, 0.0, self.outside[:, None, None])


def draw_mix(config: ObjectiveConfig, seed: int, positions: Tensor, size: tuple[int, int]) -> Mix:
    """Draw how pairs are mixed, as timm's `Mixup` decides it.

    positions: int64 [b], on the host, b even: global sample positions; that of a pair's first row keys its draws.
    size: (H, W). A pair is mixed with probability `mix_prob`, where both are on by CutMix with `mix_switch_prob`.
    """
    low, high = split64(positions[::2].numpy())
    draws = uniform(seed, Stream.MIXUP, 6, low, high)  # [b / 2, 6]
    whether, which, first, second, top, left = np.moveaxis(draws, 1, 0)
    both = config.mixup_alpha > 0 and config.cutmix_alpha > 0
    is_cut = which < config.mix_switch_prob if both else np.full(len(draws), config.cutmix_alpha > 0)
    share = np.ones(len(draws))
    for alpha, chosen in ((config.mixup_alpha, ~is_cut), (config.cutmix_alpha, is_cut)):
        if alpha > 0:
            share = np.where(chosen, symmetric_beta(alpha, first, second), share)
    share = np.where(whether < config.mix_prob, share, 1.0)
    box = _boxes(np.where(is_cut, share, 1.0), top, left, size)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    label = np.where(is_cut, 1.0 - area / (size[0] * size[1]), share)
    outside = np.where(is_cut, 1.0, share)

    def for_both(values: FloatArray | IntArray) -> Tensor:
        return torch.from_numpy(values.repeat(2, axis=0))

    return Mix(for_both(label).float(), for_both(outside).float(), for_both(box))


def partners(rows: Tensor) -> Tensor:
    """[b, ...] with the rows of each pair exchanged."""
    return rows.reshape(-1, 2, *rows.shape[1:]).flip(1).reshape(rows.shape)


def _boxes(share: FloatArray, top: FloatArray, left: FloatArray, size: tuple[int, int]) -> IntArray:
    """A box of 1 - share of the area around a point of the image, cut off at its edges: int64 [n, 4]."""
    edges = []
    for draw, length in zip((top, left), size, strict=True):
        side = (length * np.sqrt(1.0 - share)).astype(np.int64)
        centre = (draw * length).astype(np.int64)
        edges += [np.maximum(centre - side // 2, 0), np.minimum(centre + (side + 1) // 2, length)]
    return np.stack(edges, axis=1)
