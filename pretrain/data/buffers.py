"""Memory for the images of batches, used again and again, and never while anybody may still look at it."""

import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch


class Ring:
    """Lends uint8 tensors of one shape. A block of memory is lent again when the last tensor over it is gone.

    On CUDA the memory is pinned and torch's allocator keeps the ring: a block waits there until its tensor is gone and
    the events that torch records behind every asynchronous copy out of it have passed. On a CPU `Batch.to` copies
    nothing, so views, saved tensors of autograd and whatever else shares the storage keep their block from being lent.
    """

    def __init__(self, shape: tuple[int, ...], *, pinned: bool, keep: int) -> None:
        """keep: blocks that are kept at most while nobody uses them."""
        self._shape, self._pinned = shape, pinned
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self) -> torch.Tensor:
        """A tensor of arbitrary content that shares memory with no other one in use."""
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(self._shape, np.uint8)
        lent = block[...]  # the storage of every tensor over it holds this very object
        weakref.finalize(lent, self._free.append, block).atexit = False
        return torch.from_numpy(lent)
