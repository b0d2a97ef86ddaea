"""What saving and loading a checkpoint cost a rank: time, and host memory beyond what it held before.

    python benchmarks/checkpoint.py                     a ViT-S/16, ZeRO stages 1 and 3, on 1, 2 and 4 ranks
    python benchmarks/checkpoint.py --size B --worlds 8 --stages 3

A rank's own part is its slices of weights and moments, fp32: 12 bytes a parameter over the number of ranks (AdamW).
Memory is the rank's highest resident size during the call beyond that before it, the worst rank's: a load also makes
the moments, so its least is two thirds of the part; a save copies the part, so its least is the part. At stages 1 and 2 a
load ends with the gather of all weights that each step ends with too: its buffer takes 4 bytes a parameter, whatever the
number of ranks.
"""

import multiprocessing
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from pretrain import logs
from pretrain.batch import Batch
from pretrain.checkpoint.load import newest_valid
from pretrain.checkpoint.save import Content, Saver
from pretrain.config import Config, resolve
from pretrain.config.plan import DataFacts
from pretrain.config.sizes import SIZES
from pretrain.data.pool import end_with_parent
from pretrain.distributed import Ranks, joined
from pretrain.engine import Engine
from pretrain.hardware import detect
from pretrain.model import InitialWeights
from pretrain.world import World

MIB = 2**20
LR = 1e-3


@dataclass(frozen=True)
class Costs:
    """Of one rank; bytes and seconds. own: its part; stall: what training stands still for a save."""

    own: int
    stall: float
    saving: float
    saving_bytes: int
    loading: float
    loading_bytes: int


@click.command()
@click.option("--size", type=click.Choice(list(SIZES)), default="S", show_default=True, help="Of the model.")
@click.option("--worlds", multiple=True, type=int, default=(1, 2, 4), show_default=True, help="Ranks.")
@click.option("--stages", multiple=True, type=int, default=(1, 3), show_default=True, help="Of ZeRO.")
def main(size: str, worlds: tuple[int, ...], stages: tuple[int, ...]) -> None:
    """Time a save and a load of a checkpoint, and the memory that they take. Ranks and stages may be given again."""
    table = Table(
        "ranks", "stage", "own part", "stall", "until committed", "memory / part", "load", "memory / part",
        title=f"a checkpoint of ViT-{size}: the worst rank",
    )  # fmt: skip
    for world in worlds:
        for stage in stages:
            table.add_row(str(world), str(stage), *_cells(_measure(size, world, stage)))
    Console().print(table)


def _cells(ranks: list[Costs]) -> list[str]:
    return [
        f"{max(r.own for r in ranks) / MIB:,.1f} MiB",
        f"{max(r.stall for r in ranks) * 1e3:,.0f} ms",
        f"{max(r.saving for r in ranks):.2f} s",
        f"{max(r.saving_bytes / r.own for r in ranks):.2f}",
        f"{max(r.loading for r in ranks):.2f} s",
        f"{max(r.loading_bytes / r.own for r in ranks):.2f}",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _measure(size: str, world: int, stage: int) -> list[Costs]:
    """Fresh processes: what another row left in an allocator would not be counted."""
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    ends: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world):
            mine, theirs = context.Pipe()
            place = World(rank, world, rank, "127.0.0.1", port, "benchmark")
            context.Process(
                target=_rank, args=(theirs, place, size, stage, Path(folder)), daemon=True
            ).start()
            theirs.close()
            ends.append(mine)
        return [end.recv() for end in ends]


def _rank(end: Connection, place: World, size: str, stage: int, folder: Path) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with joined(place, torch.device("cpu"), 300) as ranks:
        config = _config(size, stage, ranks.size)
        stall, saving, saving_bytes, own = _save(config, ranks, folder)
        loading, loading_bytes = _load(config, ranks, folder)
        end.send(Costs(own, stall, saving, saving_bytes, loading, loading_bytes))


def _config(size: str, stage: int, world: int) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": {"shards": "unused"}},
            "model": {"size": size, "img_size": (32, 32), "patch_size": (16, 16), "num_classes": 1000},
            "optim": {"lr": LR},
            "train": {"global_batch": world, "total_steps": 1000},
            "engine": {"precision": "fp32", "zero_stage": stage},
        }
    )


def _save(config: Config, ranks: Ranks, folder: Path) -> tuple[float, float, int, int]:
    """Train a step, then save; (stall, seconds, bytes beyond, bytes of the rank's own part)."""
    engine = _engine(config, ranks, folder)
    engine.step([_batch(config)], LR)
    plan = engine.plan
    content = Content(
        step=1, config=config, plan=plan, data={}, progress={}, metrics={}, optimizer_steps=1, shapes=engine.shapes,
        slices=engine.slices(),
    )  # fmt: skip
    own = sum(4 * (stop - start) * len(kinds) for _, start, stop, kinds in engine.slices())
    saver = Saver(folder, ranks)
    before = _reset_peak()
    began = time.perf_counter()
    saver.begin(content)
    stall = time.perf_counter() - began
    saver.commit()
    return stall, time.perf_counter() - began, _peak() - before, own


def _load(config: Config, ranks: Ranks, folder: Path) -> tuple[float, int]:
    """Into a new engine; (seconds, bytes beyond)."""
    engine = _engine(config, ranks, folder)
    before = _reset_peak()
    began = time.perf_counter()
    found = newest_valid(folder, ranks)
    assert found is not None
    engine.restore(found.read, found.manifest.optimizer_steps)
    found.close()
    return time.perf_counter() - began, _peak() - before


def _engine(config: Config, ranks: Ranks, folder: Path) -> Engine:
    plan = resolve(config, ranks.size, DataFacts(samples=10**6, shards=1, bytes=10**9, digest=""), detect())
    log_file = folder / f"rank_{ranks.rank}.log"
    with logs.quiet_stdout(log_file):
        engine = Engine(config, plan, ranks, log_file)
    engine.write(InitialWeights(config.model, 0))
    return engine


def _batch(config: Config) -> Batch:
    images = torch.zeros(1, *config.model.img_size, config.model.in_chans, dtype=torch.uint8)
    return Batch(images, torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.arange(1))


def _reset_peak() -> int:
    """Forget the highest resident size so far; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    main()
