"""An HTTP server on loopback that answers ranges of the files in a folder; prints its URL. For `stores.py`."""

import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = Path(sys.argv[1]) / Path(self.path).name
        size = file.stat().st_size if file.is_file() else -1
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
        if size < 0:
            self.send_error(404)
            return
        self.send_response(206 if found else 200)
        self.send_header("ETag", f'"{file.stat().st_mtime_ns:x}-{size:x}"')
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with file.open("rb") as content:
            self.connection.sendfile(content, start, stop - start)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
