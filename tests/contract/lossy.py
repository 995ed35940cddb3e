"""An HTTP proxy that loses some of the answers: the server has acted, and the client cannot know."""

from __future__ import annotations

import contextlib
import http.client
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host"}


class LossyProxy(ThreadingHTTPServer):
    """`loses(path, n)` decides about the nth answer on a path, counted from 1. `num_lost` counts them by path."""

    daemon_threads = True

    def __init__(self, upstream: str, loses: Callable[[str, int], bool]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.loses = loses
        self.num_seen: Counter[str] = Counter()
        self.num_lost: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def is_lost(self, path: str) -> bool:
        with self.lock:
            self.num_seen[path] += 1
            lost = self.loses(path, self.num_seen[path])
            self.num_lost[path] += lost
            return lost


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LossyProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        with contextlib.closing(upstream):
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
        if self.server.is_lost(self.path.rpartition("/")[2]):
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _forward

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def lossy_proxy(upstream: str, loses: Callable[[str, int], bool]) -> Iterator[LossyProxy]:
    proxy = LossyProxy(upstream, loses)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
