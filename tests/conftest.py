"""What holds for every test: no thread storms, no deadlines on a busy machine."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# Read by torch's and numpy's thread pools when they are first imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores Ctrl-C for what it starts in the background, and whoever is started inherits that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and however long it takes to draw them: what fails here fails everywhere.
settings.register_profile(
    "pretrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("pretrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA device, and say so where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
