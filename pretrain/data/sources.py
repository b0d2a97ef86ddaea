"""Several sources of training samples as one data set: global shard numbers, one digest over all of them."""

from collections import Counter

from pretrain.config import TrainSourceConfig
from pretrain.data.dataset import Dataset, open_dataset
from pretrain.data.store import TIMEOUT_SECONDS
from pretrain.errors import DataError


def open_training(config: TrainSourceConfig, timeout_seconds: float = TIMEOUT_SECONDS) -> Dataset:
    """What the config trains on. Of a mixture: all shards of the first source, then of the second, and so on.

    Raises `DataError` as `open_dataset` does, and where sources name their classes differently or share a shard.
    """
    opened = [open_dataset(pattern, timeout_seconds) for pattern in config.patterns]
    if len(opened) == 1:
        return opened[0]
    _require_one_label_space(config.names, opened)
    paths = tuple(path for dataset in opened for path in dataset.paths)
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(
            f"data.train.mix: {twice[0]} belongs to two sources; give its samples more weight by `weight` instead"
        )
    return Dataset(
        source="::".join(config.patterns),
        paths=paths,
        shards=tuple(shard for dataset in opened for shard in dataset.shards),
        labels=(min(d.labels[0] for d in opened), max(d.labels[1] for d in opened)),
        class_names=opened[0].class_names,
        source_shards=tuple(len(dataset.shards) for dataset in opened),
        indexes=tuple(d.index_of(i) for d in opened for i in range(len(d.paths)))
        if any(d.indexes for d in opened)
        else (),
    )


def _require_one_label_space(names: tuple[str, ...], opened: list[Dataset]) -> None:
    """Label 7 has to mean the same everywhere, as far as the manifests say what labels mean."""
    first = opened[0].class_names
    for name, dataset in zip(names, opened, strict=True):
        if dataset.class_names != first:
            raise DataError(
                f"data.train.mix: the sources {names[0]} ({_described(first)}) and {name} "
                f"({_described(dataset.class_names)}) do not name the same classes in the same order, so a label means "
                "something else in each.\n  Pack them again with one list of classes, or train on one of them."
            )


def _described(class_names: tuple[str, ...] | None) -> str:
    if class_names is None:
        return "classes without names"
    return f"{len(class_names)} classes: {', '.join(class_names[:3])}, ..."
