"""A real S3 server on loopback: moto's, with one empty bucket."""

import contextlib
import urllib.request
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from patience import PATIENCE


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`s3://bucket` is empty and there; the environment leads to it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    for method, path in (("POST", "/moto-api/reset"), ("PUT", "/bucket")):
        urllib.request.urlopen(
            urllib.request.Request(endpoint + path, method=method), timeout=PATIENCE
        ).close()
    yield
    server.stop()
