"""Exact evaluation: every sample of the validation set once, whatever the number of ranks.

All ranks run the same number of forward passes (ZeRO-3 gathers weights in each); rows that only fill up a batch have
weight 0. Sums are float64 and the number of samples is checked, not assumed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import Config
from pretrain.distributed import Ranks
from pretrain.errors import DataError
from pretrain.objective import Objective, correct


@dataclass(frozen=True)
class Scores:
    """Sums over the validation set."""

    loss_sum: float
    top1_sum: float
    top5_sum: float
    samples: int

    def metrics(self) -> dict[str, float]:
        """Means, as MLflow gets them; accuracies in [0, 1]."""
        return {
            "val/loss": self.loss_sum / self.samples,
            "val/top1": self.top1_sum / self.samples,
            "val/top5": self.top5_sum / self.samples,
        }

    def __str__(self) -> str:
        means = self.metrics()
        return (
            f"top-1 {means['val/top1']:.2%}, top-5 {means['val/top5']:.2%}, loss {means['val/loss']:.4f} "
            f"on {self.samples:,} validation images"
        )


def score(
    forward: Callable[[Batch], Tensor], batches: Iterable[Batch], config: Config, samples: int, ranks: Ranks
) -> Scores:
    """Loss, top-1 and top-5 over a validation set of `samples` images. All ranks, each with its own batches.

    Raises `DataError` on all ranks if the batches did not hold every sample once.
    """
    objective = Objective(
        config.objective.model_copy(update={"label_smoothing": 0.0}), config.model.num_classes
    )
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        logits = forward(batch)
        labels, weights = batch.labels.to(ranks.device), batch.weights.to(ranks.device)
        hits = correct(logits, labels, weights)
        loss = (objective.losses(logits, labels) * weights).sum()
        sums += torch.stack([loss.double(), hits.top1.double(), hits.top5.double(), weights.double().sum()])
    loss_sum, top1, top5, seen = ranks.sum(sums.tolist())
    if round(seen) != samples:
        raise DataError(f"evaluation saw {seen:.0f} samples of {samples}; nothing is reported")
    return Scores(loss_sum, top1, top5, samples)
