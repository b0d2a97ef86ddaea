"""`mlflow models serve` answers for an exported model, over HTTP, with the model's own logits."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from peers import WIDE, model, photographs, random_weights, write
from ports import free_port

from pretrain.model import build

CONFIG = model(global_pool="map", **WIDE)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    folder = write(tmp_path / "model", "mlflow", CONFIG).path
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
    quiet = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (tmp_path / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet, "PATH": path},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_served_model_answers_with_the_trained_model_s_logits(address: str) -> None:
    for count in (1, 3):
        images = photographs(CONFIG, count)
        body = json.dumps({"inputs": images.tolist()}).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            got = torch.tensor(json.load(answer)["predictions"])
        with torch.no_grad():
            torch.testing.assert_close(
                got, build(CONFIG, random_weights(CONFIG))(images), atol=1e-5, rtol=1e-4
            )
    wrong = json.dumps({"inputs": [[[1]]]}).encode()
    with pytest.raises(urllib.request.HTTPError) as caught:
        urllib.request.urlopen(
            urllib.request.Request(address, wrong, {"Content-Type": "application/json"}), timeout=PATIENCE
        )
    assert caught.value.code == 400
