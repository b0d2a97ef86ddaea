"""Our own pipeline as feeds."""

from collections.abc import Iterator

import torch

from pretrain.bench.contenders import Setting, Work
from pretrain.config import Config, Plan, resolve
from pretrain.config.plan import Hardware
from pretrain.data import Dataset, facts, open_dataset
from pretrain.data.loader import TrainLoader

MEAN, STD = 127.5, 127.5


def prepared(setting: Setting, **data: object) -> tuple[Dataset, Config, Plan]:
    """The data set, a config for the setting, and its plan."""
    dataset = open_dataset(setting.shards)
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"shards": setting.shards}, **data},
            "model": {
                "size": "Ti",
                "img_size": (setting.size, setting.size),
                "patch_size": (setting.size, setting.size),
                "num_classes": dataset.labels[1] + 1,
            },
            "optim": {"lr": 1.0},
            "train": {"global_batch": setting.batch, "total_steps": 1},
        }
    )
    return dataset, config, resolve(config, 1, facts(dataset, None), Hardware("cpu", "", False))


def loader(setting: Setting, workers: str, num_threads: int) -> TrainLoader:
    dataset, config, plan = prepared(setting, workers=workers, decode_threads=num_threads)
    return TrainLoader(dataset, config.data, config.model, plan, seed=0, rank=0)


def threads(setting: Setting) -> Iterator[Work]:
    """As many decode threads as the process has cores."""
    import os

    for batches in loader(setting, "threads", len(os.sched_getaffinity(0))).steps(0):
        yield Work(sum(map(len, batches)))


def processes(setting: Setting) -> Iterator[Work]:
    for batches in loader(setting, "processes", setting.cores).steps(0):
        yield Work(sum(map(len, batches)))


def normalised(setting: Setting) -> Iterator[Work]:
    """As float32 [b, C, H, W] with mean and deviation taken out, which training leaves to the device."""
    torch.set_num_threads(1)
    for batches in loader(setting, "threads", setting.cores).steps(0):
        for batch in batches:
            batch.images.permute(0, 3, 1, 2).float().sub_(MEAN).div_(STD)
            yield Work(len(batch))
