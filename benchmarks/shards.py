"""The shard tools on one core's worth of work and on two: images a second, and processor time per image.

    python benchmarks/shards.py                      # 2,000 generated JPEGs of about 100 KB, 1 and 2 workers
    python benchmarks/shards.py --images 400 --rounds 1 --workers 1 --workers 4

In every round each command runs once with each number of workers, as it is typed, in a process of its own: start-up of
the workers is part of it. Processor time is that of the command and its workers. Images are written to a temporary
folder (of which 3 x their size is needed) and lie in the page cache. Shown are medians over the rounds, and of the
ratios to the first number of workers within a round.
"""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

SHARDS = 16
CLASSES = 10


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of processors."""

    wall: float
    cpu: float


@click.command()
@click.option("--images", default=2000, show_default=True, help="Number of images.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--workers", multiple=True, type=int, default=(1, 2), show_default=True)
def main(images: int, rounds: int, workers: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_images(folder / "images", images)
        costs: dict[tuple[str, int], list[Cost]] = defaultdict(list)
        for number in range(rounds):
            for count in workers[number % len(workers) :] + workers[: number % len(workers)]:
                for name, command in commands(folder).items():
                    costs[name, count].append(timed(*command(), "--workers", str(count)))
    table = Table(title=f"{images:,} JPEGs, {size / images / 1024:,.0f} KiB each, {SHARDS} shards")
    for column in ("command", "workers", "images/s", "CPU ms per image", "times as fast"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name in commands(folder):
        for count in workers:
            mine, first = costs[name, count], costs[name, workers[0]]
            table.add_row(
                name,
                str(count),
                f"{images / statistics.median(cost.wall for cost in mine):,.0f}",
                f"{1000 * statistics.median(cost.cpu for cost in mine) / images:.2f}",
                f"{statistics.median(a.wall / b.wall for a, b in zip(first, mine, strict=True)):.2f}",
            )
    Console(width=100).print(table)


def commands(folder: Path) -> dict[str, Callable[[], tuple[str, ...]]]:
    """Commands by name; each makes its own way free when it is called."""
    images, out, small = (folder / name for name in ("images", "out", "small"))

    def pack() -> tuple[str, ...]:
        shutil.rmtree(out, ignore_errors=True)
        return "pack", str(images), str(out), "--shards", str(SHARDS)

    def shrink() -> tuple[str, ...]:
        shutil.rmtree(small, ignore_errors=True)
        return "pack", str(images), str(small), "--shards", str(SHARDS), "--longest-side", "256"

    return {
        "pack": pack,
        "pack --longest-side 256": shrink,
        "index --verify": lambda: ("index", str(out / "train"), "--verify"),
        "verify": lambda: ("verify", str(out / "train")),
        "verify --fast": lambda: ("verify", str(out / "train"), "--fast"),
    }


def timed(*arguments: str) -> Cost:
    """One command in a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "pretrain", "shards", *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def write_images(folder: Path, count: int) -> int:
    """JPEGs of ImageNet's usual size and bytes, by class; returns their bytes."""
    generator = np.random.default_rng(0)
    size = 0
    for i in range(count):
        coarse = generator.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + generator.integers(-28, 29, smooth.shape[:2])[:, :, None]).clip(0, 255)
        path = folder / f"class{i % CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.astype(np.uint8)).save(path, quality=88)
        size += path.stat().st_size
    return size


if __name__ == "__main__":
    main()
