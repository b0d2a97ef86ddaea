"""Runs of one campaign that begin at the same moment, as the members of a sweep do."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow_server import Stored
from patience import PATIENCE

from pretrain.tracking import Journal, store
from pretrain.tracking.deliver import Drainer, deliver

MEMBERS = 3


def test_runs_that_begin_together_find_one_parent(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow answers some later than others, and who is answered last began first by its own clock."""
    uri = f"sqlite:///{database}"
    find, late = store.MlflowRun._find, threading.local()

    def find_slowly(run: store.MlflowRun, experiment: str, tag: str, value: str) -> list[str]:
        found = find(run, experiment, tag, value)
        time.sleep(late.seconds)
        return found

    monkeypatch.setattr(store.MlflowRun, "_find", find_slowly)
    asking = threading.Barrier(MEMBERS)

    def member(number: int) -> str:
        late.seconds, run_dir = 0.3 * number, tmp_path / f"lr-{number}"
        journal = Journal.open(
            run_dir,
            experiment="e",
            name=run_dir.name,
            campaign="sweep",
            clock=lambda: 1_700_000_000 - number,
        )
        journal.close("FINISHED")
        asking.wait()
        assert deliver(Drainer(run_dir, uri), lambda: True, PATIENCE)
        return Stored(database, run_dir).tags()["mlflow.parentRunId"]

    MlflowClient(uri).create_experiment("e")
    with ThreadPoolExecutor(MEMBERS) as threads:
        parents = set(threads.map(member, range(MEMBERS)))
    assert len(parents) == 1, parents
    assert MlflowClient(uri).get_run(parents.pop()).info.lifecycle_stage == "active"
