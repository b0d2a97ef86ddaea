"""A proxy in front of an MLflow server that misbehaves on demand."""

import http.client
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from patience import PATIENCE

Mode = Literal["pass", "drop", "reset", "stall", "500", "503", "slow", "lost"]

SLOW_SECONDS = 0.3


class Proxy:
    """Forwards to a server, one request a connection, so that a new mode holds from the next request on.

    pass    as it should be
    drop    the connection is closed without an answer
    reset   and reset
    stall   no answer, ever
    500, 503   that answer, and the server hears nothing
    slow    each answer takes `SLOW_SECONDS` longer
    lost    the server does what it is asked, and its answer is lost
    """

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.mode: Mode = "pass"
        self.seen: dict[str, int] = {}
        self._ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *words: object) -> None:
                pass

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._listener.server_address[1]}"
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._listener.shutdown()
        self._listener.server_close()

    def _handle(self, asked: BaseHTTPRequestHandler) -> None:
        mode = self.mode
        self.seen[mode] = self.seen.get(mode, 0) + 1
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        asked.close_connection = True
        if mode == "stall":
            self._ended.wait()
        elif mode == "reset":
            linger = struct.pack("ii", 1, 0)
            asked.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            asked.connection.close()
        elif mode in ("500", "503"):
            self._answer(asked, int(mode), b"misbehaving")
        elif mode != "drop":
            if mode == "slow":
                self._ended.wait(SLOW_SECONDS)
            status, answer = self._forward(asked, body)
            if mode != "lost":
                self._answer(asked, status, answer)

    def _forward(self, asked: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=PATIENCE)
        headers = {name: value for name, value in asked.headers.items() if name != "Connection"}
        try:
            upstream.request(asked.command, asked.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, answer.read()
        except OSError:
            return 502, b"the server is down"
        finally:
            upstream.close()

    def _answer(self, asked: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        asked.send_response(status)
        asked.send_header("Content-Type", "application/json")
        asked.send_header("Content-Length", str(len(body)))
        asked.end_headers()
        asked.wfile.write(body)
