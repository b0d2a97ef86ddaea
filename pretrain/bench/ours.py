"""Our own pipeline as feeds."""

import os
import time
from collections.abc import Iterator

import torch

from pretrain.bench.contenders import Setting, Work
from pretrain.config import Config, Plan, resolve
from pretrain.config.plan import Hardware
from pretrain.data import Dataset, decode, facts, open_dataset
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
    for batches in loader(setting, "threads", len(os.sched_getaffinity(0))).steps(0):
        yield Work(sum(map(len, batches)))


def processes(setting: Setting) -> Iterator[Work]:
    for batches in loader(setting, "processes", setting.cores).steps(0):
        yield Work(sum(map(len, batches)))


def whole_pictures(setting: Setting) -> Iterator[Work]:
    """As where the native part is not there: the box of a view is cut out of a decoded picture."""
    decode.jpegbox = None  # type: ignore[assignment]  # a module, or none
    return threads(setting)


def paced(setting: Setting) -> Iterator[Work]:
    """A step loop that sleeps for as long as a step of `pace` images per second computes, beside the loader's threads.

    Parts: seconds of waiting for data, as training measures them, and of all.
    """
    mine = loader(setting, "threads", setting.cores)
    steps = mine.steps(0)
    while True:
        began, waited = time.perf_counter(), mine.wait_seconds
        images = sum(map(len, next(steps)))
        time.sleep(images / setting.pace)
        yield Work(images, {"waiting": mine.wait_seconds - waited, "all": time.perf_counter() - began})


def normalised(setting: Setting) -> Iterator[Work]:
    """As float32 [b, C, H, W] with mean and deviation taken out, which training leaves to the device."""
    torch.set_num_threads(1)
    for batches in loader(setting, "threads", setting.cores).steps(0):
        for batch in batches:
            batch.images.permute(0, 3, 1, 2).float().sub_(MEAN).div_(STD)
            yield Work(len(batch))
