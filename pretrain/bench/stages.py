"""What an image costs stage by stage, and what that does to a training loop in the same interpreter."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from pretrain.bench.contenders import Setting, Work
from pretrain.bench.ours import loader, prepared
from pretrain.data.augment import TrainView
from pretrain.data.box import Box
from pretrain.data.decode import decode, jpegbox
from pretrain.data.read import LocalReader
from pretrain.data.resize import resize
from pretrain.data.state import planned_order
from pretrain.draws import FloatArray

_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_OPS_A_TURN = 200
_SECONDS_ALONE = 0.2
_SECONDS_TO_SETTLE = 0.2
"""Until what is decoded ahead is decoded."""


def stages(setting: Setting) -> Iterator[Work]:
    """One thread: each stage on the same samples, and the parts of them that run without the interpreter's lock."""
    torch.set_num_threads(1)
    dataset, config, plan = prepared(setting)
    order = planned_order(dataset, plan, seed=0)
    view = TrainView(config.data.augment, config.model, config.data.interpolation, seed=0)
    reader = LocalReader(dataset, plan.block_samples)
    out = np.empty((setting.size, setting.size, 3), np.uint8)
    for step in itertools.count():
        parts: dict[str, float] = defaultdict(float)
        with _into(parts, "order"):
            rows = order.batch(step)
        with _into(parts, "read"):
            samples = reader.read(rows.shard, rows.sample)
        with _into(parts, "augment"):
            draws = view.draws(rows.epoch, dataset.starts[rows.shard] + rows.sample, rows.repeat)
        for sample, drawn in zip(samples, draws, strict=True):
            boxes: list[Box] = []
            with _into(parts, "decode"):
                pixels = decode(sample.image, 3, config.data.max_pixels, partial(_noted, view, drawn, boxes))
            with _into(parts, "augment"):
                view.render(pixels, drawn, out)
            with _into(parts, "limit"):
                _raw(sample.image)
            with _into(parts, "kernel"):
                _decode_again(sample.image, boxes[-1])
                resize(pixels, out, config.data.interpolation)
        yield Work(len(samples), parts)


@contextmanager
def _into(parts: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of this thread to a part."""
    began = time.thread_time()
    yield
    parts[name] += time.thread_time() - began


def _noted(view: TrainView, draws: FloatArray, boxes: list[Box], height: int, width: int) -> Box:
    boxes.append(view.part(draws, height, width))
    return boxes[-1]


def _decode_again(data: memoryview, box: Box) -> None:
    """What `decode` does without the interpreter's lock."""
    pixels = np.empty((box.height, box.width, 3), np.uint8)
    if jpegbox is None or not jpegbox.decode(data, pixels, *box, 3):
        _raw(data)


def _raw(data: memoryview) -> Any:
    """The limit of whoever decodes whole pictures: libjpeg-turbo on the file."""
    return simplejpeg.decode_jpeg(data) if simplejpeg.is_jpeg(data) else decode(data, 3, 2**31)


def lock(setting: Setting) -> Iterator[Work]:
    """A loop that starts small tensor operations, as training does, while the loader works on another core.

    Parts: seconds that the loop neither computed nor waited for a core, beside threads and beside a process, less what
    it was so alone. They are spent waiting for the interpreter's lock.
    """
    torch.set_num_threads(1)
    steps = {kind: iter(loader(setting, kind, setting.cores).steps(0)) for kind in ("threads", "processes")}
    for kind in steps:
        next(steps[kind])
    tensor = torch.zeros(8)
    while True:
        time.sleep(_SECONDS_TO_SETTLE)
        blocked, computed = _compute(tensor, _SECONDS_ALONE)
        alone = blocked / computed
        parts = {}
        for kind in steps:
            time.sleep(_SECONDS_TO_SETTLE)
            batches = next(steps[kind])
            images = sum(map(len, batches))
            batch_seconds = images * 1e-3 / setting.cores  # about what the loader needs for one
            blocked, computed = _compute(tensor, batch_seconds)
            parts[kind] = blocked - alone * computed
        yield Work(images, parts)


def _compute(tensor: torch.Tensor, seconds: float) -> tuple[float, float]:
    """Seconds (blocked, computed) of operations of this thread, until they have computed for so long."""
    blocked, computed = 0.0, 0.0
    while computed < seconds:
        turn = _turn(tensor)
        blocked, computed = blocked + turn[0], computed + turn[1]
    return blocked, computed


def _turn(tensor: torch.Tensor) -> tuple[float, float]:
    """The same of a few operations."""
    began, before = time.perf_counter(), _SCHEDSTAT.read_text().split()
    for _ in range(_OPS_A_TURN):
        tensor.add_(1)
    wall, after = time.perf_counter() - began, _SCHEDSTAT.read_text().split()
    computed, queued = ((int(after[i]) - int(before[i])) / 1e9 for i in (0, 1))
    return wall - computed - queued, computed
