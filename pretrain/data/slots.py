"""Memory of jobs, mapped by several processes: of each the labels, then the images. How a batch is cut into jobs."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.draws import IntArray

ROWS_A_JOB = 16
"""Rows that a thread fills at a time: enough to drown the cost of handing over, few enough to share a small batch."""

Images = npt.NDArray[np.uint8]


def parts(count: int) -> list[slice]:
    """Of a batch of `count` rows."""
    return [slice(first, min(first + ROWS_A_JOB, count)) for first in range(0, count, ROWS_A_JOB)]


class Slots:
    """Slots for a job each, by number."""

    def __init__(self, memory: Any, image_shape: tuple[int, int, int]) -> None:
        self._memory, self._image_shape = memory, image_shape

    @staticmethod
    def size(slots: int, image_shape: tuple[int, int, int]) -> int:
        """Bytes of memory for so many."""
        return slots * ROWS_A_JOB * (8 + -(-int(np.prod(image_shape)) // 8) * 8)

    def views(self, slot: int, count: int) -> tuple[Images, IntArray]:
        """images uint8 [count, H, W, C] and labels int64 [count] of a slot."""
        start = self.size(slot, self._image_shape)
        labels = np.frombuffer(self._memory, np.int64, count, start)
        pixels = np.frombuffer(
            self._memory, np.uint8, count * int(np.prod(self._image_shape)), start + 8 * ROWS_A_JOB
        )
        return pixels.reshape(count, *self._image_shape), labels
