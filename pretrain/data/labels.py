"""Labels that the model has no class for, before training begins.

A manifest says which labels lie lowest and highest, not how many are where. So only where the highest is beyond the
model some samples are looked at, in even steps: what a run that meets such samples would refuse is refused here, with
the config as its reason, and a stray label is left to the quarantine.
"""

from itertools import pairwise

import numpy as np

from pretrain.config import DataConfig
from pretrain.data.dataset import Dataset
from pretrain.data.quarantine import allowed
from pretrain.data.reader import announced, open_reader
from pretrain.draws import IntArray
from pretrain.errors import BadSampleError, DataError
from pretrain.logs import log

LOOKED_AT = 512
"""Samples of each source; all of a smaller one."""

READ_AT_ONCE = 32
"""Of a store: they are as many blocks, each of one sample, and may be large."""


def check_labels(dataset: Dataset, data: DataConfig, num_classes: int) -> None:
    """Raise `DataError` where training on `dataset` would not go far: see above. One process does it for all ranks.

    Raises, too, where the manifest names more classes than the model has, whatever the labels.
    """
    names = dataset.class_names or ()
    if len(names) > num_classes:
        raise DataError(
            f"{dataset.source}: its manifest names {len(names)} classes, and labels go up to {dataset.labels[1]}, "
            f"but model.num_classes is {num_classes}\n"
            f"  Set model.num_classes to at least {len(names)}, or pack the shards with fewer classes."
        )
    if dataset.labels[1] < num_classes:
        return
    if data.max_bad_share == 0:
        dataset.require_classes(num_classes)
    labels = _look(dataset, data)
    beyond = labels[labels >= num_classes]
    found = (
        f"{dataset.source}: labels go up to {dataset.labels[1]}, but model.num_classes is {num_classes}; "
        f"{len(beyond):,} of {len(labels):,} samples looked at have a label from {num_classes} on"
    )
    if len(beyond) > allowed(data.max_bad_share, len(labels)):
        raise DataError(
            f"{found}, more than data.max_bad_share {data.max_bad_share:g} allows\n"
            f"  Set model.num_classes to at least {beyond.max() + 1}, or fix the labels:\n"
            f"  `pretrain shards verify FOLDER --num-classes {num_classes}` names the samples."
        )
    log.warning("%s; such samples are set aside (data.max_bad_share)", found)


def _look(dataset: Dataset, data: DataConfig) -> IntArray:
    """Labels of samples in even steps through each source; without samples that are bad in another way."""
    bounds = np.cumsum([0, *(dataset.source_samples if dataset.source_shards else (len(dataset),))])
    parts = [
        start + (2 * np.arange(count) + 1) * (stop - start) // (2 * count)
        for start, stop in pairwise(bounds)
        if (count := min(LOOKED_AT, stop - start))
    ]
    reader = open_reader(dataset, data.without_cache(), block_samples=1, blocks_in_use=READ_AT_ONCE)
    labels = []
    try:
        places = (dataset.locate(np.array([number])) for number in np.concatenate(parts))
        for place in announced(places, lambda place: place, reader):
            try:
                labels.append(reader.read(*place)[0].label)
            except BadSampleError:
                continue
    finally:
        reader.close()
    return np.array(labels, np.int64)
