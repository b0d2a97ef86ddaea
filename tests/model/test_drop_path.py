"""Stochastic depth is drawn by position alone."""

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.model import drop_path_rates, keep_factors


def test_factors_do_not_depend_on_who_asks_or_on_depth() -> None:
    positions = torch.tensor([5, 2**40 + 5, 17, 5])
    rates = (0.1, 0.5, 0.9)
    factors = keep_factors(7, positions, rates)
    assert factors.shape == (4, 3, 2)
    assert factors.dtype == torch.float32
    for i, position in enumerate(positions):
        assert torch.equal(keep_factors(7, position[None], rates)[0], factors[i])
    assert torch.equal(factors[0], factors[3])
    assert torch.equal(keep_factors(7, positions, rates[:2]), factors[:, :2])
    assert not torch.equal(factors, keep_factors(8, positions, rates))


def test_factors_have_mean_one_and_the_stated_rate_in_every_block_and_branch() -> None:
    rates = (0.0, 0.25, 0.5)
    factors = keep_factors(0, torch.arange(20_000), rates).double()
    for block, rate in enumerate(rates):
        values = {0.0, 1 / (1 - rate)} if rate else {1.0}
        assert set(np.round(factors[:, block].unique().tolist(), 6)) == set(np.round(list(values), 6))
    torch.testing.assert_close(factors.mean(0), torch.ones(3, 2, dtype=torch.float64), atol=0.03, rtol=0)
    assert not torch.equal(factors[:, 2, 0], factors[:, 2, 1])


def test_positions_beyond_32_bits_are_told_apart() -> None:
    low = keep_factors(0, torch.arange(64), (0.5,))
    high = keep_factors(0, torch.arange(64) + 2**32, (0.5,))
    assert not torch.equal(low, high)


@pytest.mark.parametrize(("depth", "expected"), [(1, [0.0]), (3, [0.0, 0.15, 0.3])])
def test_rates_rise_linearly_to_the_last_block(depth: int, expected: list[float]) -> None:
    config = ModelConfig(
        embed_dim=8,
        depth=depth,
        num_heads=1,
        mlp_dim=8,
        img_size=(4, 4),
        patch_size=(2, 2),
        num_classes=2,
        drop_path_rate=0.3,
    )
    assert drop_path_rates(config) == pytest.approx(expected)
