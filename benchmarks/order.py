"""What a seek in the sample order costs: time and memory until a rank knows its samples and has opened their shards.

    python benchmarks/order.py                      10^9 samples in 10^5 shards, on 4,096 ranks and on one
    python benchmarks/order.py --shards 1000        a smaller data set

The manifest is written and read for real; so are the indexes of the shards that a step touches, with a few bytes of
each of their tars. Each row is a fresh process of one thread: memory is its peak beyond what it had after the imports,
and on a busy machine its CPU time is what an idle one would take.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain.config.plan import slice_bounds
from pretrain.data.dataset import Dataset
from pretrain.data.index import BLOCK, ROW, ShardIndex, index_path
from pretrain.data.manifest import NAME, Manifest, Shard, read_manifest
from pretrain.data.order import Order, Rows, Share
from pretrain.data.read import LocalReader

SAMPLES_A_SHARD = 10_000
GLOBAL_BATCH = 4096
LANES = 256
BLOCK_SAMPLES = 84
"""8 MiB of photographs of 100 kB."""
SAMPLE_BLOCKS = 4
"""Of 512 bytes: header, image, header, label. The order does not depend on what a sample weighs."""


@dataclass(frozen=True)
class Case:
    name: str
    world: int
    mixed: bool = False

    def rows(self, shard_samples: np.ndarray, step: int) -> Rows:
        """What a rank in the middle of the world computes at a step."""
        half = len(shard_samples) // 2
        order = Order(
            shard_samples,
            seed=1,
            global_batch=GLOBAL_BATCH,
            lanes=LANES,
            block_samples=BLOCK_SAMPLES,
            window_blocks=4,
            sources=[Share(half, 3), Share(len(shard_samples) - half, 1)] if self.mixed else [],
        )
        return order.rows(step, *slice_bounds(GLOBAL_BATCH, self.world // 2, self.world))


CASES = [
    Case("one rank of 4,096", 4096),
    Case("one rank of 8", 8),
    Case("a lone rank, all lanes", 1),
    Case("the same, two sources 3 : 1", 1, mixed=True),
]


def ragged(num_shards: int) -> np.ndarray:
    """Samples of each shard: `SAMPLES_A_SHARD` on average."""
    spread = np.arange(num_shards) * 7919 % 1001
    samples = SAMPLES_A_SHARD - 500 + spread
    samples[0] += num_shards * SAMPLES_A_SHARD - samples.sum()
    return samples


def write_data(folder: Path, num_shards: int, step: int) -> None:
    """The manifest, and of every shard that a case touches its index and the samples that it touches."""
    samples = ragged(num_shards)
    touched: dict[int, set[int]] = {}
    for case in CASES:
        rows = case.rows(samples, step)
        for shard, sample in zip(rows.shard.tolist(), rows.sample.tolist(), strict=True):
            touched.setdefault(shard, set()).add(sample)
    shards = []
    for number, count in enumerate(samples.tolist()):
        name, sha256 = f"train-{number:06d}.tar", hashlib.sha256(b"%d" % number).hexdigest()
        index_sha256 = sha256
        if number in touched:
            index_sha256 = write_shard(folder / name, count, sha256, touched[number])
        shards.append(Shard(name, count, (count * SAMPLE_BLOCKS + 2) * BLOCK, sha256, index_sha256))
    (folder / NAME).write_text(Manifest.of(shards, (0, 999), None).model_dump_json(indent=1) + "\n")


def write_shard(tar: Path, count: int, sha256: str, real: set[int]) -> str:
    """A sparse tar in which only the samples `real` are written, and its index; returns the index's hash."""
    data = header("x.jpg", BLOCK) + bytes(BLOCK) + header("x.cls", 1) + b"7".ljust(BLOCK, b"\0")
    table = np.zeros(count, ROW)
    table["offset"], table["length"] = np.arange(count) * SAMPLE_BLOCKS, len(data)
    table["crc32"][list(real)] = zlib.crc32(data)
    with tar.open("wb") as file:
        for number in sorted(real):
            file.seek(number * len(data))
            file.write(data)
        file.truncate((count * SAMPLE_BLOCKS + 2) * BLOCK)
    content = ShardIndex(table, (count * SAMPLE_BLOCKS + 2) * BLOCK, sha256, (7, 7)).to_bytes()
    index_path(tar).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def header(name: str, size: int) -> bytes:
    """A ustar header of a regular file."""
    fields = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"0" * 11
    fields = (fields + b"\0" + b" " * 8 + b"0").ljust(257, b"\0") + b"ustar\x0000"
    block = bytearray(fields.ljust(BLOCK, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(field + ":")[2].split()[0]) / 1024


def measure(folder: Path, case: Case, step: int) -> dict[str, float]:
    """Seconds of each part and memory, in this process."""
    before, clock, cpu = memory("VmRSS"), [time.perf_counter()], time.process_time()
    manifest = read_manifest(folder)
    dataset = Dataset(
        str(folder),
        tuple(f"{folder}/{shard.name}" for shard in manifest.shards),
        tuple(manifest.shards),
        (manifest.min_label, manifest.max_label),
        None,
    )
    clock.append(time.perf_counter())
    rows = case.rows(dataset.shard_samples, step)
    clock.append(time.perf_counter())
    shards, first = np.unique(rows.shard, return_index=True)
    LocalReader(dataset, BLOCK_SAMPLES).read(shards, rows.sample[first])
    clock.append(time.perf_counter())
    names = ("manifest", "order", "indexes")
    seconds = dict(zip(names, np.diff(clock).tolist(), strict=True))
    return seconds | {
        "cpu": time.process_time() - cpu,
        "shards": len(shards),
        "memory": memory("VmHWM") - before,
    }


@click.command()
@click.option(
    "--shards", default=100_000, show_default=True, help=f"Of {SAMPLES_A_SHARD:,} samples on average."
)
@click.option("--step", default=5_000_000, show_default=True, help="Where to seek to.")
@click.option("--rounds", default=3, show_default=True, help="Processes a row; medians are shown.")
@click.option("--measure", "of", type=(click.Path(path_type=Path), int), hidden=True)
def main(shards: int, step: int, rounds: int, of: tuple[Path, int] | None) -> None:
    """Time a seek in the sample order, and the memory that it takes."""
    if of is not None:
        folder, number = of
        print(json.dumps(measure(folder, CASES[number], step)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), shards, step)
        size = (Path(name) / NAME).stat().st_size / 2**20
        table = Table(
            "served by", "manifest", "order", "indexes", "in all", "CPU", "shards opened", "memory",
            title=f"seek to step {step:,} of {shards * SAMPLES_A_SHARD:,} samples in "
            f"{shards:,} shards (manifest {size:.0f} MiB)",
        )  # fmt: skip
        for number, case in enumerate(CASES):
            command = [sys.executable, __file__, "--step", str(step), "--measure", name, str(number)]
            found = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(rounds)
            ]
            middle = {key: median(one[key] for one in found) for key in found[0]}
            parts = [middle[part] for part in ("manifest", "order", "indexes")]
            seconds = [f"{part:.2f} s" for part in (*parts, sum(parts), middle["cpu"])]
            table.add_row(case.name, *seconds, f"{middle['shards']:,.0f}", f"{middle['memory']:.0f} MiB")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
