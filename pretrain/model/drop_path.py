"""Stochastic depth as a pure function of the sample's position: the same on any topology, and when recomputed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.draws import Stream, split64, uniform


def drop_path_rates(config: ModelConfig) -> tuple[float, ...]:
    """Probability that a branch of block i is dropped: 0 at the first, `drop_path_rate` at the last, linear between."""
    return tuple(np.linspace(0.0, config.drop_path_rate, config.num_blocks).tolist())


def keep_factors(seed: int, positions: Tensor, rates: Sequence[float]) -> Tensor:
    """Draw what each residual branch is multiplied with: 0, or 1 / (1 - rate) so that its mean stays.

    positions  int64 [B]  global sample positions, on the host: a position never comes twice in a run
    rates      one a block, in [0, 1)
    Returns float32 [B, depth, 2], on the host: block by block the attention branch and the MLP branch, drawn apart.
    """
    low, high = split64(positions.numpy())
    draws = uniform(seed, Stream.DROP_PATH, 2 * len(rates), low, high).reshape(len(positions), len(rates), 2)
    rate = np.asarray(rates, dtype=np.float64)[:, None]
    return torch.from_numpy(np.where(draws < rate, 0.0, 1.0 / (1.0 - rate)).astype(np.float32))
