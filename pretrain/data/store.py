"""Bytes from HTTP servers, S3-compatible stores and Google Cloud Storage: whole objects and ranges, or a named error.

obstore (the object_store crate) speaks the protocols, signs requests and checks status, `Content-Range` and
`Content-Length`; whether and how often to try again is decided here, in one place for all stores. A read goes on from
the last byte that arrived, under `If-Match`, and ends by its deadline: with all of the bytes, or with a `DataError`
that names the object. State: one client for each host or bucket, safe to share between threads.
"""

import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pretrain.errors import DataError
from pretrain.logs import log

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

TIMEOUT_SECONDS = 120.0
STALL_SECONDS = 10.0
"""Silence after which a connection is given up; a read may end this much after its deadline."""
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0

T = TypeVar("T")

_STATUS = re.compile(r"status code: (\d{3}) ([A-Za-z -]*)")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
"""Of S3's and Google's answers, as `ExpiredToken`; in a list of theirs, so it is no secret and no identifier."""
_TRANSIENT_CLIENT_ERRORS = (408, 425, 429)


class NoSuchObjectError(DataError):
    """The store answers, and has no such object."""


class Version(NamedTuple):
    """Which object a path names: when any of it differs, it is another one. etag: as the store gives it, or none."""

    size: int
    etag: str | None
    modified: datetime


class Content(NamedTuple):
    data: bytearray
    version: Version


@dataclass
class _Read:
    """What is to be read of an object, and what of it has arrived. stop: none where all of it is wanted."""

    url: str
    start: int
    stop: int | None
    limit: int
    version: Version | None
    deadline: float = 0.0
    data: bytearray = field(default_factory=bytearray)


class _Again(Exception):  # noqa: N818 an attempt that failed, not an error to show
    """An attempt failed in a way that another one may mend."""


class Stores:
    """Reads objects by URL. Thread-safe. `requests` and `bytes` count what was asked for and what arrived."""

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """timeout_seconds: of one read, all attempts and pauses included."""
        self.timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._clients: dict[str, ObjectStore] = {}
        self._closed = threading.Event()
        self.requests = 0
        self.bytes = 0

    def read(self, url: str, start: int, stop: int, version: Version | None = None) -> Content:
        """Bytes [start, stop) of an object that is longer; `version`: what it has to be, where that is known.

        Raises `DataError` where there is no such object, where it changed, where the store ignores ranges, and where
        the bytes do not arrive in time.
        """
        read = _Read(url, start, stop, stop - start, version)
        return Content(read.data, self._until_done(read, partial(self._attempt, read)))

    def read_whole(self, url: str, limit: int) -> bytes:
        """An object of at most `limit` bytes."""
        read = _Read(url, 0, None, limit, None)
        self._until_done(read, partial(self._attempt, read))
        return bytes(read.data)

    def version(self, url: str) -> Version:
        """Which object a URL names; asked by reading its first byte, so that a server without ranges is refused here."""
        return self.read(url, 0, 1).version

    def tars(self, folder: str) -> dict[str, Version]:
        """The `*.tar` objects right below a folder, by name, in its order. HTTP servers cannot be asked for it."""
        import obstore

        client, prefix = self._client(f"{folder}/")

        def listed() -> dict[str, Version]:
            with self._named(folder):
                found = obstore.list_with_delimiter(client, prefix or None)["objects"]
            return {
                meta["path"].rpartition("/")[2]: Version(
                    meta["size"], meta.get("e_tag"), meta["last_modified"]
                )
                for meta in found
                if meta["path"].endswith(".tar")
            }

        return dict(sorted(self._until_done(_Read(folder, 0, None, 0, None), listed).items()))

    def close(self) -> None:
        """Let reads that wait in other threads end early."""
        self._closed.set()

    def _until_done(self, read: "_Read", attempt: Callable[[], T]) -> T:
        """Attempts, each from where the last one ended, until one succeeds or the time is over."""
        read.deadline = deadline = time.monotonic() + self.timeout_seconds
        failures, attempts = 0, 0
        while True:
            if self._closed.is_set():
                raise DataError(f"{read.url}: not read, because the reader was closed")
            attempts, had = attempts + 1, len(read.data)
            try:
                return attempt()
            except _Again as error:
                reason = str(error)
            failures = 1 if len(read.data) > had else failures + 1
            pause = pause_after(failures, f"{read.url} {read.start}")
            if time.monotonic() + pause > deadline:
                wanted = "" if read.stop is None else f" of {read.stop - read.start:,}"
                raise DataError(
                    f"{read.url}: not read within {self.timeout_seconds:g} seconds; {len(read.data):,}{wanted} bytes arrived "
                    f"in {attempts} attempts, and the last one failed: {reason}"
                )
            log.warning("%s: %s; trying again in %.1f seconds", read.url, reason, pause)
            self._closed.wait(pause)

    def _attempt(self, read: "_Read") -> Version:
        """One request for what is missing, added as it arrives. Raises `_Again` or `DataError`."""
        if read.version is None or (read.stop is None and read.version.etag is None):
            read.data.clear()  # nothing says that the rest would be of the same object
        options: GetOptions = {}
        if read.stop is not None:
            options["range"] = (read.start + len(read.data), read.stop)
        elif read.data:
            options["range"] = {"offset": len(read.data)}
        if read.version is not None and read.version.etag and not read.version.etag.startswith("W/"):
            options["if_match"] = read.version.etag  # a weak one never matches (RFC 9110, section 13.1.1)
        result = self._ask(read.url, options)
        meta = result.meta
        found = Version(meta["size"], meta.get("e_tag"), meta["last_modified"])
        if read.version is not None and found != read.version:
            raise _changed(read.url, read.version, found)
        stop = found.size if read.stop is None else read.stop
        if stop - read.start > read.limit:
            raise DataError(f"{read.url}: {found.size:,} bytes; at most {read.limit:,} are read")
        if stop > found.size:
            raise DataError(
                f"{read.url}: cut short: it has {found.size:,} bytes and ends before byte {stop:,}"
            )
        read.version = found
        self._append(result, read.data, stop - read.start, read.deadline)
        return found

    def _append(self, result: "GetResult", data: bytearray, wanted: int, deadline: float) -> None:
        stream = iter(result.stream(min_chunk_size=1))  # as they arrive, so that a break loses none
        while len(data) < wanted:
            try:
                piece = next(stream, None)
            except Exception as error:
                raise _Again(reason_of(error)) from None
            if piece is None:
                raise _Again(f"the answer ended {wanted - len(data):,} bytes early")
            data += piece
            with self._lock:
                self.bytes += len(piece)
            if len(data) > wanted:
                del data[:]
                raise _Again("more bytes arrived than were asked for")
            if len(data) < wanted and (self._closed.is_set() or time.monotonic() > deadline):
                raise _Again("the time was over")

    def _ask(self, url: str, options: "GetOptions") -> "GetResult":
        import obstore

        client, key = self._client(url)
        with self._named(url, options.get("if_match")):
            return obstore.get(client, key, options=options)

    @contextmanager
    def _named(self, url: str, etag: str | None = None) -> Iterator[None]:
        """Count a request; its failure is `_Again`, or a `DataError` where another attempt would not mend it."""
        from obstore import exceptions

        with self._lock:
            self.requests += 1
        try:
            yield
        except FileNotFoundError:
            raise NoSuchObjectError(f"{url}: there is no such object") from None
        except exceptions.PreconditionError:
            raise DataError(
                f"{url}: it was changed while it was being read (its etag is no longer {etag})"
            ) from None
        except exceptions.NotSupportedError:
            raise DataError(
                f"{url}: the server ignores ranges and would send the whole object for each block\n"
                "  Serve the shards by one that answers `Range` (nginx does), or copy them to a local folder."
            ) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise DataError(
                f"{url}: access is refused ({reason_of(error)})\n"
                "  Give credentials in the environment; docs/stores.md says how for each kind of store."
            ) from None
        except exceptions.BaseError as error:
            status = _STATUS.search(str(error))
            if status and int(status[1]) < 500 and int(status[1]) not in _TRANSIENT_CLIENT_ERRORS:
                raise DataError(
                    f"{url}: the store refuses the request ({reason_of(error)})\n"
                    "  Check credentials, region and endpoint in the environment; docs/stores.md names them."
                ) from None
            raise _Again(reason_of(error)) from None

    def _client(self, url: str) -> tuple["ObjectStore", str]:
        """The client of a URL's host or bucket, and the key of the object there."""
        scheme, _, rest = url.partition("://")
        place, _, key = rest.partition("/")
        address = f"{scheme}://{place}"
        with self._lock:
            if address not in self._clients:
                try:
                    self._clients[address] = connect(scheme, place, self.timeout_seconds)
                except Exception as error:  # credentials that are not there, or not readable
                    raise DataError(
                        f"{address}: no connection can be set up ({reason_of(error)})\n"
                        "  Check the credentials in the environment; docs/stores.md names them."
                    ) from None
            return self._clients[address], key


def connect(scheme: str, place: str, timeout_seconds: float) -> "ObjectStore":
    """A client that tries once. Credentials and endpoints come from the environment, by each vendor's own names."""
    from obstore.store import GCSStore, HTTPStore, S3Store

    stall = min(STALL_SECONDS, timeout_seconds)
    # Redirects are followed by the client to http and https only, and from https to https only.
    plain = {"s3": _endpoint("AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "gs": _endpoint("GOOGLE_BASE_URL")}
    options: ClientConfig = {
        "allow_http": plain.get(scheme, scheme + ":").startswith("http:"),
        "connect_timeout": _milliseconds(stall),
        "read_timeout": _milliseconds(stall),
        "timeout": _milliseconds(timeout_seconds),
    }
    once: RetryConfig = {"max_retries": 0}
    if scheme == "s3":
        return S3Store(place, client_options=options, retry_config=once)
    if scheme == "gs":
        return GCSStore(place, client_options=options, retry_config=once)
    return HTTPStore(f"{scheme}://{place}", client_options=options, retry_config=once)


def _endpoint(*names: str) -> str:
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return "https:"
    if not re.fullmatch(r"https?://[^/\s]\S*", os.environ[name]):  # the client would panic
        raise ValueError(f"{name} has to begin with http:// or https:// and a host")
    return os.environ[name]


def _milliseconds(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def pause_after(failures: int, what: str) -> float:
    """Doubles up to a bound, between half of it and all of it: by what is read, so that readers do not march in step."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (failures - 1))
    share = zlib.crc32(f"{os.getpid()} {what} {failures}".encode()) / 2**32
    return longest * (0.5 + share / 2)


def _changed(url: str, before: Version, now: Version) -> DataError:
    return DataError(
        f"{url}: it was changed while it was being read: {before.size:,} bytes, etag {before.etag}, then "
        f"{now.size:,} bytes, etag {now.etag}\n  Data sets must not change while they are in use; put new shards elsewhere."
    )


def reason_of(error: Exception) -> str:
    """The words of an error for people; a store's answer may hold identifiers, so only its code is kept of the body."""
    text = str(error)
    status = _STATUS.search(text)
    if status:
        code = _CODE.search(text)
        return f"status {status[1]} {status[2].strip()}" + (f", {code[1]}" if code else "")
    kind = re.search(r"kind: (Timeout|Connect|Interrupted)\b", text)
    words = text.partition("\n")[0].rpartition(" - ")[2][:200]
    return f"{words} ({kind[1].lower()})" if kind else words
