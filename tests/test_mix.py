"""mixup and CutMix against timm's, and the draws behind them against scipy."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from scipy.stats import beta, kstest
from timm.data import mixup as timm
from torch import Tensor

from pretrain.config import ObjectiveConfig
from pretrain.draws import Stream, split64, symmetric_beta, uniform
from pretrain.model import InitialWeights, build
from pretrain.objective import Mix, Objective, draw_mix
from pretrain.objective.mix import partners

SIZE = (10, 14)
BOTH = ObjectiveConfig(
    mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.8, mix_switch_prob=0.4, label_smoothing=0.1
)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    draws = uniform(1, Stream.MIXUP, 2, np.arange(20_000))
    shares = symmetric_beta(alpha, draws[:, 0], draws[:, 1])
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 1e-3
    assert ((shares >= 0) & (shares <= 1)).all()


def test_a_share_is_a_number_at_the_edges_of_the_draws() -> None:
    edges = np.array([0.0, 2.0**-32, 0.25, 0.5, 0.75, 1 - 2.0**-32])
    first, second = np.meshgrid(edges, edges)
    for alpha in (1e-3, 0.2, 1.0, 100.0):
        shares = symmetric_beta(alpha, first, second)
        assert ((shares >= 0) & (shares <= 1)).all()


def draws_of(positions: Tensor) -> np.ndarray:
    """Whether, which, two for the share, row and column: one line a pair."""
    return uniform(7, Stream.MIXUP, 6, *split64(positions[::2].numpy()))


def timms(
    config: ObjectiveConfig, positions: Tensor, images: Tensor, labels: Tensor, monkeypatch: Any
) -> Any:
    """What timm's `Mixup` of pairs makes of floats [b, C, H, W], deciding as our draws do: (images, targets [b, 5])."""
    draws = draws_of(positions)
    mixer = timm.Mixup(
        config.mixup_alpha,
        config.cutmix_alpha,
        prob=config.mix_prob,
        switch_prob=config.mix_switch_prob,
        mode="pair",
        label_smoothing=config.label_smoothing,
        num_classes=5,
    )
    words = iter([draws[:, 1], draws[:, 0]] if config.mixup_alpha and config.cutmix_alpha else [draws[:, 0]])
    cut = draws[:, 1] < config.mix_switch_prob
    is_cut = (
        cut if config.mixup_alpha and config.cutmix_alpha else np.full(len(draws), config.cutmix_alpha > 0)
    )
    centres = iter(
        np.concatenate(
            [row[4:] for row, c in zip(draws, is_cut, strict=True) if c and row[0] < config.mix_prob] or [[]]
        )
    )
    monkeypatch.setattr(np.random, "rand", lambda n: next(words))
    monkeypatch.setattr(np.random, "beta", lambda a, b, size: symmetric_beta(a, draws[:, 2], draws[:, 3]))
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: int(next(centres) * high))
    # timm pairs row i with row b - 1 - i.
    order = torch.cat([torch.arange(0, len(images), 2), torch.arange(1, len(images), 2).flip(0)])
    mixed, targets = mixer(images[order].clone(), labels[order])
    monkeypatch.undo()
    back = order.argsort()
    return mixed[back], targets[back]


@pytest.mark.parametrize(
    "config",
    [BOTH, ObjectiveConfig(mixup_alpha=0.3), ObjectiveConfig(cutmix_alpha=1.0, mix_prob=0.5)],
    ids=["both", "mixup", "cutmix"],
)
def test_images_and_targets_are_timms(config: ObjectiveConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = (
        torch.randn(60, 3, *SIZE, generator=generator),
        torch.randint(0, 5, (60,), generator=generator),
    )
    positions = torch.arange(60) + 2**33
    expected_images, expected_targets = timms(config, positions, images, labels, monkeypatch)
    mix = draw_mix(config, 7, positions, SIZE)
    share = mix.pixels(SIZE)[:, None]
    torch.testing.assert_close(share * images + (1 - share) * partners(images), expected_images)
    hot = F.one_hot(labels, 5).float() * (1 - config.label_smoothing) + config.label_smoothing / 5
    own = mix.label[:, None]
    torch.testing.assert_close(own * hot + (1 - own) * partners(hot), expected_targets)
    assert (mix.label < 1).any()
    assert (mix.label == 1).any() or config.mix_prob == 1.0


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_two_hot_target(name: Any, smoothing: float) -> None:
    objective = Objective(ObjectiveConfig(name=name, label_smoothing=smoothing, mixup_alpha=1.0), 7)
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) * 3
    labels, own = torch.tensor([0, 3, 6, 6, 1, 2]), torch.tensor([0.3, 0.3, 1.0, 1.0, 0.0, 0.0])
    hot = F.one_hot(labels, 7).float() * (1 - smoothing) + smoothing / 7
    target = own[:, None] * hot + (1 - own[:, None]) * hot[[1, 0, 3, 2, 5, 4]]
    if name == "softmax":
        expected = -(target * logits.log_softmax(1)).sum(1)
    else:
        expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    torch.testing.assert_close(objective.losses(logits, labels, own), expected)


def test_how_a_pair_is_mixed_does_not_depend_on_what_is_beside_it() -> None:
    positions = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    whole = draw_mix(BOTH, 7, positions, SIZE)
    for start, stop in ((0, 2), (10, 30), (62, 64)):
        part = draw_mix(BOTH, 7, positions[start:stop], SIZE)
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, whole, strict=True))
    assert not torch.equal(draw_mix(BOTH, 8, positions, SIZE).label, whole.label)


def test_pairs_are_mixed_as_often_as_asked() -> None:
    mix = draw_mix(BOTH, 7, torch.arange(20_000), SIZE)
    mixed, cut = mix.label < 1, (mix.box[:, 1] > mix.box[:, 0]) & (mix.box[:, 3] > mix.box[:, 2])
    assert mixed.float().mean() == pytest.approx(0.8, abs=0.03)  # a box may be empty
    assert cut.float().mean() == pytest.approx(0.8 * 0.4, abs=0.03)
    assert (mix.outside[cut] == 1).all()
    torch.testing.assert_close(mix.pixels(SIZE).mean((1, 2)), mix.label, atol=1e-5, rtol=0)


def test_the_model_mixes_normalised_images() -> None:
    cfg = tiny.config(model={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}).model
    model = build(cfg, InitialWeights(cfg, 0))
    images = tiny.global_batch(tiny.config(), 0).images
    mix = draw_mix(BOTH, 7, torch.arange(8), cfg.img_size)
    share = mix.pixels(cfg.img_size)
    embed = model.patch_embed
    pixels = images.float() / 255
    normal = (pixels - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    expected = embed.proj(
        embed.patchify(share[..., None] * normal + (1 - share[..., None]) * partners(normal))
    )
    torch.testing.assert_close(embed(images, share), expected, atol=1e-5, rtol=1e-5)
    unmixed = torch.ones_like(share)
    assert torch.equal(embed(images, unmixed), embed(images))
    assert isinstance(mix, Mix)
