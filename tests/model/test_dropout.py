"""Dropout is drawn by seed, position, layer and place, and by nothing else."""

import numpy as np
import pytest
import torch
from vits import random_images, random_weights, tiny

from pretrain.model import build, dropout_keys
from pretrain.model.dropout import dropout


def test_keys_do_not_depend_on_who_asks_or_on_depth() -> None:
    positions = torch.tensor([5, 2**40 + 5, 17, 5])
    keys = dropout_keys(7, positions, 4)
    assert keys.shape == (4, 13, 2)
    assert keys.dtype == torch.int32
    for i, position in enumerate(positions):
        assert torch.equal(dropout_keys(7, position[None], 4)[0], keys[i])
    assert torch.equal(keys[0], keys[3])
    assert torch.equal(dropout_keys(7, positions, 2), keys[:, :7])
    assert not torch.equal(keys, dropout_keys(8, positions, 4))
    assert len(keys[:3].reshape(-1, 2).unique(dim=0)) == 39


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_numbers_are_dropped_at_the_stated_rate_and_the_mean_stays(rate: float) -> None:
    keys = dropout_keys(0, torch.arange(64), 0)[:, 0]
    x = torch.ones(64, 50, 100)
    dropped = dropout(x, keys, rate)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1.0 / (1 - rate)).item()}
    kept = (dropped > 0).double()
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * spread / kept.numel() ** 0.5
    for axis, others in ((0, 5000), (1, 6400), (2, 3200)):  # no sample, token or channel is special
        means = kept.mean(dim=[d for d in range(3) if d != axis])
        assert abs(means - (1 - rate)).max() < 5 * spread / others**0.5


def test_masks_are_independent_across_samples_neighbours_and_places() -> None:
    keys = dropout_keys(3, torch.arange(32), 1)
    masks = (
        torch.stack([dropout(torch.ones(32, 4096), keys[:, place], 0.5) for place in range(4)]) > 0
    ).float()
    bits = masks.reshape(128, 4096) - 0.5
    across = torch.corrcoef(bits) - torch.eye(128)
    assert across.abs().max() < 6 / 4096**0.5
    for lag in (1, 2, 3, 64, 96, 1024):
        product = 4 * (bits[:, lag:] * bits[:, :-lag]).mean()
        assert abs(product) < 5 / (128 * (4096 - lag)) ** 0.5
    counts = np.bincount((bits > 0).reshape(-1, 8).int().numpy() @ (1 << np.arange(8)), minlength=256)
    expected = bits.numel() / 8 / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 255 - 5 * 510**0.5 < chi_squared < 255 + 5 * 510**0.5


def test_a_sample_s_mask_does_not_depend_on_the_rest_of_its_batch() -> None:
    config = tiny(dropout_rate=0.3)
    model, images = build(config, random_weights(config)), random_images(config, 4)
    keys = dropout_keys(0, torch.arange(10, 14), 3)
    with torch.no_grad():
        whole = model(images, None, keys)
        parts = torch.cat([model(images[:1], None, keys[:1]), model(images[1:], None, keys[1:])])
        assert torch.allclose(whole, parts, atol=1e-5)
        assert not torch.allclose(whole, model(images), atol=0.1)


def test_it_falls_on_the_paper_s_places() -> None:
    """After the position embedding, and after every dense layer but qkv; a place is seen by its zeros."""
    config = tiny(dropout_rate=0.5, depth=1, act="silu")
    model, images = build(config, random_weights(config)), random_images(config, 2)
    keys = dropout_keys(0, torch.arange(2), 1)
    seen = {}
    block = model.blocks[0]
    for name, module in {"block": block, "fc2": block.mlp.fc2, "norm2": block.norm2}.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    block.attn.register_forward_hook(lambda _, args, out: seen.update(attn=out))
    block.mlp.register_forward_hook(lambda _, args, out: seen.update(mlp=out))
    model(images, None, keys)
    zeros = {name: (value == 0).float().mean().item() for name, value in seen.items()}
    for place in ("block", "attn", "fc2", "mlp"):
        assert zeros[place] == pytest.approx(0.5, abs=0.05), place
    assert zeros["norm2"] < 0.3  # the sum of the residual stream and the branch, not dropped again


def test_the_dtype_stays_and_no_key_means_no_dropout() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert dropout(x, dropout_keys(0, torch.arange(2), 0)[:, 0], 0.5).dtype == torch.bfloat16
    assert dropout(x, None, 0.5) is x
