"""The settings of a run for nothing but passing over images as it does in its evaluations."""

from pretrain.config.augment import AugmentConfig
from pretrain.config.data import TrainSourceConfig
from pretrain.config.schema import Config, ObjectiveConfig, OptimConfig, TrainConfig


def for_evaluation(config: Config, batch: int, world_size: int) -> Config:
    """A config that reads and resizes images as `config` does, and resolves to batches of `batch` on each rank.

    What decides about the run's own training samples and steps (sources, lanes, augmentation, length, warm-up) means
    nothing on a validation set, and may not fit one.
    """
    data = {"train": TrainSourceConfig(shards=""), "lanes": None, "augment": AugmentConfig()}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "objective": ObjectiveConfig(),
            "optim": OptimConfig(lr=1.0),
            "train": TrainConfig(global_batch=batch * world_size, micro_batch=batch, total_steps=1),
        }
    )
