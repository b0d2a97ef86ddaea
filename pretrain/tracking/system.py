"""How busy the machines are: processor, memory, disk, network and GPUs of every node, in the journal beside the rest.

One process of each node looks every so many seconds, in a thread of its own. Rank 0 writes what it sees into the
journal. The other nodes append theirs to `RUN/tracking/system/node_K.jsonl` on the file system that they share with
it, and rank 0 carries the new lines over. Names are those of MLflow's own monitor, which ends at the first outage.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil

from pretrain.errors import UserError
from pretrain.logs import log
from pretrain.tracking import records

FOLDER = "system"
STOP_SECONDS = 3.0
"""How long the end of a run waits for a look that is under way: a dying GPU or disk may hold it for ever."""
MB = 1e6


class Sink(Protocol):
    """What a `Tracker` offers to rank 0's thread."""

    def system(self, values: Mapping[str, float], seconds: float) -> None: ...


class SystemMetrics:
    """A context that looks at this node every `every_seconds`. One process of each node makes one.

    node: this node's number of num_nodes; sink: where figures go on rank 0, None on other nodes. With one node, names
    are MLflow's `system/cpu_utilization_percentage` and so on, with several `system/node_0/cpu_utilization_percentage`.
    """

    def __init__(
        self, run_dir: Path, node: int, num_nodes: int, every_seconds: float, sink: Sink | None
    ) -> None:
        self._run_dir = run_dir
        self._node, self._num_nodes = node, num_nodes
        self._every_seconds = every_seconds
        self._sink = sink
        self._offsets: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            probe = Probe(self._run_dir)
            while not self._ended.wait(self._every_seconds):
                self._write(self._node, probe.look(), time.time())
                self._carry_over()
            self._carry_over()
        except (UserError, OSError, psutil.Error) as failure:
            log.warning("no more figures of this machine: %s", failure)

    def _write(self, node: int, values: Mapping[str, float], seconds: float) -> None:
        if self._sink is None:
            path = node_file(self._run_dir, node)
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"op": "system", "attempt": 0, "time": round(1000 * seconds), "step": 0}
            line = records.encode(record | {"values": records.check_values(values)})
            with path.open("ab") as file:  # closed each time: only then does another node see it for sure
                file.write(line)
        else:
            prefix = "system/" if self._num_nodes == 1 else f"system/node_{node}/"
            self._sink.system({prefix + name: value for name, value in values.items()}, seconds)

    def _carry_over(self) -> None:
        """Rank 0: what the other nodes wrote since the last time."""
        if self._sink is None:
            return
        for node in range(self._num_nodes):
            path = node_file(self._run_dir, node)
            if node == self._node or not path.is_file():
                continue
            with path.open("rb") as file:
                for line, end in records.read_lines(file, self._offsets.get(node, 0)):
                    self._offsets[node] = end
                    record = records.decode(line)
                    try:
                        if record is None:
                            raise ValueError("no line of figures")
                        self._write(node, record["values"], record["time"] / 1000)
                    except (ValueError, TypeError, KeyError) as error:  # cut by a full disk, say
                        log.warning("%s: a damaged line is passed over (%s)", path, error)


def node_file(run_dir: Path, node: int) -> Path:
    return run_dir / "tracking" / FOLDER / f"node_{node}.jsonl"


def forget(run_dir: Path) -> None:
    """Take away what the nodes of an earlier attempt left. Rank 0, before the others begin."""
    shutil.rmtree(run_dir / "tracking" / FOLDER, ignore_errors=True)


def node_of(rank: int, hosts: Sequence[str]) -> int | None:
    """The number of the node that `rank` looks at: the first rank of each node does. hosts: the host of every rank."""
    if hosts.index(hosts[rank]) != rank:
        return None
    return list(dict.fromkeys(hosts)).index(hosts[rank])


class Probe:
    """Looks at this machine. disk: a path on the file system whose use is told."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._gpus = _Gpus.find()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # counts from the call before

    def look(self) -> dict[str, float]:
        """Figures by MLflow's names, without a prefix. Traffic counts from the first look."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._disk))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / MB,
            "disk_available_megabytes": disk.free / MB,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:  # a container may have none
            received, sent = self._network.bytes_recv, self._network.bytes_sent
            values["network_receive_megabytes"] = (network.bytes_recv - received) / MB
            values["network_transmit_megabytes"] = (network.bytes_sent - sent) / MB
        if self._gpus is not None:
            values |= self._gpus.look()
        return {name: round(value, 1) for name, value in values.items()}


class _Gpus:
    """NVIDIA's devices on this node, by NVML. A device that does not answer is left out of a look."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    @classmethod
    def find(cls) -> "_Gpus | None":
        """None where there is no driver or no pynvml (the package nvidia-ml-py)."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            return cls(pynvml)
        except pynvml.NVMLError:
            return None

    def look(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for index, device in enumerate(self._devices):
            for figures in (self._memory, self._use, self._power, self._temperature):
                values |= {f"gpu_{index}_{name}": value for name, value in self._ask(figures, device)}
        return values

    def _ask(self, figures: Callable[[Any], Mapping[str, float]], device: Any) -> Iterator[tuple[str, float]]:
        try:
            yield from figures(device).items()
        except self._nvml.NVMLError:
            return

    def _memory(self, device: Any) -> Mapping[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(device)
        return {
            "memory_usage_megabytes": memory.used / MB,
            "memory_usage_percentage": 100 * memory.used / memory.total,
        }

    def _use(self, device: Any) -> Mapping[str, float]:
        return {"utilization_percentage": self._nvml.nvmlDeviceGetUtilizationRates(device).gpu}

    def _power(self, device: Any) -> Mapping[str, float]:
        watts = self._nvml.nvmlDeviceGetPowerUsage(device) / 1000
        limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000
        return {"power_usage_watts": watts, "power_usage_percentage": 100 * watts / limit}

    def _temperature(self, device: Any) -> Mapping[str, float]:
        celsius = self._nvml.nvmlDeviceGetTemperature(device, self._nvml.NVML_TEMPERATURE_GPU)
        return {"temperature_celsius": celsius}
