"""Where the time of a step goes: a trace for each rank, and a split of the step, for the steps of `profile.steps`."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from pretrain.config import ProfileConfig
from pretrain.distributed import Ranks
from pretrain.logs import log

FOLDER = "profile"
PARTS = ("data", "forward", "backward", "optimizer")
"""What a step is split into, besides the rest. Communication is part of backward, optimizer and, at stage 3, forward."""

_FOLDER = re.compile(r"steps_(\d+)_(\d+)")


class StepProfile:
    """All ranks make one and wrap their steps in it. Device work is waited for at each boundary of a profiled step, so that
    it is counted where it belongs: such a step is somewhat slower than others."""

    def __init__(self, config: ProfileConfig, ranks: Ranks, run_dir: Path) -> None:
        self._steps = range(config.steps[0], config.steps[1] + 1) if config.steps else range(0)
        self._ranks, self._run_dir = ranks, run_dir
        self._profiler: profile | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._profiled: list[int] = []

    @contextmanager
    def step(self, number: int, waited: float) -> Iterator[None]:
        """The block is step `number`, which waited so many seconds for its data. All ranks, each step."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._profiler = _start(self._ranks.device)
        self._seconds["data"] += waited
        began = self._now()
        with record_function(f"step {number}"):
            yield
        self._seconds["step"] += waited + self._now() - began
        self._profiled.append(number)
        if number == self._steps[-1]:
            self.finish()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """The block is this part of the present step."""
        if self._profiler is None:
            yield
            return
        began = self._now()
        with record_function(part):
            yield
        self._seconds[part] += self._now() - began

    def finish(self) -> None:
        """Write down what was profiled. All ranks: after the last of the steps, and at the end of the run."""
        if self._profiler is None:
            if self._steps and self._ranks.is_main and not self._was_profiled():
                log.warning(
                    "profile.steps [%d, %d]: none of them was trained", self._steps[0], self._steps[-1]
                )
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder = self._run_dir / FOLDER / f"steps_{self._profiled[0]}_{self._profiled[-1]}"
        with self._ranks.together():
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"rank_{self._ranks.rank}.json.gz"))
        splits = self._ranks.gather(self._split(profiler))
        with self._ranks.together():
            if self._ranks.is_main:
                facts = {"steps": self._profiled, "milliseconds_by_rank": splits}
                (folder / "split.json").write_text(json.dumps(facts, indent=1) + "\n")
                self._show(splits, folder)

    def _was_profiled(self) -> bool:
        """Whether this start, one before it, or this one before it went back, profiled any of the steps."""
        names = (folder.name for folder in (self._run_dir / FOLDER).glob("steps_*"))
        return any(
            int(found[1]) <= self._steps[-1] and int(found[2]) >= self._steps[0]
            for name in names
            if (found := _FOLDER.fullmatch(name))
        )

    def _split(self, profiler: profile) -> dict[str, float]:
        """Milliseconds of a step, on average; the rest is what no part accounts for."""
        parts = {name: self._seconds[name] for name in (*PARTS, "step")}
        parts["rest"] = parts["step"] - sum(parts[name] for name in PARTS)
        parts["communication"] = _communication(profiler, self._ranks.device)
        return {name: 1e3 * seconds / len(self._profiled) for name, seconds in parts.items()}

    def _show(self, splits: list[dict[str, float]], folder: Path) -> None:
        columns = ("step", *PARTS, "rest", "communication")
        title = f"milliseconds of a step, over steps {self._profiled[0]} to {self._profiled[-1]}"
        table = Table("rank", *columns, title=title, caption="communication is part of the others")
        for rank, split in enumerate(splits):
            table.add_row(str(rank), *(f"{split[name]:.1f}" for name in columns))
        Console(stderr=True).print(table)
        log.info("traces are in %s; https://ui.perfetto.dev opens them", folder)

    def _now(self) -> float:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter()


def _start(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


def _communication(profiler: profile, device: torch.device) -> float:
    """Seconds in collectives: on CUDA of their kernels, on a CPU of gloo's calls."""
    events: Any = profiler.key_averages()
    if device.type == "cuda":
        times = [event.device_time_total for event in events if event.key.startswith("ncclDevKernel")]
    else:
        times = [event.cpu_time_total for event in events if event.key.startswith("gloo:")]
    return float(sum(times)) / 1e6
