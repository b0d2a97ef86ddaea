"""What threads and processes give a policy that needs the interpreter: images/s and CPU ms, on one thread and on more.

    python benchmarks/workers.py SHARDS                     timm's RandAugment, threads against processes, 1 and 2
    python benchmarks/workers.py SHARDS --policy none --threads 1 --threads 2 --threads 4

Loaders take turns, round by round; nothing is measured while another one still decodes ahead. A row's scaling is the median
over rounds of its speed to that of one thread in the same round. On a machine that does other work, look at CPU ms.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import click
import psutil
from rich.console import Console
from rich.table import Table

from pretrain.batch import Batch
from pretrain.config import Config, resolve
from pretrain.config.plan import Hardware
from pretrain.data import facts, open_dataset
from pretrain.data.loader import TrainLoader

POLICIES: dict[str, dict[str, object]] = {
    "randaugment_timm": {"randaugment_timm": {}},
    "randaugment_bv": {"randaugment_bv": {}},
    "three_augment": {"three_augment": True, "color_jitter": {"brightness": 0.3, "contrast": 0.3}},
    "none": {},
}
BATCH = 64


def loader(shards: str, kind: str, threads: int, policy: str, size: int) -> TrainLoader:
    dataset = open_dataset(shards)
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {
                "train": {"shards": shards}, "workers": kind, "decode_threads": threads, "prefetch_steps": 1,
                "augment": POLICIES[policy],
            },
            "model": {"size": "Ti", "img_size": (size, size), "patch_size": (size, size), "num_classes": dataset.labels[1] + 1},
            "optim": {"lr": 1e-3},
            "train": {"global_batch": BATCH, "total_steps": 1000},
        }
    )  # fmt: skip
    plan = resolve(config, 1, facts(dataset, None), Hardware("cpu", "benchmark", False))
    return TrainLoader(dataset, config.data, config.model, plan, seed=0, rank=0)


def cpu_seconds() -> float:
    """Of this process and of those that decode for it."""
    me = psutil.Process()
    times = [me.cpu_times(), *(child.cpu_times() for child in me.children())]
    return sum(t.user + t.system for t in times)


def take_turn(steps: Iterator[list[Batch]], count: int) -> tuple[float, float]:
    """(images/s, CPU ms of an image) over some steps, the one that was prepared before not among them."""
    next(steps)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(steps)
    wall = time.perf_counter() - wall
    cpu_ms = (cpu_seconds() - cpu) / (count * BATCH) * 1e3
    time.sleep(BATCH * 0.004)  # what was begun ahead ends before the next turn
    return count * BATCH / wall, cpu_ms


@click.command()
@click.argument("shards")
@click.option("--policy", type=click.Choice(list(POLICIES)), default="randaugment_timm", show_default=True)
@click.option(
    "--threads",
    multiple=True,
    type=int,
    default=(1, 2),
    show_default=True,
    help="The first is the reference.",
)
@click.option("--size", default=224, show_default=True, help="Side of a view in pixels.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps", default=6, show_default=True, help="Of a round.")
def main(shards: str, policy: str, threads: tuple[int, ...], size: int, rounds: int, steps: int) -> None:
    """Compare threads with processes at decoding the images of SHARDS under a policy."""
    cases = [(kind, count) for kind in ("threads", "processes") for count in threads]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    with ExitStack() as stack:
        loaders = {case: stack.enter_context(loader(shards, *case, policy, size)) for case in cases}
        batches = {case: made.steps(0) for case, made in loaders.items()}
        for turn in range(-1, rounds):  # the first is to warm up
            for case in cases:
                measured = take_turn(batches[case], steps)
                if turn >= 0:
                    found[case].append(measured)
    table = Table("workers", "threads", "images/s", "CPU ms an image", "to one of its kind", title=policy)
    for kind, count in cases:
        mine, one = found[kind, count], found[kind, threads[0]]
        ratios = [ours[0] / its[0] for ours, its in zip(mine, one, strict=True)]
        speed, cpu = (statistics.median(column) for column in zip(*mine, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(kind, str(count), f"{speed:,.0f}", f"{cpu:.2f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
