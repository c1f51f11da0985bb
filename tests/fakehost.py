"""A web server on this machine that behaves well, or badly in a chosen way."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; the host's answer is called with it."""

    protocol_version = "HTTP/1.1"
    host: Host

    def do_GET(self) -> None:
        self.host.seen.append((self.command, self.path, dict(self.headers.items())))
        self.close_connection = True
        self.host.answer(self)

    do_HEAD = do_GET

    @property
    def first_byte(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def status(self, code: int, body: bytes = b"", **headers: str) -> None:
        """An answer with headers, named with _ for -, and a body."""
        self.send_response(code)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self, content: bytes, upto: int | None = None, stall_s: float = 0.0) -> None:
        """``content`` from the byte that was asked for; ``upto``: end the connection there."""
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = self.first_byte if self.headers.get("If-Range", etag) == etag else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:upto])
            self.wfile.flush()
            time.sleep(stall_s)


class Host:
    """``answer`` is called for each request; ``seen`` holds (method, path, headers)."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        handler = type("Bound", (Request,), {"host": self, "log_message": lambda *_: None})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def hosted(answer: Answer) -> Iterator[Host]:
    host = Host(answer)
    thread = threading.Thread(target=host.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield host
    finally:
        host.server.shutdown()
        thread.join()
        host.server.server_close()
