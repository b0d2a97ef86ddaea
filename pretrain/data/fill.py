"""From rows of the order to rows of a batch: read, decode, augment. `workers` says in which thread or process."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pretrain import faults
from pretrain.config import DataConfig, ModelConfig
from pretrain.data.augment import EvalView, TrainView
from pretrain.data.box import Box, Pixels
from pretrain.data.dataset import Dataset
from pretrain.data.decode import decode
from pretrain.data.order import Rows
from pretrain.data.quarantine import BadSample, replaced
from pretrain.data.reader import Reader
from pretrain.data.tar import Sample
from pretrain.draws import IntArray
from pretrain.errors import BadSampleError, DataError

_NOT_REPLACED = (
    "Nothing stands in for a bad sample in an evaluation, nor where data.max_bad_share is 0:\n"
    "  mend the shard, or write it again without the sample."
)


class Filler:
    """Fills rows with the view of their sample; any number of threads may call `fill` at a time."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        model: ModelConfig,
        make_view: Callable[[], TrainView | EvalView],
        reader: Reader,
        *,
        replace_bad: bool,
        global_batch: int,
    ) -> None:
        """All of it but the reader, whoever made it closes it, can be sent to another process.

        global_batch: that positions are counted in, to tell their step.
        replace_bad: another sample stands in for a bad one (see `quarantine`), which else is an error.
        """
        self._dataset, self._view, self._reader = dataset, make_view(), reader
        self._max_pixels, self._model = data.max_pixels, model
        self._replace_bad, self._global_batch = replace_bad, global_batch

    def fill(self, rows: Rows, images: npt.NDArray[np.uint8], labels: IntArray) -> list[BadSample]:
        """Write images uint8 [n, H, W, C] and labels int64 [n] of n rows. Returns what was replaced.

        Raises `DataError`, also for a bad sample that nothing may stand in for.
        """
        faults.at("data", int(rows.position[0]) // self._global_batch)
        draws = self._view.draws(rows.epoch, self._dataset.starts[rows.shard] + rows.sample, rows.repeat)
        bad = []
        for i, sample in enumerate(self._read(rows)):
            shard, number = int(rows.shard[i]), int(rows.sample[i])
            part = partial(self._view.part, draws[i])
            try:
                pixels, label = self._decode(part, shard, number, sample)
            except BadSampleError as error:
                if not self._replace_bad:
                    raise DataError(f"{error}\n  {_NOT_REPLACED}") from None
                bad.append(self._bad(rows, i, error))
                samples = self._dataset.shards[shard].samples
                pixels, label = replaced(number, samples, partial(self._decode, part, shard))
            self._view.render(pixels, draws[i], images[i])
            labels[i] = label
        return bad

    def _read(self, rows: Rows) -> Sequence[Sample | None]:
        """The samples; none for each where one of them is bad, so that they are read again one by one."""
        try:
            return self._reader.read(rows.shard, rows.sample)
        except BadSampleError:
            return [None] * len(rows.shard)

    def _decode(
        self, part: Callable[[int, int], Box], shard: int, number: int, sample: Sample | None = None
    ) -> tuple[Pixels, int]:
        """Part of the picture, and class of a sample, read here where it is not given.

        Raises `BadSampleError` naming it.
        """
        if sample is None:
            [sample] = self._reader.read(np.array([shard]), np.array([number]))
        try:
            if sample.label >= self._model.num_classes:
                raise BadSampleError(f"label {sample.label}; model.num_classes is {self._model.num_classes}")
            return decode(sample.image, self._model.in_chans, self._max_pixels, part), sample.label
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
