"""What travels from the loader to the engine."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: b samples, always of the same b so that shapes stay static.

    images     uint8   [b, H, W, C]  as decoded; normalised on the device by the model
    labels     int64   [b]           class indices in [0, K)
    weights    float32 [b]           1 for a sample, 0 for the padding of an uneven slice
    positions  int64   [b]           global sample positions (the order's g); padding repeats a real one
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, without waiting where the memory is pinned."""
        return Batch(
            *(
                t.to(device, non_blocking=True)
                for t in (self.images, self.labels, self.weights, self.positions)
            )
        )
