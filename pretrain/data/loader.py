"""From a plan and a data set to batches. What happens, where, and what each stage remembers:

    1  order     the caller's thread   which samples are this rank's at a step    nothing that a step does not give
    2  read      decode threads        their bytes, checked (`read`)              open shards
    3  decode    decode threads        pixels, upright, in the model's channels   nothing
    4  augment   decode threads        a view, written to its row of the batch    nothing: draws are keyed by sample
    5  queue     the caller's thread   `prefetch_steps` steps under way           batches that nobody has seen

A restart needs the number of the next step and nothing else. With `decode_threads: 0` stages 2 to 4 run in the caller
and nothing is prefetched; the batches are the same.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from pretrain.batch import Batch
from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.dataset import Dataset
from pretrain.data.decode import BadSampleError, decode
from pretrain.data.order import Order, Rows, evaluation_slice
from pretrain.data.read import LocalReader
from pretrain.draws import IntArray

_ROWS_A_JOB = 16
"""Rows that a thread fills at a time: enough to drown the cost of handing over, few enough to share a small batch."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Coming:
    """A batch whose rows are being filled."""

    batch: Batch
    jobs: list["Future[None]"]

    def wait(self) -> Batch:
        for job in self.jobs:
            job.result()
        return self.batch

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


class _Filler:
    """Stages 2 to 4: fills batches, in threads or in the caller."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, model: ModelConfig, plan: Plan, view: TrainView | EvalView
    ) -> None:
        self._dataset, self._view = dataset, view
        self._max_pixels, self._model = data.max_pixels, model
        self._pinned = plan.device == "cuda"
        self._reader = LocalReader(dataset, plan.block_samples)
        self._threads = ThreadPoolExecutor(data.decode_threads, "decode") if data.decode_threads > 0 else None

    def start(self, rows: Rows, counts: BoolArray) -> _Coming:
        """Begin a batch of these rows; counts: bool [b], false where a row is padding."""
        shape = (len(counts), *self._model.img_size, self._model.in_chans)
        batch = Batch(
            images=torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned),
            labels=torch.empty(len(counts), dtype=torch.int64, pin_memory=self._pinned),
            weights=self._tensor(counts.astype(np.float32)),
            positions=self._tensor(rows.position),
        )
        jobs = []
        for first in range(0, len(counts), _ROWS_A_JOB):
            part = slice(first, first + _ROWS_A_JOB)
            arguments = Rows(*(array[part] for array in rows)), batch.images[part], batch.labels[part]
            if self._threads is None:
                self._fill(*arguments)
            else:
                jobs.append(self._threads.submit(self._fill, *arguments))
        return _Coming(batch, jobs)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _fill(self, rows: Rows, images: torch.Tensor, labels: torch.Tensor) -> None:
        """images: uint8 [n, H, W, C] and labels: int64 [n], rows of a batch, written here."""
        pixels, classes = images.numpy(), labels.numpy()
        draws = self._view.draws(rows.epoch, self._dataset.starts[rows.shard] + rows.sample)
        samples = self._reader.read(rows.shard, rows.sample)
        for i, sample in enumerate(samples):
            try:
                if sample.label >= self._model.num_classes:
                    raise BadSampleError(
                        f"label {sample.label}; model.num_classes is {self._model.num_classes}"
                    )
                image = decode(sample.image, self._model.in_chans, self._max_pixels)
            except BadSampleError as bad:
                raise BadSampleError(f"{self._dataset.paths[rows.shard[i]]}, {sample.key}: {bad}") from None
            view = np.asarray(self._view.apply(image, draws[i]))
            pixels[i] = view if view.ndim == 3 else view[:, :, None]
            classes[i] = sample.label

    def _tensor(self, values: npt.NDArray[np.float32] | IntArray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._pinned else tensor


class _Loader:
    """What training and evaluation share: a filler, the queue before it, and how both end."""

    def __init__(self, filler: _Filler, ahead: int) -> None:
        self._filler, self._ahead = filler, ahead
        self.wait_seconds = 0.0
        """Time that the consumer has waited for data, since the loader was made."""

    def _stream(self, requests: Iterator[list[tuple[Rows, BoolArray]]]) -> Iterator[list[Batch]]:
        """Batches of each request in turn, those of the next ones under way."""
        coming: deque[list[_Coming]] = deque()
        try:
            while True:
                began = time.perf_counter()
                while len(coming) <= self._ahead and (request := next(requests, None)) is not None:
                    coming.append([self._filler.start(rows, counts) for rows, counts in request])
                if not coming:
                    return
                batches = [batch.wait() for batch in coming.popleft()]
                self.wait_seconds += time.perf_counter() - began
                yield batches
        finally:
            for batch in (batch for request in coming for batch in request):
                batch.cancel()

    def close(self) -> None:
        """End the threads and close the files. Called by whoever made the loader; `with` does it."""
        self._filler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrainLoader(_Loader):
    """Training batches of one rank."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, model: ModelConfig, plan: Plan, *, seed: int, rank: int
    ) -> None:
        """plan: made for this data set; seed: of the order and of every draw. Starts threads: close it."""
        view = TrainView(data.augment, model.img_size, data.interpolation, seed)
        ahead = data.prefetch_steps if data.decode_threads else 0
        super().__init__(_Filler(dataset, data, model, plan, view), ahead)
        self._plan, self._slice = plan, plan.slice_of(rank)
        self._order = Order(
            dataset.shard_samples,
            seed=seed,
            global_batch=plan.global_batch,
            lanes=plan.lanes,
            block_samples=plan.block_samples,
            window_blocks=plan.window_blocks,
        )

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """For `first_step` (0 is the first of the run) and each that follows, without end: this rank's batches.

        Each step has `plan.accumulation` batches of `plan.micro_batch` rows. Where the rank's slice is shorter, rows
        at its end repeat its last sample with weight 0. Raises `DataError` from whatever thread it happened in.
        """
        return self._stream(self._requests(first_step))

    def _requests(self, step: int) -> Iterator[list[tuple[Rows, BoolArray]]]:
        plan = self._plan
        start, stop = self._slice
        row = np.arange(plan.accumulation * plan.micro_batch)
        counts, row = row < stop - start, np.minimum(row, stop - start - 1)
        while True:
            rows = self._order.rows(step, start, stop)
            yield [
                (Rows(*(array[row[part]] for array in rows)), counts[part])
                for part in _parts(plan.accumulation, plan.micro_batch)
            ]
            step += 1


class EvalLoader(_Loader):
    """Evaluation batches of one rank: over all ranks every sample counts once; all ranks have equally many batches."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, model: ModelConfig, plan: Plan, *, rank: int
    ) -> None:
        """Batches have `plan.micro_batch` rows. Starts threads: close it."""
        view = EvalView(model.img_size, data.val_crop, data.interpolation)
        ahead = data.prefetch_steps * plan.accumulation if data.decode_threads else 0
        super().__init__(_Filler(dataset, data, model, plan, view), ahead)
        self._dataset = dataset
        self._number, self._counts = evaluation_slice(len(dataset), rank, plan.world_size, plan.micro_batch)

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return len(self._number)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of the data set; `positions` are sample numbers. Rows of weight 0 do not count."""
        for batches in self._stream(self._requests()):
            yield from batches

    def _requests(self) -> Iterator[list[tuple[Rows, BoolArray]]]:
        for number, counts in zip(self._number, self._counts, strict=True):
            shard, sample = self._dataset.locate(number)
            yield [(Rows(shard, sample, np.zeros_like(number), number.copy()), counts)]


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(count)]
