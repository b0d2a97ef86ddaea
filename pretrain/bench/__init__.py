"""`pretrain bench`: what this machine does, in numbers that a noisy neighbour changes little.

Contenders are processes of their own, pinned to as many cores, stopped while another one has its turn. They take turns in
rounds, in an order that rotates; what counts is CPU time and the median of the ratios within a round.
"""

import click

from pretrain.errors import ConfigError


@click.group()
def bench() -> None:
    """Measure what this machine does."""


@bench.command("data")
@click.argument("shards")
@click.option(
    "--rate",
    type=click.FloatRange(min=1),
    help="Images per second that training takes; how many cores feed it?",
)
@click.option(
    "--pace",
    type=click.FloatRange(min=1),
    help="Images per second of a step loop beside the loader; which share of its time does it wait for data?",
)
@click.option(
    "--size", type=click.IntRange(min=1), default=224, show_default=True, help="Side of a view in pixels."
)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--cores", type=click.IntRange(min=1), default=1, show_default=True, help="Of each contender.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--images", type=click.IntRange(min=1), default=1024, show_default=True, help="Of a round.")
@click.option(
    "--peers/--no-peers",
    default=True,
    show_default=True,
    help="Compare with other libraries, where installed.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=300,
    show_default=True,
    help="Seconds that a contender may take for a round; one that takes longer is left out.",
)
@click.option("--only", multiple=True, metavar="NAME", help="This contender; may be given several times.")
def data_command(
    shards: str, rate: float | None, pace: float | None, size: int, batch: int, cores: int, rounds: int, images: int,
    peers: bool, timeout: float, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure the input pipeline on SHARDS: CPU milliseconds of an image, stage by stage, and against its peers.

    SHARDS is what data.train.shards is. Everything decodes, crops at random, resizes and mirrors. Peers: webdataset with
    torchvision, timm's reader, NVIDIA DALI on the CPU (pip install nvidia-dali-cuda130).
    """
    import os
    import tempfile

    from pretrain.bench import report
    from pretrain.bench.contenders import Setting, chosen
    from pretrain.bench.rounds import interleaved
    from pretrain.data import open_dataset

    usable = len(os.sched_getaffinity(0))
    if cores > usable:
        raise ConfigError(f"--cores {cores}: this process may run on {usable} cores; use at most that many")
    paths = tuple(map(str, open_dataset(shards).paths))
    names = chosen(peers, only, cores, usable, paced=pace is not None)
    click.echo(
        f"{', '.join(names)}: {rounds} rounds of {images} images, {cores} core{'s'[: cores > 1]} each",
        err=True,
    )
    with tempfile.TemporaryDirectory(prefix="pretrain-bench-") as scratch:
        setting = Setting(paths, shards, size, batch, cores, images, scratch, pace or 0)
        measured = interleaved(names, setting, rounds, timeout)
    report.show(measured, setting, rate)
