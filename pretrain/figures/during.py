"""Figures of a model in training."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.distributed import Ranks
from pretrain.engine import Engine
from pretrain.errors import CheckpointError
from pretrain.figures.attention import attention_of
from pretrain.figures.draw import draw
from pretrain.figures.look import look, needed_weights
from pretrain.logs import log
from pretrain.tracking import Tracker

FOLDER = "figures"
NUM_IMAGES = 8


class RunFigures:
    """All ranks make one and call it together; rank 0 draws."""

    def __init__(
        self, engine: Engine, ranks: Ranks, images: Tensor, run_dir: Path, tracker: Tracker | None
    ) -> None:
        """images: uint8 [B, H, W, C], the same on all ranks."""
        self._engine, self._ranks, self._images = engine, ranks, images
        self._run_dir, self._tracker = run_dir, tracker

    def __call__(self, step: int) -> Mapping[str, float]:
        """Draw the figures of this moment and keep them with the run; returns their numbers, on rank 0. A run does not
        end for want of a picture: what cannot be drawn is said in the log."""
        weights = self._engine.whole(needed_weights(self._engine.config.model))
        with attention_of(self._engine.model) as heard:
            self._engine.forward(_as_batch(self._images))
        numbers: Mapping[str, float] = {}
        with self._ranks.together():
            if self._ranks.is_main:
                folder = Path(FOLDER) / f"step_{step:08d}"
                drawn: list[Path] = []
                try:
                    found = look(self._engine.config.model, weights, self._images, heard)
                    numbers = found.metrics()
                    drawn = draw(found, f"{self._run_dir.name}, step {step:,}", self._run_dir / folder)
                except (CheckpointError, OSError) as error:
                    log.warning("no figures of step %d: %s", step, error)
                if self._tracker is not None:
                    for path in drawn:
                        self._tracker.artifact(folder / path.name)
        return numbers


def _as_batch(images: Tensor) -> Batch:
    count = len(images)
    return Batch(images, torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.arange(count))
