"""`launch/mlflow-server`: an MLflow tracking server for a team or a cluster's head node, with safe settings.

MLflow's own command listens as it is told and checks no more; beside the server it starts a runner of jobs whose
processes outlive it. Here only the hosts named are answered, nothing but the server runs, a sqlite file lies on a
local disk and belongs to one server, and when this process has ended, even by SIGKILL, so has all that it started
(`launch.keep`).
"""

import contextlib
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import click

from launch import keep
from pretrain import command
from pretrain.errors import ConfigError, UserError
from pretrain.tracking.locks import LockFile
from pretrain.tracking.mounts import sqlite_trouble
from pretrain.tracking.target import sqlite_path

STORE = "MLFLOW_BACKEND_STORE_URI"
START_SECONDS = 180.0
SAFE = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
UNSAFE = (
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
    "MLFLOW_SERVER_ALLOWED_HOSTS",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS",
)
"""Variables that would speak against the options."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class ServerError(UserError):
    """The server did not start, or ended by itself."""

    exit_code = 10


class _ToldToEndError(Exception):
    """Raised in place by a signal."""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Host name by which clients reach it; may be repeated. Others are refused.",
)
@click.option(
    "--folder",
    default="mlflow-server",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where mlflow.db and the artifacts lie; on a local disk.",
)
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes.")
def mlflow_server(host: str, port: int, names: tuple[str, ...], folder: Path, workers: int) -> int:
    """Start an MLflow tracking server, until it is told to end by Ctrl-C or SIGTERM.

    Runs are kept in FOLDER/mlflow.db, or in the database that MLFLOW_BACKEND_STORE_URI names in the environment.
    """
    hosts = allowed_hosts(host, port, names)
    os.umask(0o077)
    store = _store(folder)
    lock = LockFile(folder / "server.lock")
    if not lock.acquire():
        raise ConfigError(
            f"another server is running on {folder}: end it first, or give --folder another folder"
        )
    _refuse_taken_port(host, port)
    line = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    line += ["--workers", str(workers), "--allowed-hosts", ",".join(hosts)]
    line += ["--cors-allowed-origins", ",".join(f"http://{name}" for name in hosts)]
    line += ["--artifacts-destination", str(folder.absolute() / "artifacts")]
    with _running(line, _environment(store), lock) as process, _signals_raise():
        try:
            _wait_until_it_answers(process, host, port)
            _announce(host, port, names)
            code = process.wait()
        except _ToldToEndError:
            click.echo("ending", err=True)
            return 0
    raise ServerError(f"the server ended by itself with exit code {code}; its words stand above")


def allowed_hosts(host: str, port: int, names: Sequence[str]) -> list[str]:
    """What the `Host` header of a request may be. Raises `ConfigError` where that would be anything at all."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--name {name!r}: give a plain host name such as head.cluster, without a port")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"--host {host!r} is no address: give one of this machine's, and its name as --name"
        ) from None
    if address.version == 6:
        raise ConfigError(f"--host {host}: give an IPv4 address")
    if address.is_unspecified and not names:
        raise ConfigError(
            f"--host {host} listens on every network of this machine: say with --name which host clients ask for"
        )
    own = [] if address.is_unspecified else [host]
    found = dict.fromkeys([*names, *own, "localhost", "127.0.0.1"])
    return [form for name in found for form in (f"{name}:{port}", *([name] if port == 80 else []))]


def _store(folder: Path) -> str:
    """The URI of the database; raises `ConfigError` for one that cannot be relied on."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot use --folder {folder}: {error.strerror or error}") from None
    uri = os.environ.get(STORE) or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    database = sqlite_path(uri)
    if database is None and urlsplit(uri).scheme.partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        raise ConfigError(
            f"{STORE} must be sqlite:///FILE, postgresql://, mysql:// or mssql://; leave it unset for a file in --folder"
        )
    trouble = None if database is None else sqlite_trouble(database)
    if trouble:
        raise ConfigError(trouble)
    return uri


def _environment(store: str) -> dict[str, str]:
    """The store goes here rather than on the command line, where anybody on the machine could read its password."""
    kept = {name: value for name, value in os.environ.items() if name not in UNSAFE}
    return kept | SAFE | {STORE: store}


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}") from None


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)  # the end is under way
        raise _ToldToEndError

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    yield


@contextlib.contextmanager
def _running(
    line: Sequence[str], environment: Mapping[str, str], lock: LockFile
) -> Iterator["subprocess.Popen[bytes]"]:
    """The server, kept in a session of its own; afterwards nobody of it is left, whatever becomes of this process.

    Its keeper holds the folder's lock with us, so that a next server waits for the end of this one.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.keep", *line],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        env=dict(environment),
        start_new_session=True,
        pass_fds=(lock.fileno(),),
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3 * keep.END_SECONDS)
        keep.end(process.pid)
        process.wait()


def _wait_until_it_answers(process: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    """Returns too where the process ends."""
    deadline = time.monotonic() + START_SECONDS
    address = "127.0.0.1" if ipaddress.ip_address(host).is_unspecified else host
    while process.poll() is None:
        with contextlib.suppress(OSError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{address}:{port}/health", timeout=5):
                return
        if time.monotonic() > deadline:
            raise ServerError(f"the server gave no answer in {START_SECONDS:.0f} s")
        time.sleep(0.2)


def _announce(host: str, port: int, names: Sequence[str]) -> None:
    click.echo(f"MLflow answers. In a config: tracking.uri: http://{names[0] if names else host}:{port}")
    if not ipaddress.ip_address(host).is_loopback:
        click.echo(
            "Whoever reaches this port can read, change and delete runs: keep it inside of the cluster."
        )
    sys.stdout.flush()


if __name__ == "__main__":
    command.run(mlflow_server, "launch/mlflow-server")
