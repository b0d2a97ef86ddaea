"""How long forward passes take on the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardTime:
    """Adds up what is `measured`, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        if self._on_cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call. The device must be through with them: call it where its loss is known."""
        seconds: float = self._seconds + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds
