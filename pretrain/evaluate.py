"""`pretrain evaluate`: the exact score of a run's checkpoint on a validation set."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pretrain import command, world
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.checkpoint.load import WeightsFile
    from pretrain.data import Dataset
    from pretrain.distributed import Ranks
    from pretrain.score import Scores

TIMEOUT_SECONDS = 600
"""A rank that keeps the others waiting for longer has failed."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--which",
    type=click.Choice(["best", "last"]),
    default="last",
    show_default=True,
    help="Checkpoint of RUN.",
)
@click.option("--shards", metavar="SOURCE", help="Shards to evaluate on; by default the config's data.val.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images of a forward pass."
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(run: Path, which: str, shards: str | None, batch: int, as_json: bool) -> None:
    """Score a checkpoint on every image of a validation set, each once.

    RUN is a run directory or a step_N folder of its checkpoints. Runs in one process, or in several under torchrun.
    """
    place = world.from_environment(os.environ)
    with command.one_speaker(place):
        facts, scores = _evaluate(place, run, which, shards, batch)
    if place.is_main:
        click.echo(json.dumps(scores.metrics() | facts) if as_json else f"step {facts['step']}: {scores}")


def _evaluate(
    place: world.World, run: Path, which: str, shards: str | None, batch: int
) -> "tuple[dict[str, Any], Scores]":
    """What was scored, and its scores. All ranks."""
    from pretrain.checkpoint.load import open_weights_together
    from pretrain.data import open_dataset
    from pretrain.distributed import device_of, joined
    from pretrain.hardware import raise_descriptor_limit

    raise_descriptor_limit()
    with joined(place, device_of(place), TIMEOUT_SECONDS) as ranks:
        source = open_weights_together(run, which, ranks)
        opened = None
        with ranks.together():
            val = source.config.data.val
            if shards is None and val is None:
                raise ConfigError(
                    f"the config of {run} names no data.val; say what to evaluate on with --shards"
                )
            if ranks.is_main:
                seconds = source.config.data.read_timeout_seconds
                opened = open_dataset(shards or val.shards, seconds)  # type: ignore[union-attr]
                opened.require_classes(source.model.num_classes)
        dataset = ranks.broadcast(opened)
        facts = {"checkpoint": str(source.path), "step": source.step, "digest": dataset.digest}
        return facts, _score(source, dataset, batch, ranks)


def _score(source: "WeightsFile", dataset: "Dataset", batch: int, ranks: "Ranks") -> "Scores":
    import torch
    from tqdm import tqdm

    from pretrain.batch import Batch
    from pretrain.config import for_evaluation, resolve
    from pretrain.data import facts
    from pretrain.data.loader import EvalLoader
    from pretrain.hardware import detect
    from pretrain.model import build
    from pretrain.score import score

    model = build(source.model, source.weights).to(ranks.device).eval()

    @torch.inference_mode()
    def forward(samples: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(samples.images.to(ranks.device))
        return logits

    enough = -(-len(dataset) // ranks.size)
    reading = for_evaluation(source.config, min(batch, enough), ranks.size)
    plan = resolve(reading, ranks.size, facts(dataset, None), detect())
    with ExitStack() as stack:
        with ranks.together():  # a disk of one node may have no room for its cache
            loader = stack.enter_context(
                EvalLoader(dataset, reading.data, source.model, plan, rank=ranks.rank)
            )
        shown = tqdm(loader, desc="evaluating", unit="batch", disable=None if ranks.is_main else True)
        return score(forward, shown, source.config, len(dataset), ranks)
