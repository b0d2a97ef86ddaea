"""How busy machines are: MLflow's own names, one look a node, through the journal, past restarts and outages."""

import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import tiny
from digits import digits
from mlflow_server import Stored
from patience import PATIENCE, wait_until
from ranks import Ranks, on_ranks

from pretrain.tracking import Journal, SystemMetrics
from pretrain.tracking.deliver import Drainer, deliver
from pretrain.tracking.system import Probe, forget, node_file, node_of

__all__ = ["digits"]


def open_journal(run_dir: Path, **options) -> Journal:
    return Journal.open(run_dir, **{"experiment": "pretrain", "name": "run", **options})


def system_lines(run_dir: Path) -> list[dict]:
    # what stands behind the last end of a line may be in the middle of being written
    *whole, _ = (run_dir / "metrics.jsonl").read_text().split("\n")
    return [line for line in map(json.loads, whole) if line["op"] == "system"]


def carried(run_dir: Path) -> list[dict]:
    """Lines of the other node."""
    return [
        line for line in system_lines(run_dir) if "system/node_1/cpu_utilization_percentage" in line["values"]
    ]


def names_of(*monitors) -> set[str]:
    for monitor in monitors:
        monitor.collect_metrics()
    return {name for monitor in monitors for name in monitor.aggregate_metrics()}


def test_names_and_units_are_those_of_mlflows_own_monitor(monkeypatch):
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)  # at one moment, for both
    monkeypatch.setattr(psutil, "disk_usage", lambda path: disk)
    monitors = CPUMonitor(), DiskMonitor(), NetworkMonitor()
    found = Probe(Path("/")).look()
    assert set(found) == names_of(*monitors)
    theirs = monitors[0].aggregate_metrics() | monitors[1].aggregate_metrics()
    for name in ("system_memory_usage_megabytes", "disk_usage_megabytes", "disk_usage_percentage"):
        assert found[name] == pytest.approx(theirs[name], rel=0.01), name


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """Stands in for a driver: what NVML says of two devices, the second of which does not tell its power."""

    def power(device: int) -> int:
        if device == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_000

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=20e9, total=80e9),
        "nvmlDeviceGetUtilizationRates": lambda device: SimpleNamespace(gpu=90 + device),
        "nvmlDeviceGetPowerUsage": power,
        "nvmlDeviceGetEnforcedPowerLimit": lambda device: 700_000,
        "nvmlDeviceGetTemperature": lambda device, sensor: 60 + device,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_gpus_are_told_by_mlflows_names_and_one_that_is_silent_costs_its_figure_alone(two_gpus, tmp_path):
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    found = {name: value for name, value in Probe(tmp_path).look().items() if name.startswith("gpu_")}
    assert found == {
        "gpu_0_memory_usage_megabytes": 20_000, "gpu_0_memory_usage_percentage": 25,
        "gpu_0_utilization_percentage": 90, "gpu_0_power_usage_watts": 350, "gpu_0_power_usage_percentage": 50,
        "gpu_0_temperature_celsius": 60,
        "gpu_1_memory_usage_megabytes": 20_000, "gpu_1_memory_usage_percentage": 25,
        "gpu_1_utilization_percentage": 91, "gpu_1_temperature_celsius": 61,
    }  # fmt: skip
    theirs = names_of(GPUMonitor())
    assert theirs == {name for name in found if not name.endswith("_celsius")}


def test_a_machine_without_a_driver_has_no_gpus_and_no_complaint(tmp_path, monkeypatch):
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert not any(name.startswith("gpu_") for name in Probe(tmp_path).look())


def test_the_first_rank_of_each_node_looks_whatever_the_launcher_numbers():
    hosts = ["b", "b", "a", "b", "a", "c"]
    assert [node_of(rank, hosts) for rank in range(6)] == [0, None, 1, None, None, 2]


def test_figures_of_other_nodes_arrive_once_and_those_of_an_earlier_attempt_do_not(tmp_path):
    other = node_file(tmp_path, 1)
    other.parent.mkdir(parents=True)
    other.write_text('{"time": 1, "values": {"cpu_utilization_percentage": 99}}\n')
    pen = open_journal(tmp_path)
    forget(tmp_path)
    with SystemMetrics(tmp_path, 0, 2, 0.05, pen), SystemMetrics(tmp_path, 1, 2, 0.05, None):
        wait_until(lambda: len(carried(tmp_path)) > 2)
    pen.close("FINISHED")
    written = [json.loads(line)["values"] for line in other.read_text().splitlines()]
    arrived = [
        {name.removeprefix("system/node_1/"): value for name, value in line["values"].items()}
        for line in carried(tmp_path)
    ]
    assert arrived == written[: len(arrived)]
    assert any("system/node_0/disk_usage_percentage" in line["values"] for line in system_lines(tmp_path))


def test_a_damaged_line_of_another_node_costs_itself_alone(tmp_path, caplog):
    good = b'{"op":"system","attempt":0,"time":%d,"step":0,"values":{"cpu_utilization_percentage":%d}}\n'
    damaged = [
        b'{"op":"system","att\n',
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        b'{"time":1,"values":[]}\n',
        b"\n",
    ]
    damaged += [good.replace(b"cpu", b"$"), good.replace(b"%d}}", b"null}}"), good.replace(b"%d,", b"1e999,")]
    other = node_file(tmp_path, 1)
    other.parent.mkdir(parents=True)
    lines = [line for bad in damaged for line in (bad.replace(b"%d", b"1"), good % (5_000_000_000_000, 7))]
    other.write_bytes(b"".join(lines) + b'{"op":"sys')  # the last is being written
    pen = open_journal(tmp_path)
    with caplog.at_level(logging.WARNING, "pretrain"), SystemMetrics(tmp_path, 0, 2, 0.05, pen):
        wait_until(lambda: len(carried(tmp_path)) >= len(damaged))
    pen.close("FINISHED")
    assert len(carried(tmp_path)) == len(damaged)
    assert caplog.text.count("a damaged line is passed over") == len(damaged)


def test_figures_of_an_attempt_that_was_rolled_back_stay_because_the_machine_was_busy_then(
    tmp_path, database
):
    first = open_journal(tmp_path / "run", clock=lambda: 1000.0)
    first.metrics(50, {"train/loss": 1.0})
    first.system({"system/cpu_utilization_percentage": 80.0}, 1060.0)
    os.close(first._descriptor)
    second = open_journal(tmp_path / "run", from_step=10, clock=lambda: 2000.0)
    second.system({"system/cpu_utilization_percentage": 20.0}, 2060.0)
    second.close("FINISHED")
    assert deliver(Drainer(tmp_path / "run", f"sqlite:///{database}"), lambda: True, PATIENCE)
    stored = Stored(database, tmp_path / "run")
    assert stored.points("system/cpu_utilization_percentage") == [(60, 80.0), (1060, 20.0)]
    assert stored.points("train/loss") == []  # an attempt that does not count


def test_a_machine_that_cannot_be_looked_at_ends_the_looking_and_nothing_else(tmp_path, caplog):
    pen = open_journal(tmp_path)
    with (
        caplog.at_level(logging.WARNING, "pretrain"),
        SystemMetrics(tmp_path / "gone", 0, 1, 0.05, pen) as looking,
    ):
        looking._thread.join(PATIENCE)
    assert "no more figures of this machine" in caplog.text
    pen.metrics(1, {"train/loss": 1.0})


def test_a_look_that_hangs_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.tracking.system.STOP_SECONDS", 0.1)
    begun, closed = threading.Event(), threading.Event()

    def hang(self: Probe) -> dict[str, float]:
        begun.set()
        closed.wait(PATIENCE)
        return {"cpu_utilization_percentage": 1.0}

    monkeypatch.setattr(Probe, "look", hang)
    pen = open_journal(tmp_path)
    with SystemMetrics(tmp_path, 0, 1, 0.01, pen) as looking:
        assert begun.wait(PATIENCE)
    pen.close("FINISHED")
    closed.set()
    looking._thread.join(PATIENCE)  # wakes up to a journal that is closed
    assert system_lines(tmp_path) == []


BOTH = {f"system/node_{node}/cpu_utilization_percentage" for node in (0, 1)}


def names_in(run_dir: Path) -> set[str]:
    return {name for line in system_lines(run_dir) for name in line["values"]}


def train_on_a_node_each(ranks: Ranks, run: str, shards: str) -> None:
    """The last step comes once figures of both have arrived."""
    from contextlib import ExitStack

    from pretrain.stage import run_stage
    from pretrain.stop import StopFlag
    from pretrain.trainer import Trainer

    go_on = Trainer._train_step

    def wait_before(self: Trainer, micro_batches: object) -> None:
        if self.step == 5 and ranks.is_main:
            wait_until(lambda: names_in(Path(run)) >= BOTH)
        go_on(self, micro_batches)

    Trainer._train_step = wait_before
    os.environ["SLURMD_NODENAME"] = f"gpu{17 + ranks.rank}"
    (Path(run) / "logs").mkdir(parents=True, exist_ok=True)
    cfg = tiny.config(
        run={"dir": run},
        data={"train": {"shards": f"{shards}/train"}, "decode_threads": 1},
        model={"in_chans": 1, "num_classes": 10},
        train={"global_batch": 8, "total_steps": 6, "log_every_steps": 5},
        tracking={"uri": None, "system_seconds": 0.05},
    )
    with ExitStack() as afterwards:
        run_stage(cfg, ranks, Path(run), Path(run) / "logs" / f"{ranks.rank}.log", StopFlag(), afterwards)


def test_a_training_on_two_nodes_logs_both(digits: Path, tmp_path: Path):
    on_ranks(2, train_on_a_node_each, str(tmp_path / "run"), str(digits))
    assert names_in(tmp_path / "run") >= BOTH
    assert '"nodes":"gpu17 gpu18"' in (tmp_path / "run" / "metrics.jsonl").read_text()
