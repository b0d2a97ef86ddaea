"""A few real images of a run's validation set, as the model was evaluated on them."""

from torch import Tensor

from pretrain.config import Config, for_evaluation, resolve
from pretrain.config.plan import Hardware
from pretrain.data import facts, open_dataset
from pretrain.data.loader import EvalLoader
from pretrain.errors import DataError
from pretrain.logs import log


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
    with EvalLoader(dataset, reading.data, reading.model, plan, rank=0) as loader:
        batch = next(iter(loader))
    return batch.images[batch.weights > 0]
