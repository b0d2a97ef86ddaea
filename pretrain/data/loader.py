"""From a plan and a data set to batches. What happens, where, and what each stage remembers:

    1  order     the caller's thread   which samples are this rank's at a step    nothing that a step does not give
    2  read      decode threads        their bytes, checked (`reader`)            open shards, blocks read ahead
    3  decode    decode threads        pixels, upright, in the model's channels   nothing
    4  augment   decode threads        a view, written to its row of the batch    nothing: draws are keyed by sample
    5  queue     the caller's thread   `prefetch_steps` steps under way           batches that nobody has seen

Stages 2 to 4 are `fill`, `workers` has the threads (in this process or in `processes` of their own), and `buffers` lends the
memory of batches. A restart needs the number of the next step and nothing else. With `decode_threads: 0` stages 2 to 4 run in
the caller and nothing is prefetched; the batches are the same.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from pretrain.batch import Batch
from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.buffers import Ring
from pretrain.data.dataset import Dataset
from pretrain.data.decode import log_decoder
from pretrain.data.fill import Filler
from pretrain.data.order import Rows, evaluation_slice
from pretrain.data.quarantine import BadSample
from pretrain.data.reader import blocks_in_use, evaluation_blocks, has_remote, open_reader, shares
from pretrain.data.skipped import NOTHING, Skipped
from pretrain.data.state import planned_order
from pretrain.data.workers import make_workers
from pretrain.draws import IntArray
from pretrain.hardware import cores_given

THREADS_A_PROCESS = 8
"""Where nothing but cropping and bookkeeping needs the interpreter: a tenth of an image's time. A policy needs it most of
the time, so that there each thread has a process."""

STEPS_AT_ONCE = 8
"""Whose rows are looked up together: a step that does so takes two milliseconds, and the others none."""

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Coming:
    """A batch whose first `num_filled` rows are being filled; the others will repeat the last of them."""

    batch: Batch
    num_filled: int
    jobs: list["Future[list[BadSample]]"]

    def wait(self) -> tuple[Batch, list[BadSample]]:
        """The batch, and what was replaced in it."""
        bad = [found for job in self.jobs for found in job.result()]
        for tensor in (self.batch.images, self.batch.labels):
            tensor[self.num_filled :] = tensor[self.num_filled - 1]
        return self.batch, bad

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()


class _Loader:
    """What training and evaluation share: workers, the queue before them, and how both end."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        model: ModelConfig,
        plan: Plan,
        make_view: Callable[[], TrainView | EvalView],
        ahead: int,
        *,
        in_use: int,
        share: float,
        replace_bad: bool,
        threads_a_process: int = THREADS_A_PROCESS,
    ) -> None:
        """ahead: requests that are under way while the caller uses one; with no thread, none is. in_use: blocks that
        samples are taken of at a time; share: see `shares`. Others: see `Filler` and `make_workers`."""
        num_threads = cores_given() if data.decode_threads == "auto" else data.decode_threads
        self._ahead = ahead if num_threads else 0
        self._pinned = plan.device == "cuda"
        shape = (*model.img_size, model.in_chans)
        self._ring = Ring(
            (plan.micro_batch, *shape),
            pinned=self._pinned,
            keep=(data.prefetch_steps + 2) * plan.accumulation,
        )
        self._workers = make_workers(
            data.workers,
            partial(
                Filler,
                dataset,
                data,
                model,
                make_view,
                replace_bad=replace_bad,
                global_batch=plan.global_batch,
            ),
            partial(open_reader, dataset, data, plan.block_samples, in_use, share),
            num_threads,
            shape,
            threads_a_process=threads_a_process,
            remote=has_remote(dataset),
        )
        self._bad: list[BadSample] = []
        self.wait_seconds = 0.0
        """Time that the consumer has waited for data, since the loader was made."""

    def _stream(self, requests: Iterator[list[tuple[Rows, BoolArray]]]) -> Iterator[list[Batch]]:
        """Batches of each request in turn, those of the next ones under way."""
        coming: deque[list[_Coming]] = deque()
        requests = self._workers.announced(requests, lambda request: (rows for rows, _ in request))
        try:
            while True:
                began = time.perf_counter()
                while len(coming) <= self._ahead and (request := next(requests, None)) is not None:
                    coming.append([self._start(rows, counts) for rows, counts in request])
                if not coming:
                    return
                batches = []
                for batch, bad in [started.wait() for started in coming.popleft()]:
                    batches.append(batch)
                    self._bad += bad
                self.wait_seconds += time.perf_counter() - began
                yield batches
        finally:
            for started in (started for request in coming for started in request):
                started.cancel()

    def _start(self, rows: Rows, counts: BoolArray) -> _Coming:
        """Begin a batch of these rows; counts: bool [b], false where a row at the end is padding."""
        batch = Batch(
            images=self._ring.take(),
            labels=torch.empty(len(counts), dtype=torch.int64, pin_memory=self._pinned),
            weights=self._tensor(counts.astype(np.float32)),
            positions=self._tensor(rows.position),
        )
        num_filled = max(1, int(counts.sum()))
        filled = Rows(*(array[:num_filled] for array in rows))
        images, labels = batch.images[:num_filled].numpy(), batch.labels[:num_filled].numpy()
        return _Coming(batch, num_filled, self._workers.start(filled, images, labels))

    def _tensor(self, values: npt.NDArray[np.float32] | IntArray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._pinned else tensor

    def close(self) -> None:
        """End the threads and close the files. Called by whoever made the loader; `with` does it."""
        self._workers.close()

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
        make_view = partial(TrainView, data.augment, model, data.interpolation, seed)
        replace_bad = data.max_bad_share > 0
        log_decoder()
        super().__init__(
            dataset, data, model, plan, make_view, data.prefetch_steps,
            in_use=blocks_in_use(plan, data),
            share=shares(data).training,
            replace_bad=replace_bad,
            threads_a_process=1 if data.augment.has_policy else THREADS_A_PROCESS,
        )  # fmt: skip
        self._plan, self._slice = plan, plan.slice_of(rank)
        self._order = planned_order(dataset, plan, seed)

    def steps(self, first_step: int, skipped: Skipped = NOTHING) -> Iterator[list[Batch]]:
        """For `first_step` (0 is the first of the run) and each that follows, without end: this rank's batches.

        skipped: batches of the order that no step takes.

        Each step has `plan.accumulation` batches of `plan.micro_batch` rows. Where the rank's slice is shorter, rows
        at its end repeat its last sample with weight 0. Raises `DataError` from whatever thread it happened in.
        """
        return self._stream(self._requests(first_step, skipped))

    def take_bad(self) -> list[BadSample]:
        """Bad samples that were replaced in the steps handed out since the last call."""
        taken, self._bad = self._bad, []
        return taken

    def _requests(self, step: int, skipped: Skipped) -> Iterator[list[tuple[Rows, BoolArray]]]:
        plan = self._plan
        start, stop = self._slice
        row = np.arange(plan.accumulation * plan.micro_batch)
        counts, row = row < stop - start, np.minimum(row, stop - start - 1)
        while True:
            steps = [skipped.batch(step + i) for i in range(STEPS_AT_ONCE)]
            for rows in self._order.several(steps, start, stop):
                yield [
                    (Rows(*(array[row[part]] for array in rows)), counts[part])
                    for part in _parts(plan.accumulation, plan.micro_batch)
                ]
            step += STEPS_AT_ONCE


class EvalLoader(_Loader):
    """Evaluation batches of one rank: over all ranks every sample counts once; all ranks have equally many batches."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, model: ModelConfig, plan: Plan, *, rank: int
    ) -> None:
        """Batches have `plan.micro_batch` rows. Starts threads: close it."""
        make_view = partial(EvalView, data.val_crop, data.interpolation)
        ahead = data.prefetch_steps * plan.accumulation
        super().__init__(
            dataset, data, model, plan, make_view, ahead,
            in_use=evaluation_blocks(plan, data), share=shares(data).evaluation, replace_bad=False,
        )  # fmt: skip
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
            zeros = np.zeros_like(number)
            yield [(Rows(shard, sample, zeros, number.copy(), zeros), counts)]


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i * size, (i + 1) * size) for i in range(count)]
