"""From rows of the order to rows of a batch: read, decode, augment. `workers` says in which thread or process."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.dataset import Dataset
from pretrain.data.decode import BadSampleError, decode
from pretrain.data.order import Rows
from pretrain.data.reader import EVALUATION_BLOCKS, announced, blocks_in_use, open_reader
from pretrain.data.resize import Pixels
from pretrain.data.tar import Sample
from pretrain.draws import IntArray

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
    ) -> None:
        """All of it can be sent to another process; what is made here need not."""
        self._dataset, self._view = dataset, make_view()
        self._max_pixels, self._model = data.max_pixels, model
        in_use = blocks_in_use(plan, data) if isinstance(self._view, TrainView) else EVALUATION_BLOCKS
        self._reader = open_reader(dataset, data, plan.block_samples, in_use)

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

    def announced(self, requests: Iterator[R], rows_of: Callable[[R], Iterable[Rows]]) -> Iterator[R]:
        """The same requests, the blocks of their rows read ahead."""

        def places(request: R) -> tuple[IntArray, IntArray]:
            rows = list(rows_of(request))
            return np.concatenate([r.shard for r in rows]), np.concatenate([r.sample for r in rows])

        return announced(requests, places, self._reader)

    def close(self) -> None:
        self._reader.close()

    def _decode(self, sample: Sample) -> Pixels:
        if sample.label >= self._model.num_classes:
            raise BadSampleError(f"label {sample.label}; model.num_classes is {self._model.num_classes}")
        return decode(sample.image, self._model.in_chans, self._max_pixels)
