"""A Slurm of our own for the tests of this folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import cluster as slurm
import pytest
from digits import digits

__all__ = ["digits"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    missing = slurm.missing()
    if missing:
        pytest.skip(f"no Slurm here, it lacks {', '.join(missing)}: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: it holds a unix socket
        made = slurm.Cluster(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()
