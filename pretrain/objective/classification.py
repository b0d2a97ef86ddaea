"""Losses a sample and counts of correct answers. b samples, K classes.

Both stay sums and per-sample values: the caller weighs out padding (`Batch.weights`) and scales to the mean over the
global batch (`Plan.loss_scale`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config import ObjectiveConfig
from pretrain.objective.mix import partners


@dataclass(frozen=True)
class Objective:
    """The training loss of a classifier."""

    config: ObjectiveConfig
    num_classes: int

    def losses(self, logits: Tensor, labels: Tensor, own_share: Tensor | None = None) -> Tensor:
        """The loss of each sample, computed in float32 under any autocast: [b, K], int64 [b] -> float32 [b].

        own_share: float32 [b], where rows 2i and 2i + 1 were mixed: the target is that share of the own label's and
        the rest of the partner's. Both losses are linear in the target, so the two are mixed after the fact.
        """
        losses = self._losses(logits, labels)
        if own_share is None:
            return losses
        return own_share * losses + (1 - own_share) * self._losses(logits, partners(labels))

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """With one label a sample.

        softmax: cross-entropy; the target is 1 - s on the label plus s / K everywhere (Szegedy et al. 2015,
            arXiv 1512.00567, section 7).
        sigmoid: binary cross-entropy with the same target, summed over the classes as in big_vision (timm's and
            DeiT-3's mean is this divided by K).
        """
        logits, smoothing = logits.float(), self.config.label_smoothing
        with torch.autocast(logits.device.type, enabled=False):
            if self.config.name == "softmax":
                return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            targets = F.one_hot(labels, self.num_classes).float() * (1 - smoothing)
            targets += smoothing / self.num_classes
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


class Correct(NamedTuple):
    """Weighted counts of correct samples, float32 scalars on the device."""

    top1: Tensor
    top5: Tensor


def correct(logits: Tensor, labels: Tensor, weights: Tensor) -> Correct:
    """Count samples whose label is among the 1 and the 5 largest logits: [b, K], int64 [b], float32 [b].

    Of equal logits the lower class comes first (a head of zeros scores as a constant answer does, not 100 %);
    a sample with a logit that is not a number is wrong. With fewer than five classes top-5 counts every other one.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    tie_ahead = (logits == own) & (classes < labels[:, None])
    rank = (~(logits <= own) | tie_ahead).sum(1)
    rank = torch.where(logits.isnan().any(1), 5, rank)
    top1, top5 = ((weights * (rank < k)).sum() for k in (1, 5))
    return Correct(top1, top5)
