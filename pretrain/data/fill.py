"""From rows of the order to rows of a batch: read, decode, augment. `workers` says in which thread or process."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.dataset import Dataset
from pretrain.data.decode import decode
from pretrain.data.order import Rows
from pretrain.data.quarantine import BadSample, replaced
from pretrain.data.reader import announced, blocks_in_use, evaluation_blocks, open_reader
from pretrain.data.resize import Pixels
from pretrain.data.tar import Sample
from pretrain.draws import IntArray
from pretrain.errors import BadSampleError, DataError

_NOT_REPLACED = (
    "Nothing stands in for a bad sample in an evaluation, nor where data.max_bad_share is 0:\n"
    "  mend the shard, or write it again without the sample."
)

R = TypeVar("R")


class Filler:
    """Fills rows with the view of their sample; any number of threads may call `fill` at a time."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        model: ModelConfig,
        plan: Plan,
        make_view: Callable[[], TrainView | EvalView],
        *,
        replace_bad: bool,
    ) -> None:
        """All of it can be sent to another process; what is made here need not.

        replace_bad: another sample stands in for a bad one (see `quarantine`), which else is an error.
        """
        self._dataset, self._view = dataset, make_view()
        self._max_pixels, self._model = data.max_pixels, model
        self._replace_bad = replace_bad
        in_use = blocks_in_use if isinstance(self._view, TrainView) else evaluation_blocks
        self._reader = open_reader(dataset, data, plan.block_samples, in_use(plan, data))

    def fill(self, rows: Rows, images: npt.NDArray[np.uint8], labels: IntArray) -> list[BadSample]:
        """Write images uint8 [n, H, W, C] and labels int64 [n] of n rows. Returns what was replaced.

        Raises `DataError`, also for a bad sample that nothing may stand in for.
        """
        draws = self._view.draws(rows.epoch, self._dataset.starts[rows.shard] + rows.sample, rows.repeat)
        bad = []
        for i, sample in enumerate(self._read(rows)):
            shard, number = int(rows.shard[i]), int(rows.sample[i])
            try:
                pixels, label = self._decode(shard, number, sample)
            except BadSampleError as error:
                if not self._replace_bad:
                    raise DataError(f"{error}\n  {_NOT_REPLACED}") from None
                bad.append(self._bad(rows, i, error))
                samples = self._dataset.shards[shard].samples
                pixels, label = replaced(number, samples, partial(self._decode, shard))
            self._view.render(pixels, draws[i], images[i])
            labels[i] = label
        return bad

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        """The same requests, the blocks of their rows read ahead."""

        def places(request: R) -> tuple[IntArray, IntArray]:
            rows = list(rows_of(request))
            return np.concatenate([r.shard for r in rows]), np.concatenate([r.sample for r in rows])

        return announced(requests, places, self._reader)

    def close(self) -> None:
        self._reader.close()

    def _read(self, rows: Rows) -> Sequence[Sample | None]:
        """The samples; none for each where one of them is bad, so that they are read again one by one."""
        try:
            return self._reader.read(rows.shard, rows.sample)
        except BadSampleError:
            return [None] * len(rows.shard)

    def _decode(self, shard: int, number: int, sample: Sample | None = None) -> tuple[Pixels, int]:
        """Picture and class of a sample, read here where it is not given; raises `BadSampleError` naming it."""
        if sample is None:
            [sample] = self._reader.read(np.array([shard]), np.array([number]))
        try:
            if sample.label >= self._model.num_classes:
                raise BadSampleError(f"label {sample.label}; model.num_classes is {self._model.num_classes}")
            return decode(sample.image, self._model.in_chans, self._max_pixels), sample.label
        except BadSampleError as bad:
            where = f"{self._dataset.paths[shard]}, sample {number}"
            raise BadSampleError(bad.reason, where, sample.key) from None

    def _bad(self, rows: Rows, row: int, error: BadSampleError) -> BadSample:
        return BadSample(
            self._dataset.paths[rows.shard[row]],
            int(rows.sample[row]),
            error.key,
            error.reason,
            int(rows.epoch[row]),
            int(rows.position[row]),
            int(rows.repeat[row]),
        )
