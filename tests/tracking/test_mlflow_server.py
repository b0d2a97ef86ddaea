"""`launch/mlflow-server`: starts, answers those it should, and leaves no process behind."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE, lives, wait_until
from ports import free_port

from launch import keep
from launch.mlflow_server import allowed_hosts
from pretrain.errors import ConfigError
from pretrain.tracking import mounts
from pretrain.tracking.locks import LockFile

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "mlflow-server"


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it is gone
        return ""


def ask(port: int, host: str, method: str = "GET", **headers: str) -> int:
    """The status of an answer to a request that calls the server `host`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    body = '{"max_results": 1}' if method == "POST" else None
    path = path.partition("?")[0] if method == "POST" else path
    connection.request(method, path, body, {"Host": host, "Content-Type": "application/json"} | headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_it_starts_answers_those_it_should_and_ends_with_no_process_left(template: Path, tmp_path: Path):
    port = free_port()
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    command = [str(SCRIPT), "--port", str(port), "--name", "head.cluster", "--folder", str(tmp_path)]
    open_door = environment(MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE="true")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=open_door)
        assert server.stdout is not None
        assert f"tracking.uri: http://head.cluster:{port}" in server.stdout.readline(), log.name
        family = psutil.Process(server.pid).children(recursive=True)
        assert not any("huey" in words_of(member) for member in family)

        assert ask(port, f"head.cluster:{port}") == 200
        assert ask(port, f"127.0.0.1:{port}") == 200
        assert ask(port, "evil.com") == 403
        assert ask(port, f"10.1.2.3:{port}") == 403
        page = {"Origin": f"http://head.cluster:{port}"}
        assert ask(port, f"head.cluster:{port}", "POST", **page) == 200
        assert ask(port, f"head.cluster:{port}", "POST", Origin="http://evil.com") == 403
        assert (tmp_path / "server.lock").stat().st_mode & 0o077 == 0

        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
        assert second.returncode == 2
        assert "another server is running" in second.stderr

        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
        server.stdout.close()
    wait_until(lambda: not any(lives(member) for member in family))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_server_whose_starter_is_killed_is_gone_too(template: Path, tmp_path: Path):
    """SIGKILL, which nobody can answer: the next server can start in the same folder."""
    port = free_port()
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    command = [str(SCRIPT), "--port", str(port), "--workers", "1", "--folder", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
    assert server.stdout is not None
    assert "MLflow answers" in server.stdout.readline(), log.name
    family = psutil.Process(server.pid).children(recursive=True)
    assert len(family) > 1
    server.kill()
    server.wait()
    server.stdout.close()
    wait_until(lambda: not any(lives(member) for member in family))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    lock = LockFile(tmp_path / "server.lock")
    wait_until(lock.acquire)
    lock.release()


KEEPER = """
import sys
from launch import keep
keep.END_SECONDS = 1.0
sys.exit(keep.main(sys.argv[1:]))
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
elsewhere = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), elsewhere.pid, flush=True)
time.sleep(600)
"""
STARTER = """
import subprocess, sys, time
kept = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""
KEPT = [sys.executable, "-c", KEEPER, sys.executable, "-c", STUBBORN]


def test_who_ignores_sigterm_and_who_left_the_session_end_with_their_starter():
    command = [sys.executable, "-c", STARTER, *KEPT]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert starter.stdout is not None
    family = [psutil.Process(int(word)) for word in starter.stdout.readline().split()]
    assert len(family) == 2
    starter.kill()
    starter.wait()
    starter.stdout.close()
    wait_until(lambda: not any(lives(member) for member in family))


def test_what_a_killed_keeper_leaves_is_ended_from_outside(monkeypatch: pytest.MonkeyPatch):
    keeper = subprocess.Popen(
        KEPT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert keeper.stdout is not None
    assert keeper.stdin is not None
    family = [psutil.Process(int(word)) for word in keeper.stdout.readline().split()]
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()
    keeper.stdin.close()
    assert all(lives(member) for member in family)
    monkeypatch.setattr(keep, "END_SECONDS", 1.0)
    keep.end(keeper.pid)
    wait_until(lambda: not any(lives(member) for member in family))


@pytest.mark.parametrize("code", [0, 7])
def test_a_command_that_ends_by_itself_ends_with_its_own_code(code: int):
    words = [sys.executable, "-m", "launch.keep", sys.executable, "-c", f"raise SystemExit({code})"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True) as keeper:
        assert keeper.wait(PATIENCE) == code


@pytest.mark.parametrize(
    ("host", "names", "complaint"),
    [
        ("0.0.0.0", [], "say with --name"),
        ("head.cluster", [], "is no address"),
        ("::", ["head"], "IPv4"),
        ("127.0.0.1", ["*"], "plain host name"),
        ("127.0.0.1", ["head,*"], "plain host name"),
        ("127.0.0.1", ["head:5000"], "plain host name"),
    ],
)
def test_a_server_for_anybody_is_refused(host: str, names: list[str], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        allowed_hosts(host, 5000, names)


def test_only_the_hosts_that_were_named_are_allowed():
    assert allowed_hosts("0.0.0.0", 5000, ["head"]) == ["head:5000", "localhost:5000", "127.0.0.1:5000"]
    assert allowed_hosts("10.0.0.1", 5000, [])[0] == "10.0.0.1:5000"


MOUNTED = """\
proc /proc proc rw 0 0
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
mds@tcp:/fs /scratch\\040space lustre rw 0 0
/dev/sdb /home/local xfs rw 0 0
sshfs /mnt/far fuse.sshfs rw 0 0
"""


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    table.write_text(MOUNTED)
    monkeypatch.setattr(mounts, "MOUNTS", table)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/runs/mlflow.db", "nfs4"),
        ("/home/local/mlflow.db", None),
        ("/homes/mlflow.db", None),
        ("/scratch space/x/mlflow.db", "lustre"),
        ("/mnt/far/mlflow.db", "fuse.sshfs"),
        ("/var/mlflow.db", None),
    ],
)
def test_network_file_systems_are_told_from_disks(mounted: None, path: str, kind: str | None):
    assert mounts.network_filesystem(Path(path)) == kind


def test_sqlite_on_a_network_file_system_is_warned_about_in_training_and_refused_for_a_server(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from click.testing import CliRunner

    from launch.mlflow_server import mlflow_server
    from pretrain.config import RunConfig, TrackingConfig
    from pretrain.track import track
    from pretrain.tracking import Tracker, drain

    monkeypatch.setattr("pretrain.tracking.tracker._start_drainer", lambda *words: None)
    table = tmp_path / "mounts"
    table.write_text(f"server:/x {tmp_path.resolve()} nfs rw 0 0\n")
    monkeypatch.setattr(mounts, "MOUNTS", table)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with caplog.at_level("WARNING", "pretrain"):
        Tracker.start(tmp_path / "run", tracking, RunConfig(dir="x"), params={}, tags={}).finish("FINISHED")
    assert "network file system (nfs)" in caplog.text
    assert "launch/mlflow-server" in caplog.text
    shutil.copy(template, tmp_path / "mlflow.db")
    monkeypatch.setattr(drain, "CLIENT_ENVIRONMENT", {})
    synced = CliRunner().invoke(track, ["sync", str(tmp_path / "run")])
    assert synced.exit_code == 0, synced.output
    assert "Warning" in synced.stderr
    assert "network file system (nfs)" in synced.stderr
    refused = CliRunner().invoke(mlflow_server, ["--folder", str(tmp_path / "server")])
    assert isinstance(refused.exception, ConfigError)
    assert "network file system (nfs)" in str(refused.exception)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "file:///tmp/hunter2")
    refused = CliRunner().invoke(mlflow_server, ["--folder", str(tmp_path / "server")])
    assert "must be sqlite" in str(refused.exception)
    assert "hunter2" not in str(refused.exception)


def test_help_needs_no_mlflow():
    code = "import sys, launch.mlflow_server; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
