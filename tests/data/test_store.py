"""Reads from stores: all of the bytes, or a `DataError` that names the object, by the deadline."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import store_server as faults
from buckets import s3_server
from obstore.store import S3Store
from patience import PATIENCE
from store_server import StoreServer, serving

from pretrain.data import store
from pretrain.data.store import Stores
from pretrain.errors import DataError

SIZE = 300_000
TIMEOUT = 1.5
"""Seconds of a read that is to fail for want of time, and of silence."""


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def server(tmp_path: Path, content: bytes) -> Iterator[StoreServer]:
    (tmp_path / "a.tar").write_bytes(content)
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def stores() -> Iterator[Stores]:
    """Patient, so that nothing fails for want of time."""
    made = Stores(PATIENCE)
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[Stores]:
    made = Stores(TIMEOUT)
    yield made
    made.close()


def give_up_at(failure: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pause after so many failures in a row be longer than the time that is left, and those before it short."""
    monkeypatch.setattr(store, "pause_after", lambda failures, what: 0.01 if failures < failure else 1e9)


def test_a_range_is_one_request_and_exactly_its_bytes(server, stores, content):
    found = stores.read(f"{server.url}/a.tar", 1000, 200_000)
    assert found.data == content[1000:200_000]
    assert found.version.size == SIZE
    assert [request.range for request in server.requests] == ["bytes=1000-199999"]
    assert (stores.requests, stores.bytes) == (1, 199_000)


def test_a_whole_object_is_read_up_to_a_limit(server, stores, content):
    assert stores.read_whole(f"{server.url}/a.tar", SIZE) == content
    with pytest.raises(DataError, match=r"a\.tar: 300,000 bytes; at most 299,999 are read"):
        stores.read_whole(f"{server.url}/a.tar", SIZE - 1)


@pytest.mark.parametrize(
    "fault", [faults.unavailable, faults.resets_half_way, faults.promises_more, faults.sends_less]
)
@pytest.mark.parametrize("etags", [True, False])
def test_what_fails_once_or_twice_is_made_good(server, stores, content, fault, etags):
    server.etags = etags
    server.first(2, fault)
    assert stores.read(f"{server.url}/a.tar", 1000, SIZE).data == content[1000:]
    server.first(2, fault)
    if fault in (faults.unavailable, faults.resets_half_way):  # the others are about ranges
        assert stores.read_whole(f"{server.url}/a.tar", SIZE) == content


def test_a_read_goes_on_from_the_last_byte_under_if_match(server, stores, content):
    server.first(2, faults.resets_half_way)
    assert stores.read(f"{server.url}/a.tar", 0, SIZE).data == content
    starts = [int(request.range.removeprefix("bytes=").partition("-")[0]) for request in server.requests]
    assert starts == [0, SIZE // 2, SIZE // 2 + SIZE // 4]
    assert [request.if_match is not None for request in server.requests] == [False, True, True]
    assert stores.bytes == SIZE


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.unavailable, "status 503 Service Unavailable"),
        (faults.resets_half_way, "interrupted"),  # so many that resuming does not get to the end
        (faults.sends_another_range, "Requested 1000..2000, got 1001..2001"),
    ],
)
def test_what_fails_for_ever_ends_with_the_reason(server, stores, monkeypatch, fault, words):
    give_up_at(4, monkeypatch)
    server.always(fault)
    with pytest.raises(
        DataError,
        match=rf"a\.tar: not read within {PATIENCE} seconds; [\d,]+ of 1,000 bytes (.|\n)*{words}",
    ):
        stores.read(f"{server.url}/a.tar", 1000, 2000)


@pytest.mark.parametrize("fault", [faults.stalls_at_once, faults.stalls_half_way, faults.drips])
def test_what_never_ends_is_ended_by_its_deadline(server, hasty, fault):
    """The server would go on for minutes."""
    server.always(fault)
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"a\.tar: not read within 1\.5 seconds; [\d,]+ of 1,000 bytes (.|\n)*(timeout|time was over)",
    ):
        hasty.read(f"{server.url}/a.tar", 1000, 2000)
    assert time.monotonic() - began < PATIENCE / 2


def test_a_server_that_nobody_runs_ends_by_the_deadline(hasty):
    with pytest.raises(DataError, match=r"a\.tar: not read within 1\.5 seconds; 0 of 10 bytes"):
        hasty.read("http://127.0.0.1:9/a.tar", 0, 10)


def test_retries_wait_longer_and_longer(server, monkeypatch):
    server.always(faults.unavailable)
    made, pauses = Stores(9.0), []
    monkeypatch.setattr(made._closed, "wait", pauses.append)
    # it ends once a pause is longer than what is left of the time
    with pytest.raises(DataError, match=r"in \d+ attempts"):
        made.read(f"{server.url}/a.tar", 0, 10)
    assert len(pauses) >= 3
    for number, pause in enumerate(pauses):
        longest = min(store.LONGEST_PAUSE_SECONDS, store.FIRST_PAUSE_SECONDS * 2**number)
        assert longest / 2 <= pause <= longest


def test_a_missing_object_is_no_reason_to_try_again(server, stores):
    with pytest.raises(DataError, match=r"/b\.tar: there is no such object"):
        stores.read(f"{server.url}/b.tar", 0, 10)
    assert len(server.requests) == 1


def test_a_server_that_ignores_ranges_is_refused_at_once(server, stores):
    server.always(faults.ignores_ranges)
    with pytest.raises(DataError, match=r"a\.tar: the server ignores ranges (.|\n)*nginx"):
        stores.read(f"{server.url}/a.tar", 1000, 2000)
    assert stores.bytes == 0


def test_an_object_shorter_than_it_should_be_is_named(server, stores):
    with pytest.raises(
        DataError, match=r"a\.tar: cut short: it has 300,000 bytes and ends before byte 300,001"
    ):
        stores.read(f"{server.url}/a.tar", 1000, SIZE + 1)
    with pytest.raises(DataError, match=r"a\.tar: the store refuses the request \(status 416"):
        stores.read(f"{server.url}/a.tar", SIZE + 1000, SIZE + 2000)


@pytest.mark.parametrize("etags", [True, False])
def test_an_object_that_changes_between_reads_is_named(server, stores, tmp_path, etags):
    server.etags = etags
    version = stores.read(f"{server.url}/a.tar", 0, 10).version
    (tmp_path / "a.tar").write_bytes(b"x" * (SIZE + 1))
    with pytest.raises(DataError, match=r"a\.tar: it was changed while it was being read"):
        stores.read(f"{server.url}/a.tar", 10, 20, version)


def test_an_object_that_changes_half_way_is_named(server, stores, tmp_path):
    """Of the same size: the etag alone tells."""

    def changes(handler, body, is_range):
        (tmp_path / "a.tar").write_bytes(b"x" * SIZE)
        faults.resets_half_way(handler, body, is_range)

    server.first(1, changes)
    with pytest.raises(DataError, match=r"a\.tar: it was changed while it was being read \(its etag"):
        stores.read(f"{server.url}/a.tar", 0, SIZE)


@pytest.mark.parametrize("where", ["/real/a.tar", "http://localhost:{port}/real/a.tar"])
def test_a_redirect_to_another_path_or_host_is_followed(server, stores, content, tmp_path, where):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.tar").write_bytes(content)
    there = faults.redirects_to(where.format(port=server.server_port))
    server.fault = lambda request: None if request.path.startswith("/real") else there
    assert stores.read(f"{server.url}/a.tar", 5, 50).data == content[5:50]


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "/a.tar", "data:,x"])
def test_a_redirect_to_anything_else_or_in_a_circle_is_an_error(server, hasty, where):
    server.always(faults.redirects_to(where))
    with pytest.raises(DataError, match=r"a\.tar: (not read within|the store refuses)"):
        hasty.read(f"{server.url}/a.tar", 0, 10)
    assert hasty.bytes == 0


def test_closing_ends_a_read_that_waits(server, stores):
    import threading

    server.always(faults.unavailable)
    threading.Timer(0.3, stores.close).start()
    began = time.monotonic()
    with pytest.raises(DataError, match="because the reader was closed"):
        Stores.read(stores, f"{server.url}/a.tar", 0, 10)
    assert time.monotonic() - began < PATIENCE / 2


def put(key: str, content: bytes) -> None:
    obstore.put(S3Store("bucket", client_options={"allow_http": True}), key, content)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Iterator[None]:
    with s3_server(monkeypatch):
        put("set 1/a.tar", content)
        yield


def test_ranges_and_versions_of_an_s3_store(s3, stores, content):
    first = stores.read("s3://bucket/set 1/a.tar", 1000, 2000)
    assert first.data == content[1000:2000]
    assert stores.read("s3://bucket/set 1/a.tar", 5, SIZE, first.version).data == content[5:]
    assert stores.read_whole("s3://bucket/set 1/a.tar", SIZE) == content
    put("set 1/a.tar", content[::-1])
    with pytest.raises(DataError, match=r"s3://bucket/set 1/a\.tar: it was changed"):
        stores.read("s3://bucket/set 1/a.tar", 5, 10, first.version)


def test_credentials_that_are_not_there_are_an_error_of_one_screen(stores, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(DataError, match=r"gs://bucket: no connection can be set up") as caught:
        stores.read("gs://bucket/object", 0, 1)
    assert len(str(caught.value).splitlines()) <= 4


def test_what_an_s3_store_refuses_is_named_without_its_words(s3, stores):
    with pytest.raises(DataError, match=r"s3://bucket/b\.tar: there is no such object"):
        stores.read("s3://bucket/b.tar", 0, 10)
    with pytest.raises(DataError, match=r"s3://nobody/b\.tar: ") as refused:
        stores.read("s3://nobody/b.tar", 0, 10)
    assert "AKIA" not in str(refused.value)


def test_credentials_that_have_expired_are_named_by_the_stores_code(tmp_path, stores, monkeypatch):
    body = b"<Error><Code>ExpiredToken</Code><Message>hunter2</Message><Token>hunter2</Token></Error>"

    def expired(handler, *_):
        handler.send_response(400)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.tar").write_bytes(b"x")
    with serving(tmp_path) as server:
        server.always(expired)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        with pytest.raises(
            DataError, match=r"refuses the request \(status 400 Bad Request, ExpiredToken\)\n  Check cred"
        ) as refused:
            stores.read("s3://bucket/a.tar", 0, 1)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://", "http://local host"])
def test_an_endpoint_that_is_no_url_is_named(stores, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        DataError, match=r"s3://bucket: .*AWS_ENDPOINT_URL has to begin with http:// or https://"
    ):
        stores.read("s3://bucket/a.tar", 0, 1)


def test_requests_to_google_are_those_of_its_xml_api(tmp_path, content, stores, monkeypatch):
    """Against a server of our own that speaks what `GET Object` needs: path, range, precondition, token."""
    (tmp_path / "bucket" / "set").mkdir(parents=True)
    (tmp_path / "bucket" / "set" / "a.tar").write_bytes(content)
    with serving(tmp_path) as server:
        monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "hunter2")
        first = stores.read("gs://bucket/set/a.tar", 1000, 2000)
        assert first.data == content[1000:2000]
        assert stores.read("gs://bucket/set/a.tar", 5, SIZE, first.version).data == content[5:]
        assert {request.authorization for request in server.requests} == {"Bearer hunter2"}
        assert server.requests[1].if_match == first.version.etag
        server.always(lambda handler, body, is_range: handler.answer(403))
        with pytest.raises(
            DataError, match=r"gs://bucket/set/a\.tar: access is refused \(status 403"
        ) as refused:
            stores.read("gs://bucket/set/a.tar", 5, 10)
    assert "hunter2" not in str(refused.value)


def test_nothing_of_the_environment_is_needed_for_http(server, content, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    made = Stores(PATIENCE)
    assert made.read(f"{server.url}/a.tar", 0, 5).data == content[:5]
