"""What a run says of itself: mean loss since the last record, speed, waiting, share of the hardware's peak."""

import math
import re
import time
from collections.abc import Iterable, Mapping

import torch

from pretrain.config import Plan
from pretrain.distributed import StepFacts

_PEAK_TFLOPS = {
    r"V100": 125,
    r"A100|A800": 312,
    r"A10G?\b": 125,
    r"A30\b": 165,
    r"A40|A6000": 150,
    r"L4\b": 121,
    r"L40S": 362,
    r"L40": 181,
    r"4090": 165,
    r"H20\b": 148,
    r"H100.*PCIe|H800.*PCIe": 756,
    r"(H100|H200).*NVL": 835,
    r"H100|H800|H200|GH200": 989,
    r"B200|GB200": 2250,
}
"""Dense bf16 tensor throughput from NVIDIA's data sheets, in TFLOP/s; the first pattern that fits a device's name."""

MEASURE_SIZE = 1024
MEASURE_ROUNDS = 5
MEASURE_SECONDS = 0.5


def peak_flops(device: torch.device, precision: str, device_name: str) -> float:
    """FLOP/s that one device could do: from its data sheet where we know it, else measured with a matrix product.

    The product is of two 1024 x 1024 matrices in the plan's precision, best of five: on a CPU about 0.2 s. On one
    that emulates bf16 a product takes seconds; no other one is begun then.
    """
    if device.type == "cuda" and precision != "fp32":
        for pattern, tflops in _PEAK_TFLOPS.items():
            if re.search(pattern, device_name):
                return tflops * 1e12
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a = torch.ones(MEASURE_SIZE, MEASURE_SIZE, dtype=dtype, device=device)
    best = float("inf")
    deadline = time.perf_counter() + MEASURE_SECONDS
    for _ in range(MEASURE_ROUNDS):
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        del product
        if time.perf_counter() > deadline:
            break
    return 2 * MEASURE_SIZE**3 / best


class Meter:
    """Adds up step facts between two records. The sums are part of the checkpoint: a resume loses none."""

    def __init__(
        self, plan: Plan, train_flops_per_image: float, peak: float, progress: Mapping[str, float]
    ) -> None:
        self._plan = plan
        self._flops_per_image = train_flops_per_image
        self._peak = peak
        self._loss_sum = float(progress.get("loss_sum", 0.0))
        self._steps = int(progress.get("steps", 0))
        self._wait = 0.0
        self._timed_steps = 0
        self._since = time.perf_counter()

    def add(self, facts: Iterable[StepFacts]) -> None:
        for fact in facts:
            if fact.skips == 0:  # else its loss is no number that a mean could hold
                self._loss_sum += fact.loss_sum
                self._steps += 1
            self._wait += fact.wait_seconds
            self._timed_steps += 1

    def state(self) -> dict[str, float]:
        return {"loss_sum": self._loss_sum, "steps": self._steps}

    def exclude(self, seconds: float) -> None:
        """Leave time that was not training (evaluation, a save) out of the speed."""
        self._since += seconds

    def record(self) -> dict[str, float]:
        """The metrics since the last record, and begin anew. Keys under `perf/` depend on the clock."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        images = self._timed_steps * self._plan.global_batch
        metrics = {
            "train/loss": self._loss_sum / (self._steps * self._plan.global_batch)
            if self._steps
            else math.nan,
            "perf/images_per_second": images / elapsed,
            "perf/step_seconds": elapsed / max(1, self._timed_steps),
            "perf/data_wait_share": self._wait / (self._plan.world_size * elapsed),
            "perf/mfu": images * self._flops_per_image / elapsed / (self._peak * self._plan.world_size),
        }
        self._loss_sum, self._steps = 0.0, 0
        self._wait, self._timed_steps, self._since = 0.0, 0, time.perf_counter()
        return metrics
