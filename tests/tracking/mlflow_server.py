"""A real MLflow server that can be killed and brought back, and a look into its database past MLflow's own code."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from patience import PATIENCE
from ports import free_port


class Server:
    """`mlflow server` over a sqlite file on a port of its own. It is not running until `start`."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        self.database = folder / "server.db"
        self.database.write_bytes(template.read_bytes())
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers; nothing happens if it is running."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet}
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """The whole process group, without a chance to tidy up."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Stored:
    """What a database holds of the run whose directory is given."""

    def __init__(self, database: Path, run_dir: Path) -> None:
        self._database = database
        self._uid = (run_dir / "tracking" / "run_uid").read_text().strip()

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step and, within a step, oldest first."""
        return self._ask(
            "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step, timestamp",
            self.run_id,
            name,
        )

    def tags(self) -> dict[str, str]:
        return dict(self._ask("SELECT key, value FROM tags WHERE run_uuid = ?", self.run_id))

    def params(self) -> dict[str, str]:
        return dict(self._ask("SELECT key, value FROM params WHERE run_uuid = ?", self.run_id))

    def datasets(self) -> list[tuple[str, str]]:
        return self._ask("SELECT name, digest FROM datasets ORDER BY name")

    @property
    def run_ids(self) -> list[str]:
        rows = self._ask("SELECT run_uuid FROM tags WHERE key = 'run_uid' AND value = ?", self._uid)
        return [run_id for (run_id,) in rows]

    @property
    def run_id(self) -> str:
        (run_id,) = self.run_ids
        return run_id

    @property
    def status(self) -> str:
        ((status,),) = self._ask("SELECT status FROM runs WHERE run_uuid = ?", self.run_id)
        return str(status)

    def _ask(self, query: str, *values: str) -> list[tuple]:
        with sqlite3.connect(self._database, timeout=PATIENCE) as connection:
            return connection.execute(query, values).fetchall()
