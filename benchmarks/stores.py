"""What reading from a store costs against local files: requests and bytes for each sample, images a second.

    python benchmarks/stores.py SHARDS

SHARDS is a folder of shards. It is read locally, and through an HTTP server on loopback without and with the node's cache
(empty, then filled), in rounds whose order rotates. Samples are taken in the order of training, by one rank; pictures
are not decoded, so what is measured is the reading alone.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click

from pretrain.config import DataConfig
from pretrain.data import Dataset, open_dataset
from pretrain.data.order import Order
from pretrain.data.reader import announced, open_reader
from pretrain.data.remote import RemoteReader

SERVER = str(Path(__file__).resolve().parent / "range_server.py")
BATCH = 64
KINDS = {"local": ["local"], "http": ["http"], "cache": ["cache, empty", "cache, filled"]}
"""What is opened in a turn: the names of its passes over the samples."""


@dataclass(frozen=True)
class Setting:
    rounds: int
    lanes: int
    block_mib: float
    window_blocks: int


class Pass(NamedTuple):
    """Over all samples, once. bytes: that arrived."""

    seconds: float
    requests: int
    bytes: int


@click.command()
@click.argument("shards", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--lanes", default=4, show_default=True)
@click.option("--block-mib", default=8.0, show_default=True)
@click.option("--window-blocks", default=4, show_default=True)
def main(shards: Path, **given: Any) -> None:
    """Compare reading the shards of the folder SHARDS from a store with reading them as files."""
    setting = Setting(**given)
    with serving(shards) as url, tempfile.TemporaryDirectory() as folder:
        local = open_dataset(str(shards))
        show(measured(local, open_dataset(url), setting, Path(folder)), local, setting)


@contextmanager
def serving(shards: Path) -> Iterator[str]:
    """The URL of a server of these shards, in a process of its own."""
    server = subprocess.Popen([sys.executable, SERVER, str(shards)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def measured(local: Dataset, remote: Dataset, setting: Setting, folder: Path) -> dict[str, list[Pass]]:
    """A pass of each name in each round."""
    plain = {"train": {"shards": "unused"}, "block_mib": setting.block_mib}
    kinds = list(KINDS)
    found: dict[str, list[Pass]] = {}
    for number in range(setting.rounds):
        turn = number % len(kinds)
        for kind in kinds[turn:] + kinds[:turn]:
            cache = {"cache_dir": str(folder / str(number)), "cache_gib": 100.0}
            data = DataConfig.model_validate(plain | (cache if kind == "cache" else {}))
            for name in KINDS[kind]:
                dataset = local if kind == "local" else remote
                found.setdefault(name, []).append(epoch(dataset, data, setting))
    return found


def epoch(dataset: Dataset, data: DataConfig, setting: Setting) -> Pass:
    """Read every sample once."""
    block_samples = max(1, round(setting.block_mib * 2**20 * len(dataset) / dataset.num_bytes))
    order = Order(
        dataset.shard_samples,
        seed=0,
        global_batch=BATCH,
        lanes=setting.lanes,
        block_samples=block_samples,
        window_blocks=setting.window_blocks,
    )
    reader = open_reader(dataset, data, block_samples, setting.lanes * (setting.window_blocks + 1))
    try:
        began = time.perf_counter()
        steps = (order.batch(step) for step in range(len(dataset) // BATCH))
        for rows in announced(steps, lambda rows: (rows.shard, rows.sample), reader):
            reader.read(rows.shard, rows.sample)
        seconds = time.perf_counter() - began
        return Pass(
            seconds, *((reader.requests, reader.bytes) if isinstance(reader, RemoteReader) else (0, 0))
        )
    finally:
        reader.close()


def show(found: dict[str, list[Pass]], local: Dataset, setting: Setting) -> None:
    samples = len(local) // BATCH * BATCH
    blocks = setting.block_mib * 2**20 * len(local) / local.num_bytes
    print(f"{len(local):,} samples, {local.num_bytes / 2**20:,.0f} MiB, {len(local.shards)} shards, "
          f"blocks of {blocks:.0f} samples, {setting.lanes} lanes, {setting.rounds} rounds")  # fmt: skip
    print(f"{'':15}{'images/s':>10}{'time/local':>12}{'requests/sample':>17}{'bytes read/byte':>17}")
    for name, passes in found.items():
        seconds = median(one.seconds for one in passes)
        ratio = median(one.seconds / base.seconds for one, base in zip(passes, found["local"], strict=True))
        requests = median(one.requests for one in passes) / samples
        share = median(one.bytes for one in passes) / (local.num_bytes * samples / len(local))
        print(f"{name:15}{samples / seconds:10,.0f}{ratio:12.2f}{requests:17.5f}{share:17.3f}")


if __name__ == "__main__":
    main()
