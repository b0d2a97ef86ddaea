"""From rows of the order to rows of a batch: read, decode, augment. In threads, or in the caller."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.dataset import Dataset
from pretrain.data.decode import BadSampleError, decode
from pretrain.data.order import Rows
from pretrain.data.read import LocalReader
from pretrain.data.resize import Pixels
from pretrain.data.tar import Sample
from pretrain.draws import IntArray

_ROWS_A_JOB = 16
"""Rows that a thread fills at a time: enough to drown the cost of handing over, few enough to share a small batch."""


class Filler:
    """Fills rows with the view of their sample; any number of threads may call `fill` at a time."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, model: ModelConfig, plan: Plan, view: TrainView | EvalView
    ) -> None:
        self._dataset, self._view = dataset, view
        self._max_pixels, self._model = data.max_pixels, model
        self._reader = LocalReader(dataset, plan.block_samples)

    def fill(self, rows: Rows, images: npt.NDArray[np.uint8], labels: IntArray) -> None:
        """Write images uint8 [n, H, W, C] and labels int64 [n] of n rows. Raises `DataError`."""
        draws = self._view.draws(rows.epoch, self._dataset.starts[rows.shard] + rows.sample, rows.repeat)
        for i, sample in enumerate(self._reader.read(rows.shard, rows.sample)):
            try:
                pixels = self._decode(sample)
            except BadSampleError as bad:
                raise BadSampleError(f"{self._dataset.paths[rows.shard[i]]}, {sample.key}: {bad}") from None
            self._view.render(pixels, draws[i], images[i])
            labels[i] = sample.label

    def close(self) -> None:
        self._reader.close()

    def _decode(self, sample: Sample) -> Pixels:
        if sample.label >= self._model.num_classes:
            raise BadSampleError(f"label {sample.label}; model.num_classes is {self._model.num_classes}")
        return decode(sample.image, self._model.in_chans, self._max_pixels)


class Workers:
    """Runs a filler in `num_threads` threads; with 0, in whoever calls."""

    def __init__(self, filler: Filler, num_threads: int) -> None:
        self._filler = filler
        self._threads = _single_threaded(num_threads) if num_threads else None

    def start(self, rows: Rows, images: npt.NDArray[np.uint8], labels: IntArray) -> list["Future[None]"]:
        """Begin to fill images uint8 [n, H, W, C] and labels int64 [n]; they are filled when all futures are done."""
        if self._threads is None:
            self._filler.fill(rows, images, labels)
            return []
        parts = [slice(first, first + _ROWS_A_JOB) for first in range(0, len(labels), _ROWS_A_JOB)]
        return [
            self._threads.submit(
                self._filler.fill, Rows(*(a[part] for a in rows)), images[part], labels[part]
            )
            for part in parts
        ]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._filler.close()


def _single_threaded(num_threads: int) -> ThreadPoolExecutor:
    """A pool whose threads run torch's kernels alone: OpenMP would give each thread a team of its own.

    torch's setting holds for the thread that sets it and for those that have not asked for it yet, so all threads are
    started here and the caller's own is put back.
    """
    pool = ThreadPoolExecutor(num_threads, "decode")
    before, started = torch.get_num_threads(), threading.Barrier(num_threads)

    def limit() -> None:
        torch.get_num_threads()  # a thread's first question takes the setting of that moment
        torch.set_num_threads(1)
        started.wait()

    for job in [pool.submit(limit) for _ in range(num_threads)]:
        job.result()
    torch.set_num_threads(before)
    return pool
