"""From rows of the order to rows of a batch: read, decode, augment. `workers` says in which thread or process."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig, ModelConfig, Plan
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.dataset import Dataset
from pretrain.data.decode import BadSampleError, decode
from pretrain.data.order import Rows
from pretrain.data.read import LocalReader
from pretrain.data.resize import Pixels
from pretrain.data.tar import Sample
from pretrain.draws import IntArray


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
