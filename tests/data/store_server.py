"""A real HTTP server on loopback that serves a folder with ranges and etags, and misbehaves when told to."""

import fcntl
import hashlib
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from patience import PATIENCE, wait_until


class Request(NamedTuple):
    path: str
    range: str | None
    if_match: str | None
    authorization: str | None


Fault = Callable[["Handler", bytes, bool], None]
"""Answers in place of the server: the handler, the bytes that were asked for, and whether as a range."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "StoreServer"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.path = unquote(self.path)  # clients may encode every letter
        wanted, if_match = self.headers.get("Range"), self.headers.get("If-Match")
        request = Request(self.path, wanted, if_match, self.headers.get("Authorization"))
        self.server.requests.append(request)
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self.answer(404)
            return
        content = file.read_bytes()
        self.etag = f'"{hashlib.sha256(content).hexdigest()}"' if self.server.etags else None
        if if_match is not None and if_match != self.etag:
            self.answer(412)
            return
        self.size, self.start, stop = len(content), 0, len(content)
        if wanted is not None:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            self.start, stop = int(first), min(int(last or len(content) - 1) + 1, len(content))
            if self.start >= len(content):
                self.answer(416)
                return
        body = content[self.start : stop]
        fault = self.server.fault(request)
        if fault is not None:
            fault(self, body, wanted is not None)
            return
        self.head(206 if wanted is not None else 200, len(body))
        self.wfile.write(body)

    def head(self, status: int, length: int, promised: int | None = None) -> None:
        """The header of an answer of `length` bytes; it says `promised` in place of that."""
        self.send_response(status)
        if self.etag is not None:
            self.send_header("ETag", self.etag)
            self.send_header("Last-Modified", "Tue, 03 Mar 2026 10:00:00 GMT")
        if status == 206:
            self.send_header("Content-Range", f"bytes {self.start}-{self.start + length - 1}/{self.size}")
        self.send_header("Content-Length", str(promised or length))
        self.end_headers()

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def reset(self) -> None:
        """End the connection with a TCP reset, once the peer has what was sent: the system would throw it away."""
        self.wfile.flush()
        wait_until(lambda: not self._on_its_way())
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        self.connection.close()

    def _on_its_way(self) -> int:
        """Bytes that the peer's system has not acknowledged."""
        (count,) = struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))
        return int(count)


class StoreServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.etags = True
        self.ended = threading.Event()
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault | None] = lambda request: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def first(self, count: int, fault: Fault, of: str = "") -> None:
        """Let the first `count` requests whose path ends in `of` meet a fault."""
        left = [fault] * count
        self.fault = lambda request: left.pop() if left and request.path.endswith(of) else None

    def always(self, fault: Fault, of: str = "") -> None:
        self.fault = lambda request: fault if request.path.endswith(of) else None

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def serving(folder: Path) -> Iterator[StoreServer]:
    server = StoreServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def unavailable(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.answer(503)


def resets_half_way(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.head(206 if is_range else 200, len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.reset()


def stalls_half_way(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.head(206 if is_range else 200, len(body))
    handler.wfile.write(body[: len(body) // 2])
    handler.wfile.flush()
    handler.server.ended.wait(PATIENCE)


def stalls_at_once(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.server.ended.wait(PATIENCE)


def drips(handler: Handler, body: bytes, is_range: bool) -> None:
    """A byte now and then: never silent for long, never done."""
    handler.head(206 if is_range else 200, len(body))
    for byte in body:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.2)


def promises_more(handler: Handler, body: bytes, is_range: bool) -> None:
    """A `Content-Length` beyond what is sent."""
    handler.head(206 if is_range else 200, len(body), promised=len(body) + 1)
    handler.wfile.write(body)
    handler.close_connection = True


def sends_less(handler: Handler, body: bytes, is_range: bool) -> None:
    """A `Content-Range` of all that was asked for, and half of it."""
    handler.head(206, len(body), promised=len(body) // 2)
    handler.wfile.write(body[: len(body) // 2])


def sends_another_range(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.start += 1
    handler.head(206, len(body))
    handler.wfile.write(body)


def ignores_ranges(handler: Handler, body: bytes, is_range: bool) -> None:
    content = (handler.server.folder / handler.path.lstrip("/")).read_bytes()
    handler.head(200, len(content))
    handler.wfile.write(content)


def flips_a_bit(handler: Handler, body: bytes, is_range: bool) -> None:
    handler.head(206 if is_range else 200, len(body))
    damaged = bytearray(body)
    damaged[len(body) // 2] ^= 1
    handler.wfile.write(damaged)


def redirects_to(location: str) -> Fault:
    def fault(handler: Handler, body: bytes, is_range: bool) -> None:
        handler.answer(302, Location=location)

    return fault
