"""Losses and counts against torch's and timm's."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

from pretrain.config import ObjectiveConfig
from pretrain.objective import Objective, correct

LABELS = torch.tensor([0, 3, 6, 3, 1])


def logits(classes: int = 7) -> torch.Tensor:
    return torch.randn(5, classes, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_equals_timm_a_sample(smoothing: float) -> None:
    losses = Objective(ObjectiveConfig(label_smoothing=smoothing), 7).losses(logits(), LABELS)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses.mean(), LabelSmoothingCrossEntropy(smoothing)(logits(), LABELS))
    one = F.cross_entropy(logits()[2:3], LABELS[2:3], label_smoothing=smoothing)
    torch.testing.assert_close(losses[2], one)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_the_sum_over_classes(smoothing: float) -> None:
    objective = Objective(ObjectiveConfig(name="sigmoid", label_smoothing=smoothing), 7)
    expected = BinaryCrossEntropy(smoothing, sum_classes=True)(logits(), LABELS)
    torch.testing.assert_close(objective.losses(logits(), LABELS).mean(), expected)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_losses_are_float32_from_bfloat16_logits_and_under_autocast(name: str) -> None:
    objective = Objective(ObjectiveConfig(name=name), 7)
    low = logits().bfloat16()
    expected = objective.losses(low.float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = objective.losses(low, LABELS)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_correct_equals_torch_topk() -> None:
    counts = correct(logits(), LABELS, torch.ones(5))
    for got, k in zip(counts, (1, 5), strict=True):
        assert got == (logits().topk(k).indices == LABELS[:, None]).any(1).sum()


def test_padding_is_not_counted() -> None:
    own = F.one_hot(LABELS, 7).float()
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    assert correct(own, LABELS, weights) == (3, 3)


def test_a_head_of_zeros_answers_the_first_classes() -> None:
    labels = torch.arange(10)
    assert correct(torch.zeros(10, 10), labels, torch.ones(10)) == (1, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_right(bad: float) -> None:
    broken = logits()
    broken[:, 2] = bad
    assert correct(broken, LABELS, torch.ones(5)).top1 == 0
    assert correct(torch.full((5, 7), math.nan), LABELS, torch.ones(5)) == (0, 0)


def test_top5_of_three_classes_counts_every_sample_but_nan() -> None:
    values = logits(3)
    values[4] = math.nan
    assert correct(values, torch.tensor([0, 1, 2, 0, 1]), torch.ones(5)).top5 == 4
