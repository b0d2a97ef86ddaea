"""One MLflow server and one empty MLflow database for all tests of this folder: each costs seconds to make."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow_server import Server
from patience import let_runs_deliver


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made by the product's own code."""
    from pretrain.tracking.store import _create_database

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    _create_database(path)
    return path


@pytest.fixture(scope="session")
def server(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not running: a test starts or kills it as it needs."""
    server = Server(tmp_path_factory.mktemp("server"), template)
    yield server
    server.kill()


@pytest.fixture
def database(template: Path, tmp_path: Path) -> Path:
    """An embedded store with nothing in it."""
    return Path(shutil.copy(template, tmp_path / "mlflow.db"))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process deliver all that they have before they end."""
    let_runs_deliver(monkeypatch.setattr)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write an attempt's journal and close it, without a drainer; returns the run directory."""
    from pretrain.tracking import Journal

    def write(
        steps: range,
        value: Callable[[int], float] = float,
        *,
        from_step: int = 0,
        status: str | None = "FINISHED",
        perf: float | None = None,
        uri: str | None = None,
    ) -> Path:
        run_dir = tmp_path / "run"
        journal = Journal.open(run_dir, experiment="pretrain", name="run", uri=uri, from_step=from_step)
        for step in steps:
            values = {"train/loss": value(step)}
            journal.metrics(step, values if perf is None else values | {"perf/images_per_second": perf})
        if status is None:
            os.close(journal._descriptor)  # all that the kernel does for a killed process
        else:
            journal.close(status)
        return run_dir

    return write
