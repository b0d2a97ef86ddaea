"""`python -m launch.preflight CONFIG`: every rank sees what it will need, or the job ends with the culprit's name.

Started as the training will be, by the same launcher on the same nodes, and ended after a minute, or after the profile's
`preflight_minutes`: the run directory, the shards, the device, then a sum over all ranks through the network that training
uses.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import click

from pretrain import command, run_dir, world
from pretrain.config import Config, load
from pretrain.errors import PeerError, UserError

NETWORK_SECONDS = 30


class PreflightError(UserError):
    """A rank does not see what it needs."""

    exit_code = 10


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--seconds",
    type=click.IntRange(1),
    default=NETWORK_SECONDS,
    show_default=True,
    help="Patience with the network.",
)
def preflight(config: Path, seconds: int) -> None:
    """See that this rank can write the run directory of CONFIG, read its shards, and use its device and the network."""
    place = world.from_environment(os.environ)
    settings = load(config)
    directory = Path(settings.run.dir)
    looks: dict[str, Callable[[], None]] = {
        "run directory": lambda: run_dir.check_writable(directory),
        "shards": lambda: _see_shards(settings),
        "device": lambda: _see_device(place),
        "network": lambda: _see_network(place, directory, seconds),
    }
    arrived = _arrived(directory, place.rank)
    for what, look in looks.items():
        try:
            look()
            if what == "run directory":
                arrived.parent.mkdir(parents=True, exist_ok=True)
                arrived.touch()
        except (UserError, OSError, RuntimeError) as error:
            words = f"{run_dir.node()} sees no {what}: {str(error).strip() or type(error).__name__}"
            if not isinstance(error, PeerError):
                with contextlib.suppress(OSError):  # the run directory itself may be what is missing
                    run_dir.record_failure(directory, place.rank, error, words)
            raise PreflightError(f"rank {place.rank} on {words}") from error
    arrived.unlink(missing_ok=True)


def _see_shards(config: Config) -> None:
    """Open what the training will, and read a little of it."""
    from pretrain.data import open_dataset, open_training
    from pretrain.data.store import Stores
    from pretrain.data.urls import is_remote

    seconds = config.data.read_timeout_seconds
    datasets = [open_training(config.data.train, seconds)]
    if config.data.val is not None:
        datasets.append(open_dataset(config.data.val.shards, seconds))
    for path in {dataset.paths[0] for dataset in datasets}:
        if is_remote(path):
            Stores(seconds).read(path, 0, 512)
            continue
        with Path(path).open("rb") as file:
            file.read(512)


def _see_device(place: world.World) -> None:
    """Use the device a little; a node that was allocated GPUs has to have them."""
    import torch

    from pretrain.distributed import device_of

    if os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0" and not torch.cuda.is_available():
        raise RuntimeError("Slurm allocated GPUs here, but CUDA sees no device")
    total = torch.ones(8, device=device_of(place)).sum().item()
    if total != 8:
        raise RuntimeError(f"eight ones add up to {total}")


def _see_network(place: world.World, directory: Path, seconds: int) -> None:
    import torch
    import torch.distributed as dist

    from pretrain.distributed import device_of, joined

    try:
        with joined(place, device_of(place), seconds) as ranks:
            one = torch.ones(1, device=ranks.device)
            dist.all_reduce(one)
            if one.item() != place.size:
                raise RuntimeError(f"{place.size} ranks add up to {one.item()}")
    except RuntimeError as error:
        absent = [rank for rank in range(place.size) if not _arrived(directory, rank).exists()]
        if absent:
            raise PeerError(
                f"waited {seconds} s for rank{'s' if len(absent) > 1 else ''} "
                f"{', '.join(_with_node(rank, place.size) for rank in absent[:8])} of {place.size}, which never came so far"
            ) from error
        raise


def _with_node(rank: int, size: int) -> str:
    """A rank and, where the batch script says them, the node that it is to run on: each has as many ranks, one after the other."""
    nodes = os.environ.get("PRETRAIN_NODES", "").split()
    return f"{rank} on {nodes[rank * len(nodes) // size]}" if nodes else str(rank)


def _arrived(directory: Path, rank: int) -> Path:
    """A file that says that a rank of this attempt is there: its node runs, and sees the run directory."""
    job, restart = (os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return directory / "logs" / f"preflight_{job}_{restart}_{rank}"


if __name__ == "__main__":
    command.run(preflight, "python -m launch.preflight")
