"""What reading from a store costs against local files: requests and bytes for each sample, images a second.

    python benchmarks/stores.py SHARDS

SHARDS is a folder of shards. It is read locally, and through an HTTP server on loopback without and with the node's cache
(empty, then filled), in rounds whose order rotates. Samples are taken in the order of training, by one rank; pictures
are not decoded, so what is measured is the reading alone.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.config import DataConfig
from pretrain.data import Dataset, open_dataset
from pretrain.data.order import Order
from pretrain.data.reader import announced, open_reader
from pretrain.data.remote import RemoteReader

SERVER = str(Path(__file__).resolve().parent / "range_server.py")
BATCH = 64


def epoch(dataset: Dataset, data: DataConfig, lanes: int, window_blocks: int) -> tuple[float, int, int]:
    """Read every sample once; returns (seconds, requests, bytes that arrived)."""
    block_samples = max(1, round(data.block_mib * 2**20 * len(dataset) / dataset.num_bytes))
    order = Order(
        dataset.shard_samples,
        seed=0,
        global_batch=BATCH,
        lanes=lanes,
        block_samples=block_samples,
        window_blocks=window_blocks,
    )
    reader = open_reader(dataset, data, block_samples, lanes * (window_blocks + 1))
    try:
        began = time.perf_counter()
        steps = (order.batch(step) for step in range(len(dataset) // BATCH))
        for rows in announced(steps, lambda rows: (rows.shard, rows.sample), reader):
            reader.read(rows.shard, rows.sample)
        seconds = time.perf_counter() - began
        return seconds, *((reader.requests, reader.bytes) if isinstance(reader, RemoteReader) else (0, 0))
    finally:
        reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--block-mib", type=float, default=8.0)
    parser.add_argument("--window-blocks", type=int, default=4)
    given = parser.parse_args()

    server = subprocess.Popen([sys.executable, SERVER, str(given.shards)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        local, remote = open_dataset(str(given.shards)), open_dataset(url)
        with tempfile.TemporaryDirectory() as folder:
            run(local, remote, given, Path(folder))
    finally:
        server.kill()
        server.wait()


def run(local: Dataset, remote: Dataset, given: argparse.Namespace, folder: Path) -> None:
    plain = {"train": {"shards": "unused"}, "block_mib": given.block_mib}
    results: dict[str, list[tuple[float, int, int]]] = {}
    kinds = ["local", "http", "cache"]
    for round_number in range(given.rounds):
        turn = round_number % len(kinds)
        for kind in kinds[turn:] + kinds[:turn]:
            cache = {"cache_dir": str(folder / str(round_number)), "cache_gib": 100.0}
            data = DataConfig.model_validate(plain | (cache if kind == "cache" else {}))
            names = {"local": ["local"], "http": ["http"], "cache": ["cache, empty", "cache, filled"]}[kind]
            for name in names:
                dataset = local if kind == "local" else remote
                results.setdefault(name, []).append(epoch(dataset, data, given.lanes, given.window_blocks))

    samples = len(local) // BATCH * BATCH
    blocks = given.block_mib * 2**20 * len(local) / local.num_bytes
    print(f"{len(local):,} samples, {local.num_bytes / 2**20:,.0f} MiB, {len(local.shards)} shards, "
          f"blocks of {blocks:.0f} samples, {given.lanes} lanes, {given.rounds} rounds")  # fmt: skip
    print(f"{'':15}{'images/s':>10}{'time/local':>12}{'requests/sample':>17}{'bytes read/byte':>17}")
    for name, rounds in results.items():
        seconds = statistics.median(r[0] for r in rounds)
        ratio = float(np.median([r[0] / base[0] for r, base in zip(rounds, results["local"], strict=True)]))
        requests = statistics.median(r[1] for r in rounds) / samples
        share = statistics.median(r[2] for r in rounds) / (local.num_bytes * samples / len(local))
        print(f"{name:15}{samples / seconds:10,.0f}{ratio:12.2f}{requests:17.5f}{share:17.3f}")


if __name__ == "__main__":
    main()
