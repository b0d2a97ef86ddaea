"""A few real images: of a run's validation set, as the model was evaluated on them, or of a photograph that is always there."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.config import Config, ModelConfig, for_evaluation, resolve
from pretrain.config.plan import Hardware
from pretrain.data import facts, open_dataset
from pretrain.data.loader import EvalLoader
from pretrain.errors import DataError
from pretrain.logs import log

_PHOTOGRAPH = "grace_hopper.jpg"
"""A picture that matplotlib brings along, for comparing on something that is not noise."""

_NUM_PARTS = 8


def validation_images(config: Config, count: int = 16) -> Tensor | None:
    """The first `count` images, uint8 [count, H, W, C]; None, and a line in the log, where the set is not at hand."""
    if config.data.val is None:
        return None
    try:
        dataset = open_dataset(config.data.val.shards)
    except DataError as error:
        log.warning("the run's validation set is not at hand: %s", error)
        return None
    reading = for_evaluation(config, count, 1)
    plan = resolve(reading, 1, facts(dataset, None), Hardware("cpu", "", has_bf16=False))
    with EvalLoader(dataset, reading.data.without_cache(), reading.model, plan, rank=0) as loader:
        batch = next(iter(loader))
    return batch.images[batch.weights > 0]


def photographs(model: ModelConfig) -> Tensor | None:
    """uint8 [8, H, W, C]: parts of a photograph at the model's size; None where it is not at hand."""
    from matplotlib.cbook import get_sample_data

    try:
        file = get_sample_data(_PHOTOGRAPH, asfileobj=False)
        with Image.open(str(file)) as photograph:
            picture = photograph.convert("RGB" if model.in_chans == 3 else "L")
    except OSError:
        return None
    height, width = model.img_size
    parts = []
    for number in range(_NUM_PARTS):
        side = min(picture.size) * (number + 4) // (_NUM_PARTS + 4)
        left = (picture.width - side) * number // _NUM_PARTS
        top = (picture.height - side) * (_NUM_PARTS - 1 - number) // _NUM_PARTS
        part = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        parts.append(np.asarray(part).reshape(height, width, model.in_chans))
    return torch.from_numpy(np.stack(parts))
